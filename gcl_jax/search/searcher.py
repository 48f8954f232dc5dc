"""A run that answers one query after the other: what the search page asks."""

import copy
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError

from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import DataError
from gcl_jax.options import NEWEST
from gcl_jax.runs import load_run
from gcl_jax.search.__main__ import Query, QueryRecords, SearchIndex

KINDS = {"text": "text", "image": "image"}  # what a query may be
MAX_K = 100
MAX_PIXELS = 40_000_000  # of a query: less than a store may hold, since somebody waits for it
# What Pillow may try to read: others call programs (EPS) or mean nothing to a browser.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class Searcher:
    """A run that answers one text or image at a time. The towers are shared by all fields, so
    either may be asked, whatever the query fields of the training data are."""

    def __init__(
        self,
        workdir: Path,
        split: str | None,
        embed_dim: int | None,
        checkpoint: str = NEWEST,
    ):
        """Embeds the documents, of the corpus of `split` or all, unless the run keeps their
        embeddings, and compiles what queries need.

        Raises:
            ConfigError, DataError, UserError: `workdir` is no run, or has no such split or
                dimensions; a document that cannot be read.
        """
        cfg, self.store, params, mesh, self.step = load_run(
            workdir, embed_dim, checkpoint=checkpoint
        )
        self.name = str(workdir)
        self.takes_images = cfg.model.vision is not None
        rows = self.store.corpus(split) if split else np.arange(len(self.store.documents))
        cache = EmbeddingCache(workdir, self.step)
        self._index = SearchIndex(cfg, self.store, params, mesh, rows, cache)
        # One query a batch: a larger one would answer as many times more slowly.
        cfg = copy.deepcopy(cfg)
        cfg.eval.batch_size = 1
        self._embedder = Embedder(cfg, params, mesh)
        self.documents = len(rows)
        self.search({"text": "warm up"}, 1)
        if self.takes_images:
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            self.search({"image": file.getvalue()}, 1)

    def search(
        self, query: Query, top_k: int
    ) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """(cosines, rows in the store), each (top_k,), of {"text": ...} or {"image": ...}.

        Raises:
            DataError: an unreadable image.
        """
        records = QueryRecords(KINDS, [query])
        found = self._embedder.embed("query", records, list(query), np.arange(1), quiet=True)
        embedding = found.merged(dict.fromkeys(query, 1.0))
        # Always as many: another number would have to be compiled.
        scores, rows = self._index.nearest(embedding, MAX_K)
        return scores[0, :top_k], rows[0, :top_k]


def check_image(encoded: bytes) -> None:
    """Looks at the header of an encoded image.

    Raises:
        DataError: not an image, of no common format, or of more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise DataError(f"this is not an image ({', '.join(FORMATS)})") from None
    # As in `decode_image`, whatever a decoder raises.
    except Exception as error:
        raise DataError(f"unreadable image: {error}") from None
    if width * height > MAX_PIXELS:
        raise DataError(
            f"the image has {width} x {height} = {width * height / 1e6:.0f} million pixels; at "
            f"most {MAX_PIXELS / 1e6:.0f} million are searched for"
        )
