"""What a search found: as JSON, as a table, as image files."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.data.store import Records
from gcl_jax.errors import DataError


def image_type(encoded: bytes) -> str:
    """The format of an encoded image as a MIME subtype: "png", "jpeg", "webp", ...

    Raises:
        DataError: not an image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return Image.MIME[image.format or ""].removeprefix("image/")
    except (OSError, KeyError):
        raise DataError("a field of kind image holds something else") from None


def fields_of_kind(records: Records, record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of `record` that are of `kind` and not missing."""
    return {name: record[name] for name, k in records.fields.items() if k == kind and record[name]}


def save_images(documents: Records, rows: np.ndarray, folder: Path, prefix: str) -> None:
    """Writes the images of the documents `rows` as stored: FOLDER/PREFIX-RANK-FIELD.TYPE."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, row in enumerate(rows, 1):
        for field, encoded in fields_of_kind(documents, documents[row], "image").items():
            name = f"{prefix}-{rank:02}-{field}.{image_type(encoded)}"
            (folder / name).write_bytes(encoded)


def as_results(documents: Records, scores: np.ndarray, rows: np.ndarray) -> list[dict]:
    """[{rank, score, id, fields: {text field: text}}], best first, of one query's (k,) arrays."""
    records = [documents[row] for row in rows]
    return [
        {
            "rank": rank,
            "score": round(float(score), 6),
            "id": record["id"],
            "fields": fields_of_kind(documents, record, "text"),
        }
        for rank, (score, record) in enumerate(zip(scores, records, strict=True), 1)
    ]


def format_table(results: list[dict], width: int | None = None) -> str:
    """One line per result, cut at `width` characters."""
    names = list(dict.fromkeys(name for result in results for name in result["fields"]))
    table = [["rank", "score", "id", *names]]
    for result in results:
        texts = [one_line(result["fields"].get(name, "")) for name in names]
        table.append(
            [str(result["rank"]), f"{result['score']:.4f}", one_line(result["id"]), *texts]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join([*map(str.rjust, row[:2], widths), *map(str.ljust, row[2:], widths[2:])]).rstrip()
        for row in table
    )
    return "\n".join(
        line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines
    )


def one_line(text: str) -> str:
    """Line breaks and terminal control sequences would break the table, or worse."""
    return "".join(char if char.isprintable() else " " for char in text)
