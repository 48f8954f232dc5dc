"""Qrels and runs in files: every format read, every bad line named, what is written readable."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_jax.errors import DataError
from gcl_jax.evaluate import trec

QRELS = {"q2": {"d1": 3, "d3": 0}, "q1": {"d1": -1}}
RUN = {"q1": {"d9": 0.5, "d1": 0.25}, "q3": {"d1": -2e3}}
QRELS_TEXT = "q2 0 d1 3\nq2  0\td3 0  \r\n\n q1 xx d1 -1"
RUN_TEXT = "q1 Q0 d9 1 0.5 tag\nq3 Q0 d1 0 -2e3 t\nq1\tQ0 d1 junk 0.25 tag\n"


def order(table):
    return [(query, list(documents)) for query, documents in table.items()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("qrels", QRELS_TEXT, QRELS),
        ("run", RUN_TEXT, RUN),
        ("qrels", "\ufeff" + QRELS_TEXT, QRELS),
        ("qrels", "\n " + json.dumps(QRELS, indent=1), QRELS),
        ("run", json.dumps(RUN), RUN),
        ("run", json.dumps({f"{query}_{{!@#~}}_": found for query, found in RUN.items()}), RUN),
        ("run", '{"red shoes_{!@#~}_": {}}', {"red shoes": {}}),
        ("qrels", "{ 0 {} 1", {"{": {"{}": 1}}),
        ("qrels", "q\u00a0a 0 é\u2028 1.5", {"q\u00a0a": {"é\u2028": 1.5}}),
    ],
)
def test_formats_are_known_by_their_content(tmp_path, kind, text, expected, packed):
    path = tmp_path / "named.anything"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    table = trec.read(path, kind)
    assert table == expected
    assert order(table) == order(expected)


BAD = [
    ("qrels", "", "the file is empty"),
    ("run", " \n\n", "the file is empty"),
    ("run", "{}", "there is no query in it"),
    ("qrels", "q 0 d 1\nq 0 d\n", "line 2: 3 columns, where qrels has 4 (query 0 document grade)"),
    ("run", "q 0 d 1\n", "line 1: 4 columns, where run has 6"),
    ("qrels", "\nq Q0 d 1 0.5 tag\n", "line 2: 6 columns"),
    ("qrels", "q 0 d high", "line 1: grade 'high' is not a finite number"),
    ("run", "q Q0 d 1 nan tag", "line 1: score 'nan' is not a finite number"),
    ("run", "q Q0 d 1 -inf tag", "line 1: score '-inf'"),
    ("run", "q Q0 d 1 1_0 tag", "line 1: score '1_0'"),
    ("qrels", "q 0 d 1\np 0 d 1\nq 0 d 2", "line 3: query 'q' has document 'd' a second time"),
    ("run", "q Q0 e 1 1 t\nq Q0 d 2 0 t\nq Q0 d 3 0 t", "line 3: query 'q' has document 'd' a"),
    ("qrels", b"q 0 a 1\nq 0 \xff 1", "line 2: id '\ufffd' is not UTF-8"),
    ("qrels", '{"q":\n{"d": 1}', "line 2: broken JSON"),
    ("qrels", '{"q": 1}', "query 'q': int in place of {document: grade}"),
    ("qrels", '{"q": [["d", 1]]}', "query 'q': list in place of {document: grade}"),
    (
        "run",
        '{"q": {"d": 1, "e": "2"}}',
        "query 'q': the score of document 'e' is '2', not a finite number",
    ),
    ("run", '{"q": {"d": true}}', "query 'q': the score of document 'd' is True, not a finite"),
    ("run", '{"q": {"d": null}}', "query 'q': the score of document 'd' is None, not a finite"),
    ("run", '{"q": {"d": {}}}', "query 'q': the score of document 'd' is (), not a finite num"),
    (
        "run",
        '{"q": {"d": NaN}}',
        "query 'q': the score of document 'd' is nan, not a finite number",
    ),
    ("run", '{"q": {"d": 1%s}}' % ("0" * 400), "the score of document 'd' is 1000"),
    ("run", '{"q": {"d": 1%s}}' % ("0" * 5000), "broken JSON"),
    ("run", '{"q": {"e": 1, "d": 1, "d": 2}}', "query 'q': document 'd' is there a second time"),
    ("run", '{"q": {}, "q_{!@#~}_": {}}', "query 'q': it is there a second time"),
    ("run", '{"q": {"\\ud800": 1}}', "lone surrogate"),
    ("run", gzip.compress(b"q Q0 d 1 1 t", mtime=0)[:-5], "broken gzip file"),
    ("run", b"\x1f\x8bnothing", "broken gzip file"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD)
def test_what_is_wrong_is_named_in_one_line(tmp_path, kind, content, message):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        trec.read(path, kind)
    text = str(raised.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


def test_what_would_never_end_is_not_read(tmp_path, monkeypatch):
    """A file that unpacks to far more than it has, unless the limit allows it; a pipe, a device."""
    lines = b"".join(b"q Q0 d%d 1 1 t\n" % i for i in range(10)) + b"\n" * 100_000
    packed = tmp_path / "run.gz"
    packed.write_bytes(gzip.compress(lines))
    monkeypatch.setattr("gcl_jax.data.transforms.MAX_BYTES", 50_000)
    with pytest.raises(DataError, match=r"unpacks to more than 50000 bytes, from \d+; .*MAX_BYTES"):
        trec.read(packed, "run")
    monkeypatch.setattr("gcl_jax.data.transforms.MAX_BYTES", 200_000)
    assert len(trec.read(packed, "run")["q"]) == 10
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            trec.read(path, "qrels")


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"'), min_size=1)


def tables(values):
    return st.dictionaries(NAMES, st.dictionaries(NAMES, values, min_size=1), min_size=1)


@settings(max_examples=40, deadline=None)
@given(qrels=tables(st.integers(-5, 100)), run=tables(st.floats(-1e9, 1e9, width=32)))
def test_what_is_written_is_read_by_us_and_by_pytrec_eval(tmp_path_factory, qrels, run):
    folder = tmp_path_factory.mktemp("trec")
    trec.write_qrels(folder / "qrels", qrels)
    trec.write_run(folder / "run", run, "tag")
    ours = trec.read(folder / "qrels", "qrels"), trec.read(folder / "run", "run")
    with (folder / "qrels").open(newline="\n") as q, (folder / "run").open(newline="\n") as r:
        assert ours == (pytrec_eval.parse_qrel(q), pytrec_eval.parse_run(r))
    for written, table in zip(ours, (qrels, run), strict=True):
        values = [np.float32(list(documents.values())).tolist() for documents in table.values()]
        assert [np.float32(list(d.values())).tolist() for d in written.values()] == values
    for kind, table in (("qrels", qrels), ("run", run)):
        trec.write_table(folder / kind, table)
        marked = any(query.endswith(trec.SEPARATOR) for query in table)
        assert marked or trec.read(folder / kind, kind) == table
    assert sorted(file.name for file in folder.iterdir()) == ["qrels", "run"]


def test_blanks_in_ids_are_written_as_percent_codes(tmp_path):
    trec.write_run(tmp_path / "run", {"red shoes": {"100%": 0.1}, "a\u00a0b": {"c\td": 1.0}}, "us")
    assert (tmp_path / "run").read_text().splitlines() == [
        "red%20shoes Q0 100%25 1 0.1 us",
        "a%C2%A0b Q0 c%09d 1 1 us",
    ]


def test_grades_that_trec_cannot_hold_are_refused(tmp_path):
    path = tmp_path / "qrels"
    with pytest.raises(DataError, match=r"whole grades; that of document 'd' for query 'q' is 1.5"):
        trec.write_qrels(path, {"q": {"d": 1.5}})
    assert not path.exists()
