"""Records of a store through the towers: in memory, on disk, and for other programs."""

EMBEDDINGS, IDS = "embeddings.npy", "ids.parquet"
