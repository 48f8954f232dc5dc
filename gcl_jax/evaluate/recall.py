"""Recall@k in both directions: `python -m gcl_jax.evaluate --workdir=RUN --recall`.

As CLIP is evaluated on COCO and Flickr30k (arXiv 2103.00020 and CLIP_benchmark): every pair of a
split is a caption of its image, and an image may have several.

    text to image   the share of captions whose image is among the best k images
    image to text   the share of images of whose captions any is among the best k captions
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from gcl_jax import distributed
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Embedder
from gcl_jax.evaluate.results import write_json
from gcl_jax.runs import NEWEST, load_run
from gcl_jax.search.index import exact_top_k

KS = (1, 5, 10)


def recall_at(
    texts: Float[np.ndarray, "t e"],
    images: Float[np.ndarray, "n e"],
    image_of: Int[np.ndarray, " t"],
) -> dict[str, dict[str, float]]:
    """{"text_to_image" or "image_to_text": {"R@1": share, ...}} over the texts, and over the images
    that have a text; the others are only in the way. `image_of`: each text's image."""
    _, best_images = exact_top_k(texts, images, max(KS))
    described = np.unique(image_of)
    _, best_texts = exact_top_k(images[described], texts, max(KS))
    hits = {
        "text_to_image": best_images == image_of[:, None],
        "image_to_text": image_of[best_texts] == described[:, None],
    }
    return {
        direction: {f"R@{k}": float(hit[:, :k].any(axis=1).mean()) for k in KS}
        for direction, hit in hits.items()
    }


def recall_splits(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder, cache: EmbeddingCache
) -> dict[str, dict]:
    """{split: `recall_at` with the numbers of "captions" and "images"} of `cfg.eval.splits`."""
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    rows = np.unique(np.concatenate(list(corpora.values())))
    documents = cache.documents(cfg, store, embedder, rows)
    results = {}
    for split, corpus in corpora.items():
        pairs = store.pairs(split)
        asked, text_of = np.unique(pairs.query, return_inverse=True)
        weights = cfg.data.query_fields
        queries = embedder.embed("query", store.queries, list(weights), asked, description=split)
        texts = queries.merged(weights)[text_of]
        image_of = np.searchsorted(corpus, pairs.document)
        counts = {"captions": len(texts), "images": len(corpus)}
        results[split] = counts | recall_at(texts, documents.of(corpus)["merged"], image_of)
    return results


def recall_run(workdir: Path, embed_dim: int | None = None, checkpoint: str = NEWEST) -> str:
    """Writes WORKDIR/eval/recall/SPLIT.json for a checkpoint of a run and returns the table."""
    cfg, store, params, mesh, step = load_run(workdir, embed_dim, checkpoint=checkpoint)
    cache = EmbeddingCache(workdir, step)
    results = recall_splits(cfg, store, Embedder(cfg, params, mesh), cache)
    if not distributed.is_first():
        return ""
    for split, result in results.items():
        name = split if embed_dim is None else f"{split}@{embed_dim}"
        write_json(workdir / "eval" / "recall" / f"{name}.json", {"step": step, **result})
    return format_table(results)


def format_table(results: dict[str, dict]) -> str:
    """One row per split."""
    names = [f"R@{k}" for k in KS]
    lines = [f"{'':<34}{'text to image':>24}{'image to text':>26}"]
    columns = "".join(f"{name:>8}" for name in names)
    lines.append(f"{'split':<16}{'captions':>9}{'images':>9}{columns}  {columns}")
    lines.append("-" * len(lines[-1]))
    for split, result in results.items():
        cells = (
            "".join(f"{result[direction][name]:>8.4f}" for name in names)
            for direction in ("text_to_image", "image_to_text")
        )
        counts = f"{result['captions']:>9}{result['images']:>9}"
        lines.append(f"{split:<16}{counts}{'  '.join(cells)}")
    return "\n".join(lines)
