"""WebDataset shards with odd members or damaged bytes: a sample is kept or named as skipped."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from fuzz.fuzzing import CELLS, damaged, run
from gcl_jax.data.store import RankedStore

KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
NAMES = ("{}.png", "{}.txt", "{}", "{}.a.txt", "./{}.txt", "._{}.png", "../{}.png", "/{}.txt")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def prepared(path, out) -> tuple[dict[str, str], list[dict], str]:
    """({id: caption} of what is kept, the skips, the error)."""
    outcome = run(
        "prepare", "--source=webdataset", f"--data={path}", f"--out={out}", "--on_error=skip"
    )
    if outcome.error:
        return {}, [], outcome.error
    store, skips = RankedStore(out), out / "skipped.jsonl"
    pairs, queries, ids = store.pairs("train"), list(store.queries), store.documents.ids
    captions = [queries[q]["caption"] for q in pairs.query]
    kept = dict(zip([ids[d] for d in pairs.document], captions, strict=True))
    assert len(kept) == len(pairs)
    lines = skips.read_text("utf-8").splitlines() if skips.exists() else []
    return kept, [json.loads(line) for line in lines], ""


def odd_member(rng: random.Random, tar: tarfile.TarFile, key: str) -> None:
    name = rng.choice(NAMES).format(rng.choice([key, key, rng.choice(CELLS).replace("\0", "")]))
    data = rng.choice([b"", b"\xff", b"odd", png()])
    member = tarfile.TarInfo(name or "x")
    member.size = len(data)
    if rng.random() < 0.4:
        member.type, member.linkname, member.size = rng.choice(KINDS), f"{key}.txt", 0
    if rng.random() < 0.2:  # what GNU's tar says of a file with holes
        member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1"}
        member.pax_headers |= {"GNU.sparse.size": str(10**11), "GNU.sparse.map": "0,1"}
        member.pax_headers |= {"GNU.sparse.numblocks": "1", "GNU.sparse.name": name}
    tar.addfile(member, io.BytesIO(data) if member.isreg() else None)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_members(rng, format, tmp_path):
    path, samples, odd, there = tmp_path / "a.tar", rng.randint(2, 8), set(), set()
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(samples):
            key, members = f"k{i}", [(".png", png()), (".txt", f"caption {i}".encode())]
            rng.shuffle(members)
            if rng.random() < 0.5:
                members[1] = (".json", json.dumps({"caption": f"caption {i}"}).encode())
                members[0] = (".png", png())
            for ending, data in members:
                if rng.random() < 0.15:
                    odd.add(key)
                    odd_member(rng, tar, key)
                if rng.random() < 0.9:
                    there.add(key)
                    add(tar, key + ending, data)
                else:
                    odd.add(key)
    kept, skips, error = prepared(path, tmp_path / "store")
    if error:
        assert "no documents left" in error or "no pair left" in error
        return
    for i in range(samples):
        if f"k{i}" not in odd:
            assert kept[f"k{i}"] == f"caption {i}"
    said = json.dumps(skips)
    assert all(key in kept or key in said for key in odd & there), f"{odd}: {kept}, {said}"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_bytes(rng, format, tmp_path):
    path, samples = tmp_path / "a.tar", rng.randint(2, 8)
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(samples):
            add(tar, f"k{i}.png", png())
            add(tar, f"k{i}.txt", f"caption {i}".encode())
    path.write_bytes(damaged(rng, path.read_bytes()))
    kept, skips, error = prepared(path, tmp_path / "store")
    assert error or len(kept) == samples or skips
