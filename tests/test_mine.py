"""Mining against a reference in loops, and the command from a run to a batch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import TinySource
from test_pipeline import taken
from test_search import untrained_run

from gcl_jax import config
from gcl_jax.data.negatives import pairs_fingerprint
from gcl_jax.data.pipeline import train_batches
from gcl_jax.data.store import RankedStore
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import DataError, UserError
from gcl_jax.mine import __main__ as mine
from gcl_jax.mine import mining
from gcl_jax.mine.mining import Mining, mine_negatives
from gcl_jax.prepare.stores import write_store
from gcl_jax.runs import load_run


def make_problem(pairs=150, anchors=12, candidates=40, seed=0):
    """Embeddings on a sphere, pairs in random order, scores from 1 to 100."""
    rng = np.random.default_rng(seed)

    def on_sphere(count):
        x = rng.normal(size=(count, 4)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    picked = rng.permutation(anchors * candidates)[:pairs]
    score = rng.integers(1, 101, pairs).astype(np.float32)
    embeddings = on_sphere(anchors), on_sphere(candidates)
    return *embeddings, picked // candidates, picked % candidates, score


def serving(problem, settings):
    """For every pair the candidates that serve, nearest first."""
    anchors, candidates, anchor, candidate, score = problem
    known = dict(zip(zip(anchor, candidate, strict=True), score, strict=True))
    for a, c, own in zip(anchor, candidate, score, strict=True):
        cosine = candidates @ anchors[a]
        limit = np.inf
        if settings.absolute_margin is not None:
            limit = cosine[c] - settings.absolute_margin
        if settings.relative_margin is not None:
            limit = min(limit, cosine[c] - abs(cosine[c]) * settings.relative_margin)
        ranking = [d for d in np.argsort(-cosine) if known.get((a, d), -1) < settings.max_score]
        if settings.max_score == 0:
            assert not any((a, d) in known for d in ranking)
        ranking = ranking[settings.range_min : settings.range_max]
        yield [d for d in ranking if cosine[d] <= limit and known.get((a, d), 0) < own]


SETTINGS = (
    Mining(),
    Mining(num_negatives=3, range_min=4, range_max=9),
    Mining(num_negatives=2, relative_margin=0.3),
    Mining(num_negatives=5, relative_margin=None, absolute_margin=0.4),
    Mining(num_negatives=5, relative_margin=0.1, absolute_margin=0.2, range_max=1000),
    Mining(num_negatives=4, relative_margin=None, range_max=6),
    Mining(num_negatives=20, max_score=60),
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("blocks", [(512, 8192), (5, 7)])
def test_top_equals_the_reference(settings, blocks, monkeypatch):
    monkeypatch.setattr(mining, "ANCHORS_PER_BLOCK", blocks[0])
    monkeypatch.setattr(mining, "PAIRS_PER_BLOCK", blocks[1])
    problem = make_problem()
    mined = mine_negatives(*problem, settings, quiet=True)
    assert mined.dtype == np.int32
    wanted = [own[: settings.num_negatives] for own in serving(problem, settings)]
    padded = [[*own, *[-1] * (settings.num_negatives - len(own))] for own in wanted]
    np.testing.assert_array_equal(mined, padded)


def test_random_draws_from_what_serves():
    problem = make_problem()
    settings = Mining(num_negatives=4, relative_margin=None, sampling="random")
    mined = mine_negatives(*problem, settings, quiet=True)
    np.testing.assert_array_equal(mined, mine_negatives(*problem, settings, quiet=True))
    top = 0
    for own, row in zip(serving(problem, settings), mined, strict=True):
        drawn = [x for x in row.tolist() if x >= 0]
        assert len(drawn) == len(set(drawn)) == min(4, len(own))
        assert [x for x in own if x in drawn] == drawn, "nearest first"
        top += drawn == own[:4]
    assert top < len(mined) / 4
    other = Mining(num_negatives=4, relative_margin=None, sampling="random", seed=1)
    assert (mine_negatives(*problem, other, quiet=True) != mined).any()


def test_pairs_that_come_twice_and_a_corpus_of_known_documents():
    anchors, candidates, anchor, candidate, score = make_problem(30, 2, 15)
    assert (mine_negatives(anchors, candidates, anchor, candidate, score, Mining()) == -1).all()
    twice = [np.tile(x, 2) for x in (anchor, candidate)]
    score = np.concatenate([score, np.full(30, 1, np.float32)])
    mined = mine_negatives(anchors, candidates, *twice, score, Mining(max_score=2), quiet=True)
    best = np.maximum(score[:30], 1)
    for a, row in zip(twice[0], mined, strict=True):
        chosen = {(a, x) for x in row if x >= 0}
        assert not chosen & {(anchor[i], candidate[i]) for i in range(30) if best[i] >= 2}, (
            "the best score of a pair counts"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "--num_negatives=0 must be 1 or more"),
        ({"range_min": -1}, "--range_min=-1 must be 0 or more"),
        ({"range_min": 5, "range_max": 5}, "below --range_max=5"),
        ({"relative_margin": float("nan")}, "--relative_margin=nan is no number"),
        ({"max_score": float("inf")}, "--max_score=inf is no number"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Mining(**options)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(TinySource(), tmp_path_factory.mktemp("mine"))


@pytest.fixture
def run_mine(workdir, monkeypatch, capsys):
    """Runs the command and returns what it prints to stdout."""

    def run(*args) -> str:
        command = ["mine", f"--workdir={workdir}", *map(str, args)]
        monkeypatch.setattr(sys, "argv", command)
        mine.main()
        return capsys.readouterr().out

    return run


def test_from_a_run_to_a_batch(workdir, run_mine, tmp_path):
    out = tmp_path / "mined"
    options = ("--num_negatives=3", "--absolute_margin=1e-4", "--range_max=9")
    printed = run_mine(f"--out={out}", "--side=both", *options)
    assert not (tmp_path / "mined.incomplete").exists()
    cfg, store, *_ = load_run(workdir)
    pairs = store.pairs("in_domain")
    documents = np.load(out / "in_domain" / "negative_documents.npy")
    queries = np.load(out / "in_domain" / "negative_queries.npy")
    assert documents.shape == (24, 3)
    scored = set(zip(pairs.query.tolist(), pairs.document.tolist(), strict=True))
    cosine = embedded_cosines(workdir)
    for i, (q, d) in enumerate(zip(pairs.query.tolist(), pairs.document.tolist(), strict=True)):
        for x in documents[i][documents[i] >= 0]:
            assert (q, x) not in scored
            assert x in store.corpus("in_domain")
            assert cosine[q, x] <= cosine[q, d] - 1e-4 + 1e-6
        for x in queries[i][queries[i] >= 0]:
            assert (x, d) not in scored
            assert x in pairs.query, "of the training split"
            assert cosine[x, d] <= cosine[q, d] - 1e-4 + 1e-6
    counts = (documents >= 0).sum(axis=1)
    line = next(line for line in printed.splitlines() if line.startswith("negatives (document)"))
    assert f"24 pairs, {(counts == 3).sum()} with 3, " in line
    assert f"{(counts == 0).sum()} with none; mean {counts.mean():.2f}" in line
    assert f"--config.data.negatives={out}" in printed

    note = json.loads((out / "in_domain" / "negatives.json").read_text())
    assert note["fingerprint"] == pairs_fingerprint(store, "in_domain")
    assert (note["run"], note["step"], note["split"]) == (str(workdir), 0, "in_domain")
    assert note["settings"]["num_negatives"] == 3
    assert note["settings"]["relative_margin"] is None

    cfg.data.negatives, cfg.data.num_negatives = str(out), 2
    cfg.optim.batch_size = 8
    for batch in taken(train_batches(cfg, store), 3):
        for i in range(8):
            (number,) = np.flatnonzero(
                (pairs.query == batch["query_id"][i]) & (pairs.document == batch["document_id"][i])
            )
            for name, rows in (("document", documents), ("query", queries)):
                own = batch[f"negative_{name}_id"][i]
                assert set(own[own >= 0]) <= set(rows[number])
                assert (own >= 0).sum() == min(2, (rows[number] >= 0).sum())


def embedded_cosines(workdir):
    """{(query, document): cosine} as a matrix, of all records of the store."""
    cfg, store, params, mesh, _ = load_run(workdir)
    embedder = Embedder(cfg, params, mesh)
    sides = (
        ("query", store.queries, cfg.data.query_fields),
        ("document", store.documents, cfg.data.document_fields),
    )
    queries, documents = (
        embedder.embed(side, records, list(weights), np.arange(len(records)), quiet=True).merged(
            weights
        )
        for side, records, weights in sides
    )
    return queries @ documents.T


def test_the_same_again_and_nothing_is_overwritten(run_mine, tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        run_mine(f"--out={tmp_path / name}", "--sampling=random", "--num_negatives=2")
        folder = tmp_path / name / "in_domain"
        files.append((folder / "negative_documents.npy").read_bytes())
        assert not (folder / "negative_queries.npy").exists()
        note = json.loads((folder / "negatives.json").read_text())
        assert note["settings"]["relative_margin"] == 0.05
    assert files[0] == files[1]
    with pytest.raises(SystemExit, match="2"):
        run_mine(f"--out={tmp_path / 'a'}")
    assert "a exists already" in capsys.readouterr().err


def test_a_killed_run_leaves_nothing(run_mine, tmp_path, monkeypatch):
    monkeypatch.setattr(mine, "save_negatives", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_mine(f"--out={tmp_path / 'mined'}")
    assert not (tmp_path / "mined").exists()
    monkeypatch.undo()


def test_no_negatives_at_all(workdir, tmp_path):
    with pytest.raises(DataError, match="no document is left as a negative for any pair of split"):
        mine.mine_run(workdir, ("document",), Mining(absolute_margin=2.5))


def test_negatives_of_another_store_are_refused(workdir, run_mine, tmp_path):
    class Other(TinySource):
        def documents(self):
            return ({**document, "id": f"x{document['id']}"} for document in super().documents())

    run_mine(f"--out={tmp_path / 'mined'}")
    cfg = config.load(workdir / "config.json")
    cfg.data.negatives = str(tmp_path / "mined")
    cfg.optim.batch_size = 8
    same = write_store(TinySource(), tmp_path / "same")
    taken(train_batches(same.resolve(cfg), same), 1)
    other: RankedStore = write_store(Other(), tmp_path / "other")
    with pytest.raises(DataError, match="mined for the pairs of another store"):
        train_batches(other.resolve(cfg), other)


def test_errors_are_one_line(tmp_path):
    command = [sys.executable, "-m", "gcl_jax.mine", f"--workdir={tmp_path}", "--out=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_names_what_was_to_be_made(tmp_path, full_disk):
    rows = {"document": np.zeros((3000, 1), np.int32)}
    with full_disk(), pytest.raises(OSError, match=r"/mined cannot be written: "):
        mine.write_mined(tmp_path / "mined", rows, {"split": "train"})
