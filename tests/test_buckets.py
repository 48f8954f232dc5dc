"""What lies in a bucket, tried on a server: copies that are in step, folders complete or absent."""

import contextlib
import errno
import functools
import io
import os
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import TinySource
from PIL import Image
from test_search import untrained_run

import gcl_jax
from gcl_jax import config, paths
from gcl_jax.data import __main__ as data
from gcl_jax.data.store import RankedStore, visible_files
from gcl_jax.embed import __main__ as embed
from gcl_jax.errors import UserError, in_one_line
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.mine import __main__ as mine
from gcl_jax.paths import building, fetch, listing, output_path
from gcl_jax.port import __main__ as port
from gcl_jax.port.pretrained import model_config
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import stores
from gcl_jax.prepare.stores import finished_store, publish, vacant, write_store
from gcl_jax.validation import validate


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


def is_over(monkeypatch, number, call, *arguments, **more):
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
            call(*arguments, **more)
        except KeyboardInterrupt:
            return False
    return True


def refuse_renames(monkeypatch):
    """Of folders, as gcsfuse does."""
    rename = os.rename

    def refuse(old, new):
        if os.path.isdir(old):
            raise OSError(errno.EMFILE, "Too many open files")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)


def counting(calls, real):
    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    return counted


@pytest.mark.parametrize("kind", ["bucket", "mount"])
@pytest.mark.parametrize("before", [{}, OTHERS])
def test_a_folder_is_complete_or_absent_wherever_a_call_is_cut(
    bucket, tmp_path, monkeypatch, kind, before
):
    """A call that is cut anywhere leaves nothing that a reader takes for whole; the next one is
    done, and all that it leaves is what was to be published."""
    for number in range(100):
        out = output_path(f"{bucket}/{number}" if kind == "bucket" else tmp_path / f"{number}")
        if kind == "mount":
            refuse_renames(monkeypatch)
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


def of_bucket(address):
    """{name: content} below an address, as the server tells."""
    known = paths.filesystem(address)
    return {name: known.cat_file(f"{address}/{name}") for name in listing(address)}


@pytest.fixture
def run(monkeypatch, capsys):
    def run(module, *arguments):
        """What the command prints."""
        monkeypatch.setattr(sys, "argv", ["it", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            module.main()
        told = capsys.readouterr()
        return told.out or told.err

    return run


TABLE = "query,id,title,score\n" + "".join(
    f"find {i % 4},d{i},thing {i},{1 + i % 9}\n" for i in range(24)
)
FIELDS = ("--query_fields=query", "--document_fields=title")
PORTED = "--format=safetensors"
COLUMNS = (*FIELDS, "--id_column=id", "--score_column=score")


def test_the_commands_give_the_same_in_a_bucket_as_here(bucket, tmp_path, run):
    """What they print, and the bytes of all files, but for the places that these name."""
    here = tmp_path / "here"
    here.mkdir()
    inputs = {"pairs.csv": TABLE, "qrels": "q 0 d 1\n", "found": "q Q0 d 1 2.5 t\n"}
    for name, text in inputs.items():
        (here / name).write_text(text)
        paths.filesystem(bucket).pipe_file(f"{bucket}/{name}", text.encode())
    workdir = untrained_run(TinySource(), tmp_path / "run")
    printed = [
        [
            run(prepare, f"--pairs={place}/pairs.csv", *COLUMNS, f"--out={place}/store"),
            run(data, "inspect", f"{place}/store", f"--html={place}/look.html"),
            run(data, "verify", f"{place}/store"),
            run(embed, f"--workdir={workdir}", f"--out={place}/vectors", "--export=parquet"),
            run(mine, f"--workdir={workdir}", f"--out={place}/mined", "--relative_margin=0"),
            run(port, "export", f"--workdir={workdir}", f"--out={place}/model", PORTED),
            run(evaluate, f"--qrels={place}/qrels", f"--run={place}/found", f"--out={place}/eval"),
        ]
        for place in (here, bucket)
    ]
    alike = [re.sub(r"\d+ bytes", "", "".join(lines)) for lines in printed]
    alike[0] = alike[0].replace(str(here), bucket)
    assert alike[0] == alike[1]
    assert "error" not in alike[0]
    ours, theirs = contents(here), of_bucket(bucket)
    assert ours.keys() == theirs.keys()
    depend_on_the_place = {"store/store.json", "store/checksums.sha256"}
    for name in ours.keys() - depend_on_the_place:
        assert ours[name].replace(bytes(here), bucket.encode()) == theirs[name], name
    assert model_config(f"{bucket}/model") == model_config(str(here / "model"))
    assert bytes(tmp_path / "cache") not in b"".join(theirs.values())


def test_python_takes_addresses_and_its_errors_name_them(bucket, tmp_path, run, monkeypatch):
    workdir = untrained_run(TinySource(), tmp_path / "run")
    for form in ("run", "open_clip"):
        run(port, "export", f"--workdir={workdir}", f"--format={form}", f"--out={bucket}/{form}")
    picture = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(picture, "PNG")
    paths.filesystem(bucket).pipe_file(f"{bucket}/red.png", picture.getvalue())
    here, there = gcl_jax.load(workdir), gcl_jax.load(f"{bucket}/run")
    np.testing.assert_array_equal(
        here.encode([{"image": picture.getvalue(), "title": "red"}]),
        there.encode([{"image": f"{bucket}/red.png", "title": "red"}]),
    )
    assert gcl_jax.preset(f"{bucket}/open_clip/open_clip_config.json").embed_dim == here.embed_dim
    for call in (gcl_jax.load, gcl_jax.from_pretrained, gcl_jax.open_store, gcl_jax.preset):
        with pytest.raises(UserError, match=f"{bucket}/no.json"):
            call(f"{bucket}/no.json")
    (tmp_path / "file").touch()
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / "file/cache"))
    for workdir in (f"{bucket}/run", f"{bucket}/new"):
        told = run(embed, f"--workdir={workdir}", f"--out={bucket}/vectors")
        assert "file/cache cannot be written (Not a directory); set GCL_JAX_CACHE to" in told


def said(call, *arguments):
    with pytest.raises((UserError, OSError)) as error:
        call(*arguments)
    return in_one_line(error.value)


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_what_is_wrong_with_a_store_in_a_bucket_is_told_at_once(kind, request, full_disk):
    """And what was fetched before is not taken for more than it is."""
    bucket = request.getfixturevalue(kind)
    place, known = f"{bucket}/store", paths.filesystem(bucket)
    store = write_store(TinySource(), place)
    assert store.directory == paths.local_path(place) == RankedStore(place).directory
    pairs = f"{place}/pairs/zero_shot/score.npy"
    content = known.cat_file(pairs)
    shutil.rmtree(store.directory)
    with full_disk():
        assert "set GCL_JAX_CACHE to a larger disk" in said(RankedStore, place)
    known.pipe_file(pairs, content[:-1] + b"x")
    assert said(RankedStore, place).startswith(f"{pairs} is damaged: its sha256 is another")
    known.rm_file(pairs)
    assert said(RankedStore, place).startswith(f"{pairs} cannot be read")
    shutil.rmtree(store.directory)
    assert said(RankedStore, place).startswith(f"{pairs} is missing, says checksums.sha256")
    known.pipe_file(pairs, content)
    assert RankedStore(place).pairs("zero_shot").score.any()
    nowhere = f"{bucket.partition(':')[0]}://no/such"
    assert f"{nowhere}: there is no such bucket" in said(RankedStore, nowhere)
    assert f"{bucket}/no holds no store" in said(RankedStore, f"{bucket}/no")
    cfg = config.TrainConfig(data=config.DataConfig(store=place))
    shutil.rmtree(store.directory)
    validate(cfg)
    assert not store.directory.exists(), "it looks at the form of paths, and fetches nothing"


@pytest.mark.parametrize("kind", ["bucket", "mount"])
def test_preparing_that_is_cut_while_it_publishes_is_finished_by_the_same_call(
    bucket, tmp_path, monkeypatch, kind
):
    if kind == "mount":
        refuse_renames(monkeypatch)
    out = paths.output_path(f"{bucket}/s" if kind == "bucket" else tmp_path / "s")
    prepared, calls = functools.partial(write_store, fingerprint="same"), []
    monkeypatch.setattr(TinySource, "splits", counting(calls, TinySource.splits))

    def cut(*arguments, **more):
        assert not is_over(monkeypatch, 9, publish, *arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(stores, "publish", cut)
    with pytest.raises(KeyboardInterrupt):
        prepared(TinySource(), out)
    monkeypatch.setattr(stores, "publish", publish)
    assert not (out / "store.json").exists()
    if kind == "bucket":
        assert "store.json" not in of_bucket(f"{bucket}/s")
    paths.fetch(out)
    assert finished_store(out, "same") is None
    prepared(TinySource(), out)
    assert len(calls) == 1, "nothing is read again"
    there = contents(prepared(TinySource(), out).directory)
    assert len(calls) == 1
    assert there == contents(prepared(TinySource(), tmp_path / "other").directory)
