"""Images with captions, without scores: WebDataset shards (tar files) and folders."""

import collections
import functools
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from gcl_jax.data import transforms
from gcl_jax.data.store import is_hidden, visible_files
from gcl_jax.data.transforms import IMAGE_ENDINGS
from gcl_jax.errors import DataError
from gcl_jax.prepare.rows import Format, Row, Rows, Table, is_a, json_object, table_files
from gcl_jax.prepare.source import BadRows, Columns, Reason, RowError
from gcl_jax.prepare.tables import TablesSource
from gcl_jax.registry import SOURCES

CAPTION_KEYS = ("caption", "text")
HIDDEN = "hidden files"
BLOCK = tarfile.BLOCKSIZE


@SOURCES.register("webdataset")
def webdataset_source(data: list[Path], bad_rows: BadRows) -> TablesSource:
    """The samples of WebDataset shards: KEY.jpg, .png or another image and its caption, KEY.txt, or
    the key "caption" or "text" of KEY.json. A document's id is its KEY; a folder stands for its
    tars.

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
    about: dict[str, object] = {"source": source}
    return TablesSource(
        [Table(file) for file in files],
        Columns({"caption": "text"}, {"image": "image"}, "id", None),
        bad_rows,
        image_root=image_root,
        formats={
            ".tar": Format(_samples, functools.partial(_count_samples, about)),
            "": Format(_images, functools.partial(_count_images, about)),
        },
        about=about,
    )


def _shards(path: Path) -> list[Path]:
    if path.is_file() and is_a(path, ".tar"):
        return [path]
    shards = [file for file in path.glob("*") if is_a(file, ".tar") and not is_hidden(file.name)]
    if shards:
        return sorted(shards)
    raise DataError(f"{path} is neither a tar file nor a folder of tar files")


def _count_images(about: dict, directory: Path) -> int:
    files = visible_files(directory)
    about[HIDDEN] = sum(path.is_file() for path in directory.rglob("*")) - len(files)
    return sum(1 for _ in _files(directory))


def _count_samples(about: dict, path: Path) -> int:
    try:
        with tarfile.open(path) as tar:
            members = [member.name for member in tar if member.isfile()]
    except (tarfile.TarError, OSError):
        return 0
    shown = [name for name in members if not is_hidden(name)]
    about[HIDDEN] = about.get(HIDDEN, 0) + len(members) - len(shown)
    return len({_key_and_kind(name)[0] for name in shown})


def _key_and_kind(name: str) -> tuple[str, str]:
    """WebDataset's: the name is cut at the first dot behind the last slash."""
    folder, slash, name = name.rpartition("/")
    key, _, kind = name.partition(".")
    return folder + slash + key, kind.lower()


def _samples(path: Path, columns: list[str]) -> Rows:
    done, broken = 0, ""
    try:
        with tarfile.open(path) as tar:
            members, broken = _members(tar, path)
            groups = itertools.groupby(members, lambda member: _key_and_kind(member.name)[0])
            samples = [(key, list(group)) for key, group in groups]
            places = collections.Counter(key for key, _ in samples)
            for key, group in samples:
                row = _sample(tar, key, group, apart=places[key] > 1)
                if broken and isinstance(row, RowError) and group[-1] is members[-1]:
                    break  # what it lacks was cut off
                done += 1
                yield done, row
    except (tarfile.TarError, EOFError) as error:
        broken = broken or str(error)
    if broken:
        yield done + 1, RowError(Reason.BROKEN_ARCHIVE, broken)


def _members(tar: tarfile.TarFile, path: Path) -> tuple[list[tarfile.TarInfo], str]:
    """The files that are not hidden, and what is wrong behind them."""
    members = []
    try:
        for member in tar:
            if member.isfile() and not is_hidden(member.name):
                members.append(member)
    except tarfile.TarError as error:
        return members, str(error)
    with path.open("rb") as file:
        file.seek(tar.offset)
        return members, "" if file.read(BLOCK) == bytes(BLOCK) else "the end is missing"


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _sample(
    tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], apart: bool
) -> Row | RowError:
    kinds = [_key_and_kind(member.name)[1] for member in members]
    images = [m for m, kind in zip(members, kinds, strict=True) if kind in IMAGE_ENDINGS]
    texts = {k: m for m, k in zip(members, kinds, strict=True) if k in ("txt", "json")}
    if len(images) > 1 or sum(kind in ("txt", "json") for kind in kinds) > len(texts):
        return RowError(Reason.BROKEN_ARCHIVE, f"{key!r} has several images or captions")
    if not images or not texts:
        detail = f"{key!r} has no " + (".txt or .json" if images else "image")
        if apart:
            return RowError(Reason.APART, f"{detail} here, and comes again")
        known = (*IMAGE_ENDINGS, "txt", "json")
        if unread := [m.name for m, kind in zip(members, kinds, strict=True) if kind not in known]:
            detail += f"; not read: {', '.join(unread[:5])}, since what follows the first dot is "
            detail += f"none of {', '.join(known)}"
        return RowError(Reason.EMPTY_QUERY if images else Reason.EMPTY_DOCUMENT, detail)
    if large := [m for m in (*images, *texts.values()) if m.size > transforms.MAX_BYTES]:
        # A sparse member asks for any size in a few bytes.
        return RowError(Reason.TOO_LARGE, f"{large[0].name} has {large[0].size} bytes")
    if not images[0].size:
        return RowError(Reason.EMPTY_DOCUMENT, f"{images[0].name} is empty")
    caption = _caption({kind: _read(tar, member) for kind, member in texts.items()}, key)
    if isinstance(caption, RowError):
        return caption
    if not caption:
        return RowError(Reason.EMPTY_QUERY, f"{key!r} has no words in its caption")
    return {"id": key, "image": _read(tar, images[0]), "caption": caption}


def _caption(texts: dict[str, bytes], name: object) -> str | RowError | None:
    """The text, else what the JSON says."""
    data = texts.get("txt", texts.get("json"))
    if data is None:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError(Reason.NOT_UTF8, f"the caption of {str(name)!r}: {error}")
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
    paths = visible_files(directory)
    images = [path for path in paths if path.suffix[1:].lower() in IMAGE_ENDINGS]
    stems = {path.with_suffix("") for path in images}
    lone = [p for p in paths if p.suffix == ".txt" and p.with_suffix("") not in stems]
    yield from sorted([*images, *lone])


def _images(directory: Path, columns: list[str]) -> Rows:
    for number, path in enumerate(_files(directory), 1):
        if path.suffix == ".txt":
            yield number, RowError(Reason.MISSING_IMAGE, f"no image beside {path}")
            continue
        beside = path.with_suffix(".txt")
        caption = _caption({"txt": beside.read_bytes()} if beside.is_file() else {}, path)
        if isinstance(caption, RowError):
            yield number, caption
        elif not caption:
            yield number, RowError(Reason.EMPTY_QUERY, f"{path} needs a caption in {beside.name}")
        else:
            name = path.relative_to(directory)
            key = name.with_suffix("").as_posix()
            yield number, {"id": key, "image": str(name), "caption": caption}
