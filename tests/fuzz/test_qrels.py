"""Judgements and results of other systems, with odd ids and values or damaged bytes."""

import gzip
import json
import random

import pytest

from fuzz.fuzzing import CELLS, damaged, run
from gcl_jax.errors import DataError
from gcl_jax.evaluate import trec

VALUES = [0, 1, 3, 2.5, -1, 1e308, 10**400, float("nan"), float("-inf"), None, True, "1", [], {}]
NUMBERS = ["0", "1", "3", "2.5", "-1", "1e308", "nan", "-inf", "1_0", "١", "", "0x10", "1,5"]


def table_of(rng: random.Random, ids: list[str], values: list) -> dict[str, dict]:
    documents = [f"d{i}" for i in range(9)] + rng.sample(ids, 2)
    queries = [f"q{i}" for i in range(rng.randint(1, 5))] + rng.sample(ids, 1)
    found = lambda: rng.sample(documents, rng.randint(1, 6))
    value = lambda: rng.choice(values) if rng.random() < 0.05 else rng.randint(0, 3)
    return {query: {document: value() for document in found()} for query in queries}


def as_trec(kind: str, table: dict[str, dict]) -> bytes:
    rest = {"qrels": "{} 0 {} {}\n", "run": "{} Q0 {} 1 {} tag\n"}[kind]
    lines = (rest.format(q, d, x) for q, found in table.items() for d, x in found.items())
    return "".join(lines).encode()


def written(rng: random.Random, folder, kind: str, form: str):
    """(its table, the path of the file)."""
    ids, values = (CELLS, VALUES) if form == "json" else (["é", "猫", "a-1", "{x"], NUMBERS)
    table = table_of(rng, ids, values)
    data = json.dumps(table).encode() if form == "json" else as_trec(kind, table)
    if rng.random() < 0.5:
        data = damaged(rng, data)
        table = {}
    if rng.random() < 0.3:
        data = gzip.compress(data, mtime=0)
        if rng.random() < 0.3:
            data = damaged(rng, data)
            table = {}
    path = folder / f"{kind}.{form}"
    path.write_bytes(data)
    return table, path


@pytest.mark.parametrize("form", ["json", "trec"])
def test_odd_files(rng, form, tmp_path):
    files = {kind: written(rng, tmp_path, kind, form) for kind in ("qrels", "run")}
    outcome = run("evaluate", *(f"--{kind}={path}" for kind, (_, path) in files.items()))
    assert outcome.error or "mAP" in outcome.out
    for kind, (table, path) in files.items():
        try:
            found = trec.read(path, kind)
        except DataError:
            assert outcome.error
            continue
        if table:
            assert found == {q: {d: float(x) for d, x in row.items()} for q, row in table.items()}
        elif form == "trec" and path.read_bytes()[:2] != b"\x1f\x8b":
            lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
            assert sum(map(len, found.values())) == len(lines)
