"""Images with captions, without scores: WebDataset shards (tar files) and folders."""

import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from gcl_jax.errors import DataError
from gcl_jax.prepare.rows import Format, Row, Rows, is_a, json_object, table_files
from gcl_jax.prepare.source import BadRows, Reason, RowError
from gcl_jax.prepare.tables import Columns, Table, TablesSource
from gcl_jax.registry import SOURCES

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("caption", "text")
BLOCK = tarfile.BLOCKSIZE


@SOURCES.register("webdataset")
def webdataset_source(data: list[Path], bad_rows: BadRows) -> TablesSource:
    """The samples of WebDataset shards: KEY.jpg, .png or .webp and its caption, KEY.txt, or the
    key "caption" or "text" of KEY.json. A document's id is its KEY; a folder stands for its tars.

    Raises:
        DataError: no such file; or, with the strict policy, a bad sample.
    """
    return _captioned("webdataset", [file for path in data for file in _shards(path)], bad_rows)


@SOURCES.register("folder")
def folder_source(
    data: Path,
    bad_rows: BadRows,
    captions: Path | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
) -> TablesSource:
    """The images below the folder `data` and their captions: text files beside them (a.jpg and
    a.txt, ids without the ending), or a CSV, JSONL or parquet file `captions` with two columns: a
    path, which is the id too, and a caption.

    Raises:
        DataError: no such folder or file; or, with the strict policy, a bad image or caption.
    """
    if not data.is_dir():
        raise DataError(f"{data} is no folder")
    if captions is None:
        return _captioned("folder", [data], bad_rows, data)
    return TablesSource(
        [Table(file) for file in table_files(captions)],
        Columns({caption_column: "text"}, {image_column: "image"}, image_column, None),
        bad_rows,
        image_root=data,
        about={"source": "folder"},
    )


def _captioned(
    source: str, files: list[Path], bad_rows: BadRows, image_root: Path | None = None
) -> TablesSource:
    return TablesSource(
        [Table(file) for file in files],
        Columns({"caption": "text"}, {"image": "image"}, "id", None),
        bad_rows,
        image_root=image_root,
        formats={".tar": Format(_samples, _count_samples), "": Format(_images, _count_images)},
        about={"source": source},
    )


def _shards(path: Path) -> list[Path]:
    if path.is_file() and is_a(path, ".tar"):
        return [path]
    if found := sorted(path.glob("*.tar")):
        return found
    raise DataError(f"{path} is neither a tar file nor a folder of tar files")


def _count_images(directory: Path) -> int:
    return sum(1 for _ in _files(directory))


def _count_samples(path: Path) -> int:
    try:
        with tarfile.open(path) as tar:
            return len({_key_and_kind(member)[0] for member in tar if member.isfile()})
    except (tarfile.TarError, OSError):
        return 0


def _key_and_kind(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, slash, name = member.name.rpartition("/")
    key, _, kind = name.partition(".")
    return folder + slash + key, kind.lower()


def _samples(path: Path, columns: list[str]) -> Rows:
    number = 0
    try:
        with tarfile.open(path) as tar:
            members = (member for member in tar if member.isfile())
            for key, group in itertools.groupby(members, lambda member: _key_and_kind(member)[0]):
                number += 1
                files = [(_key_and_kind(member)[1], member) for member in group]
                yield number, _sample(key, [(k, _read(tar, m)) for k, m in files if _used(k)])
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("the end is missing")
    except (tarfile.TarError, EOFError) as error:
        yield number + 1, RowError(Reason.BROKEN_ARCHIVE, str(error))


def _used(kind: str) -> bool:
    return kind in IMAGES or kind in ("txt", "json")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _sample(key: str, files: list[tuple[str, bytes]]) -> Row | RowError:
    images = [data for kind, data in files if kind in IMAGES]
    if len(images) > 1 or len(files) - len(images) > len({*dict(files)} - {*IMAGES}):
        return RowError(Reason.BROKEN_ARCHIVE, f"{key!r} has several images or captions")
    texts = {kind: data for kind, data in files if kind not in IMAGES}
    caption = _caption(texts)
    if isinstance(caption, RowError):
        return caption
    return {"id": key, "image": images[0] if images else None, "caption": caption}


def _caption(texts: dict[str, bytes]) -> str | RowError | None:
    """The text, else what the JSON says."""
    data = texts.get("txt", texts.get("json"))
    if data is None:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError(Reason.NOT_UTF8, str(error))
    if "txt" in texts:
        return text.strip()
    row = json_object(text)
    if isinstance(row, RowError):
        return row
    caption = next((row[key] for key in CAPTION_KEYS if row.get(key)), None)
    if caption is None or isinstance(caption, str):
        return caption
    return RowError(Reason.WRONG_TYPE, f"the caption is {json.dumps(caption)[:100]}")


def _files(directory: Path) -> Iterator[Path]:
    """The images, and the text files without one, in the order of their names."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    images = [path for path in paths if path.suffix[1:].lower() in IMAGES]
    stems = {path.with_suffix("") for path in images}
    lone = [p for p in paths if p.suffix == ".txt" and p.with_suffix("") not in stems]
    yield from sorted([*images, *lone])


def _images(directory: Path, columns: list[str]) -> Rows:
    for number, path in enumerate(_files(directory), 1):
        if path.suffix == ".txt":
            yield number, RowError(Reason.MISSING_IMAGE, f"no image beside {path}")
            continue
        beside = path.with_suffix(".txt")
        caption = _caption({"txt": beside.read_bytes()} if beside.is_file() else {})
        if isinstance(caption, RowError):
            yield number, caption
        elif not caption:
            yield number, RowError(Reason.EMPTY_QUERY, f"{path} needs a caption in {beside.name}")
        else:
            name = path.relative_to(directory)
            key = name.with_suffix("").as_posix()
            yield number, {"id": key, "image": str(name), "caption": caption}
