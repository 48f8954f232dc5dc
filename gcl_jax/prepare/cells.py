"""What a cell of a table may hold: text, a score, a split's name, an image."""

import io
import json
import math
import os
import re
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gcl_jax.data.transforms import MAX_PIXELS, decode_image
from gcl_jax.prepare.bad_rows import Reason, RowError


def text_cell(value: object) -> str:
    """A cell as text, "" where it is missing or blank. Raises `RowError`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise RowError(Reason.NOT_UTF8, str(error)) from None
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"a {type(value).__name__} in place of a text")
    return "" if value.isspace() else value


def names_cell(value: object) -> list[str]:
    """A cell as a list of texts, each once: a list, or the JSON of one; empty where it is missing.
    Raises `RowError`."""
    shown = repr(value)[:80]
    if not isinstance(value, list):
        text = text_cell(value)
        try:
            value = json.loads(text or "[]")
        except (ValueError, RecursionError):
            raise RowError(Reason.BAD_LIST, shown) from None
        if not isinstance(value, list):
            raise RowError(Reason.BAD_LIST, shown)
    names = [text_cell(name) for name in value]
    if not all(names):
        raise RowError(Reason.BAD_LIST, f"an empty entry in {shown}")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise RowError(Reason.NOT_UTF8, str(error)) from None
    return list(dict.fromkeys(names))


def image_cell(value: object) -> str | bytes:
    """A cell as the path or the encoded bytes of an image, empty where it is missing; takes the
    {"bytes", "path"} structs of Hugging Face data sets too. Raises `RowError`."""
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else text_cell(value)


def score_cell(value: object) -> float:
    """A cell as a score. Raises `RowError` when it is no number in [1, 100]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RowError(Reason.BAD_SCORE, f"{value!r} is no number") from None
    if not 1 <= score <= 100:  # NaN too
        raise RowError(Reason.BAD_SCORE, f"{value!r}")
    return score


def split_cell(value: object) -> str:
    """A cell as the name of a split, which names a folder of the store. Raises `RowError`."""
    name = text_cell(value)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise RowError(Reason.BAD_SPLIT, f"{name!r}")
    return name


def load_image(cell: str | bytes, root: Path, confined: bool = False) -> bytes:
    """The encoded bytes of a still image that decodes, as they are; `root` is where a relative path
    begins, and where an absolute one must lead too if `confined`. Raises `RowError`."""
    data = cell if isinstance(cell, bytes) else _read_file(cell, root, confined)
    name = cell if isinstance(cell, str) else f"{len(cell)} bytes"
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            # A phone's MPO is a JPEG with extras behind the photo, no animation.
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            # Pillow cuts the channels of some 16-bit modes at 255, others it divides.
            stored = [str(tile[3]) for tile in image.tile]
            deep = image.mode[0] in "IF" or any(";16" in arguments for arguments in stored)
        decode_image(data)
    except UnidentifiedImageError:
        raise RowError(Reason.UNREADABLE_IMAGE, f"{name} is no image") from None
    except Image.DecompressionBombError as error:
        raise RowError(Reason.HUGE_IMAGE, f"{name}: {error}") from None
    except Exception as error:  # a broken file can make Pillow's parsers raise anything
        detail = str(error).removeprefix("unreadable image: ")
        raise RowError(Reason.UNREADABLE_IMAGE, f"{name}: {detail}") from None
    if animated:
        raise RowError(Reason.ANIMATED_IMAGE, name)
    if deep:
        raise RowError(Reason.DEEP_IMAGE, name)
    return data


def _read_file(path: str, root: Path, confined: bool) -> bytes:
    # Lexically, so that a root full of symbolic links serves.
    within = os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path)
    may_leave = os.path.isabs(path) and not confined
    if within.split(os.sep)[0] == os.pardir and not may_leave:
        raise RowError(Reason.OUTSIDE_ROOT, path)
    file = Path(os.path.normpath(root / path))
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RowError(Reason.MISSING_IMAGE, str(file)) from None
    except (OSError, ValueError) as error:
        raise RowError(Reason.UNREADABLE_IMAGE, f"{path!r}: {error}") from None
