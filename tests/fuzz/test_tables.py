"""Tables of scored pairs, with odd cells or damaged bytes.

A row is known again by its score: it is kept, or named as skipped. One that nothing was done to is
kept as it was.
"""

import csv
import decimal
import io
import json
import random
import re
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuzz.fuzzing import CELLS, damaged, run
from gcl_jax.data.store import RankedStore

# In formats that know more than texts.
VALUES = [None, True, 0, -1, 7, 7.0, 2.5, 2**53 + 1, float("nan"), float("inf"), 1e308]
VALUES += [[], ["a"], {}, {"bytes": None}, [[["deep"]]]]
COLUMNS = [
    ["a", None],
    [b"\xff", b"a"],
    [1.5, float("nan")],
    [2**60, 1],
    [True, False],
    [["a"], []],
]
COLUMNS += [[decimal.Decimal("7.50"), None], [date(2026, 1, 2), None], [{"bytes": b"x"}, None]]
ENDINGS = ("csv", "tsv", "jsonl", "parquet")
FLAGS = "--query_fields=query --document_fields=title --id_column=id --score_column=score"


def rows_of(rng: random.Random) -> list[dict]:
    queries, pairs = rng.randint(1, 5), rng.randint(2, 12)
    return [
        {"query": f"query {i % queries}", "id": f"p{i}", "title": f"Title {i}", "score": 1 + i / 4}
        for i in range(pairs)
    ]


def write(rng: random.Random, path: Path, rows: list[dict]) -> list[int]:
    """The number of every row, as skips are counted."""
    names = list(rows[0])
    rng.shuffle(names)
    table = [{name: row[name] for name in names} for row in rows]
    match path.suffix:
        case ".parquet":
            columns = {name: [row[name] for row in table] for name in names}
            pq.write_table(pa.table(columns), path, row_group_size=rng.choice([1, 3, 100]))
            return list(range(1, len(rows) + 1))
        case ".jsonl":
            lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in table]
            path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            return list(range(1, len(rows) + 1))
    file, numbers = io.StringIO(newline=""), []
    delimiter = "\t" if path.suffix == ".tsv" else rng.choice(",,;\t|")
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    end = rng.choice(["\n", "\r\n"])
    writer = csv.DictWriter(file, names, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    for row in table:
        numbers.append(sum(1 for _ in io.StringIO(file.getvalue(), newline="")) + 1)
        writer.writerow(row)
    path.write_bytes(file.getvalue().encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))
    return numbers


def prepared(path: Path, out: Path) -> tuple[list[tuple], set[int], str]:
    """(the pairs that are kept, numbers of skipped rows, the error)."""
    outcome = run("prepare", f"--out={out}", f"--pairs={path}", *FLAGS.split(), "--on_error=skip")
    if outcome.error:
        assert not out.exists()
        return [], set(), outcome.error
    store = RankedStore(out)
    pairs, queries, documents = store.pairs("train"), list(store.queries), list(store.documents)
    kept = [
        (queries[q]["query"], documents[d]["id"], documents[d]["title"], float(score))
        for q, d, score in zip(pairs.query, pairs.document, pairs.score, strict=True)
    ]
    skips = out / "skipped.jsonl"
    lines = skips.read_text("utf-8").splitlines() if skips.exists() else []
    return kept, {json.loads(line)["row"] for line in lines}, ""


@pytest.mark.parametrize("ending", ENDINGS)
def test_odd_cells(rng, ending, tmp_path):
    path, rows = tmp_path / f"pairs.{ending}", rows_of(rng)
    odd, column = set(), ""
    if ending == "parquet":  # all cells of a column are of one type
        column, odd = rng.choice(list(rows[0])), set(range(len(rows)))
        cells = rng.choice(COLUMNS)
        for row in rows:
            row[column] = rng.choice(cells)
    else:
        for i in rng.sample(range(len(rows)), rng.randint(1, 2)):
            odd.add(i)
            column = rng.choice(list(rows[i]))
            rows[i][column] = rng.choice(CELLS + VALUES if ending == "jsonl" else CELLS)
    numbers = write(rng, path, rows)
    kept, skipped, error = prepared(path, tmp_path / "store")
    if error:
        assert len(odd) == len(rows) or ending == "tsv", error
        return
    for i, row in enumerate(rows):
        if i not in odd:
            kept.remove(tuple(row.values()))
    assert len(kept) <= len(odd)
    lost = {numbers[i] for i in odd} - skipped
    assert len(lost) <= len(kept), f"{rows}: {kept}, skipped {skipped}"


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_bytes(rng, ending, tmp_path):
    path, rows = tmp_path / f"pairs.{ending}", rows_of(rng)
    write(rng, path, rows)
    # Quotes, and line breaks between them, join rows of CSV rightly.
    data = damaged(rng, path.read_bytes(), bytes({*range(256)} - {*b'"\r\n'}))
    path.write_bytes(data)
    kept, skipped, error = prepared(path, tmp_path / "store")
    if error:
        return
    if ending == "parquet":
        assert len(kept) + len(skipped) >= len(rows)
    else:
        text = data.decode("utf-16" if data[:2] == b"\xff\xfe" else "latin-1", errors="replace")
        lines = [line for line in re.split(r"\r\n?|\n", text) if line.strip(",;| \t")]
        assert len(kept) + len(skipped) >= len(lines) - 1
