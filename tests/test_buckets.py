"""What lies in a bucket, tried on a server: copies that are in step, folders complete or absent."""

import functools
import os

import pytest

from gcl_jax import paths
from gcl_jax.data.store import visible_files
from gcl_jax.paths import building, fetch, output_path
from gcl_jax.prepare.stores import publish, vacant


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in visible_files(folder)
    }


def make(out, files):
    made = building(out)
    for name, content in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


FILES = {"a/b/c.npy": b"1" * 1000, "empty": b"", "last.json": b"{}"}
OTHERS = {"a/b/c.npy": b"2" * 1000, "d": b"d", "last.json": b"[]"}


def is_over(monkeypatch, number, call, *arguments):
    """Whether `call` was over before file or object `number` was written or removed; else it ends
    there, as if it had been killed."""
    left = iter(range(number))

    def counted(real, *args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    bucket = paths.filesystem("gs://")
    with monkeypatch.context() as patch:
        for where, name in (
            (bucket, "put_file"),
            (bucket, "rm_file"),
            (os, "replace"),
            (os, "unlink"),
        ):
            real = getattr(where, name)
            patch.setattr(where, name, functools.partial(counted, real))
        try:
            call(*arguments)
        except KeyboardInterrupt:
            return False
    return True


@pytest.mark.parametrize("kind", ["bucket", "mount"])
@pytest.mark.parametrize("before", [{}, OTHERS])
def test_a_folder_is_complete_or_absent_wherever_a_call_is_cut(
    bucket, tmp_path, monkeypatch, kind, before
):
    """A call that is cut anywhere leaves nothing that a reader takes for whole; the next one is
    done, and all that it leaves is what was to be published."""
    refuse = os.rename

    def rename(old, new):
        if os.path.isdir(old):
            raise OSError(24, "Too many open files")
        refuse(old, new)

    for number in range(100):
        out = output_path(f"{bucket}/{number}" if kind == "bucket" else tmp_path / f"{number}")
        if kind == "mount":
            monkeypatch.setattr(os, "rename", rename)
        if before:
            publish(make(out, before), out, "last.json")
        made = make(out, FILES)
        done = is_over(monkeypatch, number, publish, made, out, "last.json")
        fetch(out)
        assert not (out / "last.json").exists() or contents(out) in (before, FILES)
        if not done:
            assert before or vacant(out) or (out / "last.json").exists()
            publish(make(out, FILES), out, "last.json")
        fetch(out)
        assert contents(out) == FILES
        if done:
            break
    assert number > len(FILES)
