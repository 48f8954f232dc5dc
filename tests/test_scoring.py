"""Scores of files, from the command line: equal to pytrec_eval's, and to those of a run of ours."""

import json
import sys

import ir_measures
import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval
from conftest import TinySource
from ir_measures import AP, RR, P, R, nDCG

from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate import metrics, trec
from gcl_jax.evaluate.metrics import KS
from gcl_jax.evaluate.results import score
from tests.test_metrics import KS as CUTS
from tests.test_metrics import random_case, trec_eval
from tests.test_search import untrained_run

TABLES = ("ndcg", "mAP", "recall", "precision", "mrr")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m gcl_jax.evaluate`; what it printed, if it failed also to stderr."""

    def run(*args: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
        if not code:
            evaluate.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as left:
            evaluate.main()
        assert left.value.code == code
        return "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("seed", range(0, 200, 8))
def test_missing_queries_count_zero_and_unjudged_ones_do_not(seed):
    """The other cases of `random_case` are in test_metrics."""
    qrels, run = random_case(np.random.default_rng(seed))
    result, counts = score(qrels, run)
    assert result.query_ids == list(qrels)
    both = [query in run for query in qrels]
    assert counts == {
        "queries": len(qrels),
        "queries_without_results": both.count(False),
        "queries_without_judgements": len(run.keys() - qrels.keys()),
    }
    for key, expected in trec_eval(qrels, run).items():
        if int(key.split("@")[1]) in set(CUTS) & set(KS):
            np.testing.assert_allclose(result.merged[key][both], expected, rtol=0, atol=1e-12)
    for values in result.merged.values():
        assert not values[~np.array(both)].any()


def test_runs_scored_in_blocks(monkeypatch):
    qrels, run = random_case(np.random.default_rng(3))
    whole = metrics.evaluate_run(qrels, run)
    monkeypatch.setattr(metrics, "RUN_BLOCK", 40)
    for key, values in metrics.evaluate_run(qrels, run).items():
        np.testing.assert_allclose(values, whole[key], rtol=1e-14)


@pytest.mark.parametrize("form", ["json", "trec"])
def test_scores_of_files(tmp_path, command, form):
    qrels = {f"q{i}": {f"d{j}": (i * j) % 5 for j in range(6)} for i in range(1, 4)}
    run = {f"q{i}": {f"d{j}": -float(i * j % 3) for j in range(9)} for i in (2, 3, 8, 9)}
    paths = tmp_path / "qrels", tmp_path / "run"
    if form == "json":
        for path, table in zip(paths, (qrels, run), strict=True):
            trec.write_table(path, table)
    else:
        trec.write_qrels(paths[0], qrels)
        trec.write_run(paths[1], run, "tag")
    out = tmp_path / "new" / "out"
    text = command("--qrels", paths[0], "--run", paths[1], "--out", out)
    measures = {"ndcg_cut_10": "NDCG@10", "map_cut_1000": "mAP@1000", "recall_5": "Recall@5"}
    theirs = pytrec_eval.RelevanceEvaluator(
        qrels, {"ndcg_cut.10", "map_cut.1000", "recall.5"}
    ).evaluate(run)
    table = pq.read_table(out / "output.parquet")
    assert table["query_id"].to_pylist() == ["q1", "q2", "q3"]
    report = json.loads((out / "output.json").read_text())
    for name, key in measures.items():
        expected = [0.0, theirs["q2"][name], theirs["q3"][name]]
        np.testing.assert_allclose(table[key].to_numpy(), expected, atol=1e-12)
        mean = report["recall"][key] if "Recall" in key else report["summary"][key]
        assert mean == pytest.approx(np.mean(expected))
        assert f"{key:<12}{mean:>8.4f}" in text.splitlines()
    hits = [0, theirs["q2"]["recall_5"] > 0, theirs["q3"]["recall_5"] > 0]
    assert report["acc"]["Accuracy@5"] == pytest.approx(np.mean(hits))
    names, values = (line.split(",") for line in (out / "output.csv").read_text().splitlines())
    assert dict(zip(names, map(float, values), strict=True)) == report["summary"]
    assert "over 3 judged queries" in text
    assert "1 of them are not in the run and count 0" in text
    assert "2 queries of the run have no judgements" in text


def test_wrong_calls_are_refused_in_one_line(tmp_path, command):
    (tmp_path / "qrels").write_text("q 0 d 1\n")
    (tmp_path / "other").write_text("p Q0 d 1 1 t\n")
    (tmp_path / "alien").write_text("q Q0 D 1 1 t\n")
    qrels, other, alien = (tmp_path / name for name in ("qrels", "other", "alien"))
    for args, message in [
        (("--qrels", qrels), "--qrels needs --run"),
        (("--workdir", tmp_path, "--run", other), "--run is an option of --qrels"),
        (("--workdir", tmp_path, "--out", other), "--out is an option of --qrels"),
        (("--qrels", qrels, "--run", other, "--embed_dim", "1"), "--embed_dim is an option of --w"),
        (("--compare", qrels, other, "--write_runs"), "--write_runs is an option of --workdir"),
        (("--qrels", qrels, "--run", other), f"none of its queries is judged in {qrels}"),
        (("--qrels", qrels, "--run", alien), "alien: no document is both in qrels, such as 'd', "),
        (("--qrels", other, "--run", other), f"{other}, line 1: 6 columns"),
        (("--qrels", qrels, "--run", tmp_path / "gone"), "gone"),
        (("--qrels", qrels, "--run", tmp_path), "Is a directory"),
    ]:
        error = command(*args, code=2)
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    for args in [(), ("--workdir", tmp_path, "--qrels", qrels)]:
        assert "--workdir" in command(*args, code=2).splitlines()[-1]


class SpacedSource(TinySource):
    """The tiny source with queries and documents whose ids hold blanks."""

    def documents(self):
        return (document | {"id": f"no. {document['id']}"} for document in super().documents())

    def queries(self):
        return (query | {"id": f"100% {query['id']}"} for query in super().queries())


def test_a_run_writes_what_others_score_alike(tmp_path, command):
    workdir = untrained_run(SpacedSource(), tmp_path)
    command("--workdir", workdir)
    first = {path.name: path.read_bytes() for path in (workdir / "eval").iterdir()}
    command("--workdir", workdir, "--write_runs")
    assert {name: (workdir / "eval" / name).read_bytes() for name in first} == first
    for split in ("in_domain", "zero_shot"):
        names = (f"{split}.{suffix}" for suffix in ("qrels.trec", "run.trec"))
        qrels_path, run_path = (workdir / "eval" / name for name in names)
        ours = pq.read_table(workdir / "eval" / f"{split}.parquet")
        queries = [query.replace("%", "%25").replace(" ", "%20") for query in ours[0].to_pylist()]
        with qrels_path.open() as q, run_path.open() as r:
            qrels, run = pytrec_eval.parse_qrel(q), pytrec_eval.parse_run(r)
        assert all(len(found) == 12 for found in run.values())
        oracle = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.1000"})
        scores = oracle.evaluate(run)
        for key, name in {"NDCG@10": "ndcg_cut_10", "mAP@1000": "map_cut_1000"}.items():
            expected = [scores[query][name] for query in queries]
            np.testing.assert_allclose(ours[key].to_numpy(), expected, atol=1e-12)
        theirs = (
            workdir / "eval" / f"{split}.gt_results.json",
            workdir / "eval" / f"{split}.retrieval.json",
        )
        report = json.loads((workdir / "eval" / f"{split}.json").read_text())
        means = {key: mean for table in TABLES for key, mean in report[table].items()}
        measures = {nDCG @ 10: "NDCG@10", AP @ 1000: "MAP@1000", RR @ 10: "MRR@10"}
        measures |= {R @ 5: "Recall@5", P @ 5: "P@5"}
        aggregated = ir_measures.calc_aggregate(
            measures,
            ir_measures.read_trec_qrels(str(qrels_path)),
            ir_measures.read_trec_run(str(run_path)),
        )
        for measure, key in measures.items():
            assert aggregated[measure] == pytest.approx(means[key], abs=1e-12), key
        # The authors' program gives both to pytrec_eval as they are.
        judged, found = (json.loads(path.read_text()) for path in theirs)
        again = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(found)
        given = [again[query]["ndcg_cut_10"] for query in ours[0].to_pylist()]
        np.testing.assert_allclose(ours["NDCG@10"].to_numpy(), given, atol=1e-12)
        for number, pair in enumerate([(qrels_path, run_path), theirs]):
            out = tmp_path / f"{split}{number}"
            command("--qrels", pair[0], "--run", pair[1], "--out", out)
            again = pq.read_table(out / "output.parquet")
            columns = again.drop(["query_id"]).column_names  # ours has those of fields, too
            assert again.select(columns).equals(ours.select(columns))
        assert again["query_id"].to_pylist() == ours["query_id"].to_pylist()
    assert not (workdir / "eval" / "recall").exists()
    (workdir / "eval").rename(workdir / "before")
    theirs = [workdir / "before" / path.name for path in theirs]
    (workdir / "eval").touch()  # so that nothing can be written
    for arguments, header in (((), "NDCG@10"), (("--recall",), "R@1")):
        shown = command("--workdir", workdir, *arguments, code=2)
        assert header in shown
        assert "\nerror: these results were not written: " in shown
    shown = command(*("--qrels", theirs[0], "--run", theirs[1], "--out", workdir / "eval"), code=2)
    assert shown.startswith("NDCG@10")
    assert "\nerror: these results were not written: " in shown
