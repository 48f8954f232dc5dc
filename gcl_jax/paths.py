"""The paths that arguments name: on this machine, or in a bucket.

What lies in a bucket has copies here, below $GCL_JAX_CACHE/buckets (default ~/.cache/gcl_jax), that
`local_path` brings in step with it, so that everything is read, and memory-mapped, as a file;
`replacing`, and `publish` of `prepare.stores`, send what they finish. All else knows paths of this
machine only, but for checkpoints, of which every process writes a part: at `remote`.
"""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
import tqdm

from gcl_jax import errors
from gcl_jax.errors import ConfigError, DataError, StorageError, UserError

if TYPE_CHECKING:
    from etils import epath
    from fsspec import AbstractFileSystem

PathType = TypeVar("PathType", bound=PurePath)
# {scheme: (the package that speaks it, the extra that installs it)}.
SCHEMES = {"gs": ("gcsfs", "gcp"), "s3": ("s3fs", "s3")}
CHECKSUMS = "checksums.sha256"  # as `sha256sum --check` reads it
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # one letter before the colon is a drive
_OF_RUNS = ("checkpoints/", "embeddings/")  # no copies are made of them
UNFINISHED = ".incomplete"  # ends names
_AT_A_TIME = 16  # objects on their way
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What folders on buckets, mounted, say of the renaming of a folder; gcsfuse says EMFILE.
NO_RENAMES = {errno.EMFILE, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EPERM}


def cache_folder() -> Path:
    """$GCL_JAX_CACHE, where copies and prepared stores are kept."""
    return Path(os.environ.get("GCL_JAX_CACHE", "~/.cache/gcl_jax")).expanduser().absolute()


def local_path(text: str | os.PathLike) -> Path:
    """The path on this machine of what an argument names: `~` is the home directory, and what lies
    in a bucket is fetched, but for what is here already, and for the checkpoints of a run.

    Raises:
        UserError: it is empty, an address of another kind, or the bucket cannot be read.
        ConfigError: the package that reads such buckets is not installed.
    """
    path = path_of(text)
    if _ADDRESS.match(os.fspath(text)):  # its copies are asked for once, where it is named
        fetch(path)
    return path


def output_path(text: str | os.PathLike) -> Path:
    """The `local_path` of what is to be made.

    Raises:
        UserError: a file where a folder is needed, or no permission to write there.
    """
    path = path_of(text)
    if place := address(path):
        if _ADDRESS.match(os.fspath(text)):
            _require_writable(place)
            fetch(path)
        return path
    try:
        there = next(x for x in (path, *path.absolute().parents) if x.exists())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if there != path and not there.is_dir():
        raise UserError(f"{path} cannot be made: {there} is a file")
    # A folder that is there may be what is asked for, finished.
    if not path.is_dir() and not os.access(there, os.W_OK):
        raise UserError(f"{path} cannot be made: no permission to write to {there}")
    return path


def address(path: Path) -> str:
    """Where in a bucket the file or folder `path` of this machine belongs, such as "gs://b/run";
    empty if it does not."""
    with contextlib.suppress(ValueError):
        scheme, *parts = Path(os.path.abspath(path)).relative_to(_buckets()).parts
        return f"{scheme}://{'/'.join(parts)}"
    return ""


def remote(path: Path) -> "epath.Path":
    """`path` itself, or its `address`, with the methods of a `pathlib.Path`: for checkpoints, of
    which orbax keeps none in other buckets than Google's; that is a `ConfigError`."""
    from etils import epath

    if place := address(path):
        if not place.startswith("gs://"):
            raise ConfigError(f"{place}: of buckets gs:// alone can hold a run; mount this one")
        filesystem(place)  # with what it is told before anybody asks for it
    return epath.Path(place or path.absolute())


def filesystem(place: str) -> "AbstractFileSystem":
    """fsspec's, for an `address`. Raises `ConfigError` without the package that it needs."""
    scheme = place.partition(":")[0]
    package, extra = SCHEMES[scheme]
    # It would ask Google's servers of which kind the bucket is, each time, and warn.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # Other processes write there, too; what arrives is compared with what was sent.
    told = {"use_listings_cache": False} | ({"consistency": "md5"} if scheme == "gs" else {})
    fsspec.config.conf[scheme] = told | fsspec.config.conf.get(scheme, {})
    for name in ("gcsfs", "google.auth"):  # which print tracebacks of what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        needed = f"the package {package}: {errors.to_install(extra)}"
        raise ConfigError(f"{scheme}:// needs {needed}") from None


@contextlib.contextmanager
def talking(place: str) -> Iterator[None]:
    """Errors of libraries that speak with the bucket of `place`, if any, become one line."""
    try:
        yield
    except Exception as error:
        if not place or isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and error.errno in _FULL:
            full = f"{place}: {cache_folder()} is full; set GCL_JAX_CACHE to a larger disk"
            raise UserError(full) from None
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{place}: there is no such bucket, or you may not see it") from None
        # Of Google, Amazon, and their HTTP clients: no common class.
        said = f"{type(error).__name__}: {errors.first_line(error)}"
        if re.search("permission|forbidden|credentials|, 401$", said.lower()):
            raise UserError(f"{place}: {said}; log in there, or ask for access") from None
        raise StorageError(f"{place}: {said}") from None


def _buckets() -> Path:
    folder = cache_folder() / "buckets"
    errors.SPELLED.update({f"{folder / scheme}/": f"{scheme}://" for scheme in SCHEMES})
    return folder


def path_of(text: str | os.PathLike) -> Path:
    """The path on this machine of what an argument names, as it is here now: nothing is fetched."""
    name = os.fspath(text)
    if not name or "\0" in name:
        raise UserError(f"{name!r} is no path: it is empty, or has a null byte")
    if (found := _ADDRESS.match(name)) is None:
        try:
            return Path(name).expanduser()
        except RuntimeError as error:  # ~nobody
            raise UserError(f"{name}: {error}") from None
    if (scheme := found[1]) not in SCHEMES:
        raise UserError(
            f"{name}: addresses of this kind ({scheme}://) are not read or written; give a path "
            f"on this machine, or one of {', '.join(f'{known}://' for known in SCHEMES)}"
        )
    parts = name.removeprefix(f"{scheme}:/").strip("/").split("/")
    if not name.startswith(f"{scheme}://") or not all(parts) or {".", ".."} & set(parts):
        raise UserError(f"{name} is no address; write {scheme}://BUCKET/PATH")
    filesystem(name)
    return _buckets().joinpath(scheme, *parts)


def listing(place: str) -> dict[str, dict[str, Any]]:
    """{name below `place`, empty for the object itself: what the bucket says of it}."""
    bucket = filesystem(place)
    root = place.partition("://")[2]
    listed = {}
    with talking(place):
        found = bucket.find(root, detail=True)
    for about in found.values():
        above, ours, name = f"{about['name']}/".partition(f"{root}/")
        if above or not ours or about["type"] != "file" or name.endswith("//"):  # "a/": a folder
            continue
        if name and {"", ".", ".."} & set(name[:-1].split("/")):
            raise DataError(f"{place}/{name}: no file can have such a name; rename the object")
        listed[name[:-1]] = about
    return listed


def _version(about: dict[str, Any]) -> int:
    """Another one for another content: when it was written, in ns, and below the second what the
    bucket calls this state of it. A copy has it as its time of change."""
    written = about.get("mtime") or about.get("LastModified")
    name = str(about.get("generation") or about.get("ETag") or written)
    digits = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) % 10**9
    return (int(written.timestamp()) if written else 0) * 10**9 + digits


def mark_copy(copy: Path, about: dict[str, Any]) -> None:
    """Marks a copy: nobody writes to it, and its time is its version."""
    copy.chmod(0o444)
    os.utime(copy, ns=(_version(about), _version(about)))


def _is_copy(path: Path, about: dict[str, Any] | None = None) -> bool:
    """Whether `path` came from a bucket, and is as `about` says."""
    if not path.is_file():
        return False
    found = path.stat()
    same = about is None or (found.st_size, found.st_mtime_ns) == (about["size"], _version(about))
    return same and not found.st_mode & 0o222


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[Path]:
    """An empty folder, for the one process of this machine that brings `path` in step."""
    folder = cache_folder() / "copying" / hashlib.sha256(bytes(path)).hexdigest()[:24]
    lock = filelock.FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"waiting for another process, which copies {errors.spelled(path)}", file=sys.stderr)
        held = lock.acquire()
    except OSError as error:
        said = f"{cache_folder()} cannot be written ({error.strerror or error})"
        raise UserError(f"{said}; set GCL_JAX_CACHE to a folder that can be") from None
    with held:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def fetch(path: Path) -> None:
    """Brings the copies at `path`, if it belongs into a bucket, in step with it: what is new or
    another there is fetched and verified, copies of what is gone are removed. Of what is half
    published nothing is fetched, and of a run no checkpoints and embeddings.

    Raises:
        UserError: the bucket cannot be read, or there is no space left here.
        DataError: a file is damaged, or missing by the checksums of its folder.
    """
    if not (place := address(path)):
        return
    bucket = filesystem(place)
    with alone_at(path) as folder:
        there = listing(place)
        left_out = _OF_RUNS if "config.json" in there else ()
        names = {PurePath(name): name for name in there}
        twins = [x for x in names if x.name.endswith(UNFINISHED) and last_of(x) not in names]
        there = {
            name: there[name]
            for path, name in names.items()
            if not name.startswith(left_out)
            and (path in twins or not any(path.is_relative_to(twin.parent) for twin in twins))
        }
        for old in [*sorted(path.rglob("*"), reverse=True), path]:
            name = "" if old == path else old.relative_to(path).as_posix()
            if _is_copy(old) and name not in there and not name.startswith(left_out):
                old.unlink()
            elif old.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    old.rmdir()
        wanted = {n: x["size"] for n, x in there.items() if not _is_copy(path / n, x)}
        if not wanted:
            return
        if (total := sum(wanted.values())) > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"{place}: {total / 1e9:.1f} GB do not fit into {cache_folder()}, where "
                f"{free / 1e9:.1f} are free; set GCL_JAX_CACHE to a larger disk"
            )
        with talking(place):
            sums = _checksums(place, there)
        numbers = {name: str(number) for number, name in enumerate(wanted)}

        def one(name: str) -> None:
            copy = folder / numbers[name]
            bucket.get_file(there[name]["name"], str(copy))
            for kind, digest in (("md5", md5_of(there[name])), ("sha256", sums.get(name))):
                if digest and digest_of(copy, kind) != digest:
                    raise DataError(
                        f"{address(path / name)} is damaged: its {kind} is another; copy it there "
                        "again, or remove the folder and prepare it again"
                    )
            mark_copy(copy, there[name])
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            copy.replace(path / name)

        transfer(place, "fetch", wanted, one)


def _checksums(place: str, there: dict[str, dict[str, Any]]) -> dict[str, str]:
    """{name: SHA-256}, of a folder that says so itself, as stores do."""
    if CHECKSUMS not in there:
        return {}
    text = filesystem(place).cat_file(there[CHECKSUMS]["name"]).decode("utf-8")
    sums = {name: digest for digest, _, name in (x.partition("  ") for x in text.splitlines())}
    if missing := sorted(sums.keys() - there.keys()):
        raise DataError(
            f"{place}/{missing[0]} is missing, says {CHECKSUMS}; copy it there again, or remove "
            "the folder and prepare it again"
        )
    return sums


def md5_of(about: dict[str, Any]) -> str:
    """In hexadecimal digits; empty if the bucket does not tell."""
    return base64.b64decode(about.get("md5Hash") or "").hex()


def digest_of(path: Path, kind: str = "sha256") -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def transfer(place: str, what: str, sizes: Mapping[str, int], move: Callable[[str], None]) -> None:
    """Calls `move(name)` for all {name: size}, some at a time, below a bar."""
    often = 0.2 if sys.stderr.isatty() else 10
    shown = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "delay": 1}
    bar: Any = tqdm.tqdm(total=sum(sizes.values()), desc=what, mininterval=often, **shown)
    pool = concurrent.futures.ThreadPoolExecutor(_AT_A_TIME)
    with talking(place), bar:
        try:
            tasks = {pool.submit(move, name): size for name, size in sizes.items()}
            for task in concurrent.futures.as_completed(tasks):
                task.result()
                bar.update(tasks[task])
        finally:
            pool.shutdown(cancel_futures=True)


def _require_writable(place: str) -> None:
    """Raises `UserError` unless objects below `place` can be made: at once, not after the work."""
    if "/" not in place.partition("://")[2]:
        raise UserError(f"{place} is a whole bucket; name a folder in it, such as {place}/new")
    probe = f"{place}.{uuid.uuid4().hex}.writable"
    with talking(place):
        filesystem(place).pipe_file(probe, b"")
    with contextlib.suppress(Exception):  # to write does not mean to delete
        filesystem(place).rm_file(probe)


def building(path: Path) -> Path:
    """Where what becomes `path` is made, in a folder that is there: beside it; of what belongs into
    a bucket apart from the copies."""
    path = Path(os.path.abspath(path))  # it may be "."
    if address(path):
        path = cache_folder() / "unfinished" / path.relative_to(_buckets())
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}{UNFINISHED}")


def remove_unfinished(path: Path) -> None:
    """Removes what is at `building(path)`, once `path` is complete: the call that made it may have
    been killed before it could."""
    shutil.rmtree(building(path), ignore_errors=True)  # others may be at it, too


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that becomes `path` at the end: that is complete, or as it was, and so
    is what its bucket has."""
    unfinished = building(path)
    with errors.naming(unfinished if address(path) else path):
        yield unfinished
    if place := address(path):
        with talking(place):
            filesystem(place).put_file(str(unfinished), place)
            mark_copy(unfinished, filesystem(place).info(place))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.replace(path)


def twin_of(last: PurePath) -> PurePath:
    """The file that is beside the `last` one while `publish` fills a folder."""
    return last.with_name(f".{last.name}{UNFINISHED}")


def last_of(twin: PathType) -> PathType:
    return twin.with_name(twin.name[1:].removesuffix(UNFINISHED))


def write_json(path: Path, value: Any) -> None:
    """Writes `value`, and makes the folder; the file is complete or as it was."""
    with replacing(path) as unfinished:
        unfinished.write_text(errors.spelled(json.dumps(value, indent=2)) + "\n", "utf-8")
