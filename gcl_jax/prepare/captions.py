"""Images with captions, without scores: WebDataset shards (tar files) and folders."""

import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gcl_jax.errors import DataError
from gcl_jax.prepare.bad_rows import BadRows, Reason, RowError
from gcl_jax.prepare.columns import Columns, Table
from gcl_jax.prepare.json_rows import json_object
from gcl_jax.prepare.rows import Reader, Row, Rows, checked
from gcl_jax.prepare.tables import TablesSource

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("caption", "text")
BLOCK = tarfile.BLOCKSIZE


def webdataset_source(shards: Sequence[Path], bad_rows: BadRows) -> TablesSource:
    """The samples of WebDataset shards: KEY.jpg, .png or .webp and its caption, KEY.txt, or the
    key "caption" or "text" of KEY.json. A document's id is its KEY; a folder stands for its tars.

    Raises:
        DataError: no such file; or, with the strict policy, a bad sample.
    """
    files = [file for path in shards for file in _shards(path)]
    return _source("webdataset", [Table(file) for file in files], bad_rows)


def folder_source(
    directory: Path,
    bad_rows: BadRows,
    captions: Path | None = None,
    columns: tuple[str, str] = ("image", "caption"),
) -> TablesSource:
    """The images below `directory` and their captions: text files beside them (a.jpg and a.txt,
    ids without the ending), or a CSV, JSONL or parquet file `captions` with these `columns`: a
    path, which is the id too, and a caption.

    Raises:
        DataError: no such folder or file; or, with the strict policy, a bad image or caption.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is no folder")
    if captions is None:
        return _source("folder", [Table(directory)], bad_rows, directory)
    image, caption = columns
    return TablesSource(
        "folder",
        [Table(captions)],
        Columns({caption: "text"}, {image: "image"}, image, None),
        bad_rows,
        image_root=directory,
        about={"source": "folder"},
    )


def _source(
    name: str, tables: list[Table], bad_rows: BadRows, image_root: Path | None = None
) -> TablesSource:
    columns = Columns({"caption": "text"}, {"image": "image"}, "id", None)
    reader = Reader(_rows, _count)
    about: dict[str, object] = {"source": name}
    return TablesSource(
        name, tables, columns, bad_rows, image_root=image_root, reader=reader, about=about
    )


def _shards(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".tar":
        return [path]
    if found := sorted(path.glob("*.tar")):
        return found
    raise DataError(f"{path} is neither a tar file nor a folder of tar files")


def _rows(path: Path, columns: Sequence[str]) -> Rows:
    for number, row in _samples(path) if path.suffix == ".tar" else _images(path):
        if isinstance(row, RowError):
            yield number, row
        else:
            yield number, checked({column: row[column] for column in columns})


def _count(path: Path) -> int:
    if path.suffix != ".tar":
        return sum(1 for _ in _files(path))
    try:
        with tarfile.open(path) as tar:
            return len({_key_and_kind(member)[0] for member in tar if member.isfile()})
    except (tarfile.TarError, OSError):
        return 0


def _key_and_kind(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, slash, name = member.name.rpartition("/")
    key, _, kind = name.partition(".")
    return folder + slash + key, kind.lower()


def _samples(path: Path) -> Rows:
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


def _images(directory: Path) -> Rows:
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
