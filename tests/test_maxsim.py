"""Late interaction in search: exact, from tokens that were stored, and by every command."""

import json
import sys

import numpy as np
import pytest
from test_search import HostileSource, untrained_run

from gcl_jax.embed import __main__ as embed
from gcl_jax.embed import vectors
from gcl_jax.embed.embedder import Embedder, Tokens
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.models.families import ClipText
from gcl_jax.runs import load_run
from gcl_jax.search import __main__ as search
from gcl_jax.search import maxsim


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(HostileSource(), tmp_path_factory.mktemp("maxsim"))


def call(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["it", *map(str, args)])
    module.main()


def lists(tokens: Tokens):
    """The embeddings of each record, float64."""
    return [
        np.float64(tokens.embeddings[start : start + count])
        for start, count in zip(tokens.starts, tokens.counts, strict=True)
    ]


def brute_force(queries, documents, k):
    """(scores, rows), of lists of (t, e) tokens."""
    every = np.array(
        [[(q @ d.T).max(1).mean() if len(q) and len(d) else 0 for d in documents] for q in queries]
    )
    best = np.argsort(-every, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(every, best, axis=1), best


def random_tokens(rng, counts, dtype):
    """Of whole numbers, so that no product is rounded and equal documents tie."""
    return Tokens.in_a_row(counts, rng.integers(-3, 4, (sum(counts), 8)).astype(dtype))


@pytest.mark.parametrize("k", [1, 7, 100])
def test_search_is_brute_force(monkeypatch, k):
    """In tiles, with repeated documents, in another order than they are stored in."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(maxsim, "QUERIES", 4)
    monkeypatch.setattr(maxsim, "PRODUCTS", 4 * 8 * 8 * 10)
    counts = rng.choice([0, 1, 2, 4], 30)
    documents = random_tokens(rng, counts, np.float16).take(rng.integers(30, size=41))
    queries = random_tokens(rng, rng.choice([0, 1, 2, 4, 8], 9), np.float32)
    scores, rows = maxsim.maxsim_top_k(queries, documents, k)
    expected, best = brute_force(lists(queries), lists(documents), k)
    np.testing.assert_array_equal(rows, best)
    np.testing.assert_allclose(scores, expected)
    assert maxsim.maxsim_top_k(queries.take(np.arange(0)), documents, k)[0].shape == (0, min(k, 41))


def test_embed_stores_the_tokens_and_goes_on_after_a_kill(workdir, monkeypatch, tmp_path):
    args = f"--workdir={workdir}", "--tokens", "--batch_size=8"
    call(monkeypatch, embed, *args, f"--out={tmp_path / 'whole'}")
    cfg, store, params, mesh, _ = load_run(workdir)
    rows, fields = np.arange(len(store.documents)), cfg.data.document_fields
    expected = Embedder(cfg, params, mesh).embed_tokens("document", store.documents, fields, rows)
    found = vectors.opened(tmp_path / "whole").arrays
    assert (found["tokens"].dtype, found["counts"].dtype) == (np.float16, np.int32)
    np.testing.assert_array_equal(found["counts"], expected.counts)
    np.testing.assert_allclose(found["tokens"], expected.embeddings, atol=1e-3)
    assert len(set(expected.counts)) > 1, "padding is left out"

    batches = Embedder.batches

    def killed(*args, **options):
        for i, batch in enumerate(batches(*args, **options)):
            if i == 2:  # as Ctrl-C, which the command tells
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(vectors, "SECONDS_PER_NOTE", 0.0)
    monkeypatch.setattr(Embedder, "batches", killed)
    with pytest.raises(SystemExit, match="130"):
        call(monkeypatch, embed, *args, f"--out={tmp_path / 'killed'}")
    monkeypatch.setattr(Embedder, "batches", batches)
    call(monkeypatch, embed, *args, f"--out={tmp_path / 'killed'}")
    for name in (vectors.TOKENS, vectors.COUNTS):
        ours, whole = ((tmp_path / x / name).read_bytes() for x in ("killed", "whole"))
        assert ours == whole


def test_commands_rank_by_tokens(workdir, monkeypatch, capsys):
    """Search and evaluation take what the run keeps: a document's image and its title."""
    asked = ["thing 15", "nowhere"]
    args = [f"--workdir={workdir}", *asked, "--maxsim", "--json", "--top_k=5", "--split=zero_shot"]
    call(monkeypatch, search, *args)
    answers = [json.loads(line)["results"] for line in capsys.readouterr().out.splitlines()]
    cfg, store, params, mesh, _ = load_run(workdir)
    corpus, embedder = store.corpus("zero_shot"), Embedder(cfg, params, mesh)
    (folder,) = (workdir / "embeddings").iterdir()
    documents = Tokens.in_a_row(*(np.load(folder / f"{x}.npy") for x in ("counts", "tokens")))
    given = maxsim.GivenRecords("queries", {"query": "text"}, [{"query": x} for x in asked])
    queries = embedder.embed_tokens("query", given, {"query": 1.0}, np.arange(2), quiet=True)
    scores, best = brute_force(lists(queries), lists(documents), 5)
    for found, wanted, values in zip(answers, corpus[best], scores, strict=True):
        assert [one["id"] for one in found] == [store.documents.ids[row] for row in wanted]
        np.testing.assert_allclose([one["score"] for one in found], values, atol=1e-5)

    call(monkeypatch, evaluate, f"--workdir={workdir}", "--maxsim")
    assert "MaxSim" in capsys.readouterr().out
    for split in cfg.eval.splits:
        written = json.loads((workdir / f"eval/{split}.json").read_text())["fields"]
        assert 0 <= written["MaxSim"]["NDCG@10"] <= 1


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (search, ("--maxsim", "--hybrid", "a"), "--maxsim does not go with --hybrid"),
        (search, ("--maxsim", "--serve"), "--maxsim does not go with --serve"),
        (embed, ("--tokens", "--export=parquet"), "--tokens goes with neither --per_field nor"),
        (embed, ("--tokens", "--per_field", "--out=x"), "--tokens goes with neither --per_field"),
        (evaluate, ("--maxsim", "--recall"), "--maxsim does not go with --recall"),
    ],
)
def test_what_does_not_go_together_is_told(workdir, monkeypatch, capsys, module, args, message):
    with pytest.raises(SystemExit):
        call(monkeypatch, module, f"--workdir={workdir}", *args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "args"),
    [(search, ("--maxsim", "a")), (embed, ("--tokens",)), (evaluate, ("--maxsim",))],
)
def test_towers_without_tokens_are_told(workdir, monkeypatch, capsys, module, args):
    monkeypatch.setattr(ClipText, "gives_tokens", False)
    with pytest.raises(SystemExit):
        call(monkeypatch, module, f"--workdir={workdir}", *args)
    message = f"config.model.text.family=clip: {args[0]} needs embeddings of tokens"
    assert message in capsys.readouterr().err
