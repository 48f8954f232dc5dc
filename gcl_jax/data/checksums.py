"""The checksum manifest of a store: `checksums.sha256`, which `sha256sum --check` reads too."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from gcl_jax.errors import DataError

MANIFEST = "checksums.sha256"


def sha256(path: Path) -> str:
    """The file's checksum in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(directory: Path) -> list[Path]:
    """Every file below `directory` but the manifest, sorted."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if path != directory / MANIFEST)


def write_manifest(directory: Path, progress: Callable[[int], object]) -> None:
    """Writes the manifest; `progress` is told the bytes of every file that is done."""
    lines = []
    for path in files(directory):
        lines.append(f"{sha256(path)}  {path.relative_to(directory).as_posix()}\n")
        progress(path.stat().st_size)
    (directory / MANIFEST).write_text("".join(lines), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, str]:
    """{path below `directory`: checksum}.

    Raises:
        DataError: there is no manifest, or it is damaged itself.
    """
    manifest = directory / MANIFEST
    try:
        lines = [line.split("  ", 1) for line in manifest.read_text("utf-8").splitlines()]
        return {name: digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise DataError(f"{manifest} cannot be read ({error}); prepare the store again") from None


def damaged_files(directory: Path, progress: Callable[[int], object]) -> list[str]:
    """One line "PATH: what is wrong" for every file that is not as the manifest says.

    Raises:
        DataError: there is no manifest, or it is damaged itself.
    """
    expected = read_manifest(directory)
    present = {path.relative_to(directory).as_posix(): path for path in files(directory)}
    wrong = []
    for name, digest in expected.items():
        if name not in present:
            wrong.append(f"{name}: missing")
            continue
        try:
            if sha256(present[name]) != digest:
                wrong.append(f"{name}: content has changed")
            progress(present[name].stat().st_size)
        except OSError as error:
            wrong.append(f"{name}: cannot be read: {error.strerror}")
    return wrong + [f"{name}: not in the manifest" for name in present if name not in expected]
