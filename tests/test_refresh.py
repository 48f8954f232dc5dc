"""Hard negatives that a run mines itself: when, what, into which batches, and exactly once more
after an interruption."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import assert_equal, taken
from test_train import final_params, interrupt_at

from gcl_jax import sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.state import TrainState
from gcl_jax.data.pipeline import train_batches
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import ConfigError
from gcl_jax.mine.mining import Mining, embedded, mine_split
from gcl_jax.models.clip import with_shardings
from gcl_jax.runs import load_run
from gcl_jax.train import refresh as refresh_module
from gcl_jax.train.loop import Interrupted, train
from gcl_jax.train.monitor import Compilations
from gcl_jax.train.refresh import Refresh, schedule
from gcl_jax.train.setup import make_training

SPLIT = "in_domain"


@pytest.fixture
def cfg(tiny_config, tiny_store):
    """Texts alone compile in half the time."""
    cfg = tiny_config
    cfg.model.vision, cfg.data.document_fields = None, {"title": 1.0}
    cfg.data.store, cfg.data.negatives = str(tiny_store.directory), "refresh"
    cfg.data.refresh_start, cfg.data.refresh_every, cfg.data.refresh_margin = 2, 3, 1e-4
    cfg.data.refresh_batches = 2
    cfg.loss.objectives.gcl, cfg.loss.objectives.hard_negatives = 0.0, 1.0
    cfg.optim.steps, cfg.log_every, cfg.checkpoint.every = 6, 1, 5
    return cfg


def logged(workdir):
    return list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_mines_with_the_model_of_the_moment_and_resumes_exactly(
    cfg, tmp_path, monkeypatch, capsys
):
    cfg.optim.ema_decay = 0.5
    train(cfg, tmp_path / "whole")
    told = capsys.readouterr().err
    mined_at = [int(row["step"]) for row in logged(tmp_path / "whole") if "refresh/seconds" in row]
    assert mined_at == [2, 5]
    assert all(f"step {step}: mined hard negatives in " in told for step in mined_at)

    # What a checkpoint holds is what `mine` finds with the model of the step before it that mined.
    run = load_run(tmp_path / "whole", checkpoint="5")
    found = embedded(run.cfg, run.store, Embedder(run.cfg, run.params, run.mesh), quiet=True)
    again = mine_split(run.cfg, run.store, *found, "document", Mining(relative_margin=1e-4))
    training = make_training(cfg)
    with Checkpointer(tmp_path / "whole", cfg.checkpoint) as checkpointer:
        restored = training.refresh.restore(checkpointer, training.tx)
    training.batches.close()
    assert restored.step == 6
    assert restored.state.mined is None
    mined = training.refresh.mined["document"]
    np.testing.assert_array_equal(mined, again)
    pairs = run.store.pairs(SPLIT)
    scored = set(zip(pairs.query.tolist(), pairs.document.tolist(), strict=True))
    rows = {
        (q, d) for q, own in zip(pairs.query.tolist(), mined, strict=True) for d in own[own >= 0]
    }
    assert rows
    assert not rows & scored

    # Stopped between two times, so that what was mined last cannot be mined again.
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(Interrupted, match="saved step 4"):
            train(cfg, tmp_path / "parts")
    train(cfg, tmp_path / "parts")
    whole, parts = (final_params(cfg, tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    losses = [
        [(row["step"], row["loss"]) for row in logged(tmp_path / name) if "loss" in row]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


class FakeEmbedder:
    """Embeddings that are drawn from the parameters, a seed."""

    def __init__(self, seed=None):
        self.seed = seed

    def with_params(self, params):
        return FakeEmbedder(params["seed"])

    def embed(self, side, records, fields, rows, **_):
        x = np.random.default_rng([self.seed, len(side)]).normal(size=(len(rows), 4))
        merged = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        return types.SimpleNamespace(merged=lambda weights: merged)


def test_what_was_mined_is_in_the_checkpoint(cfg, tiny_store, tmp_path, monkeypatch, capsys):
    cfg = tiny_store.resolve(cfg)
    mesh = sharding.make_mesh(cfg.mesh, 8)
    state = TrainState(jnp.int32(5), jax.device_put(jnp.ones(8), sharding.replicated(mesh)), ())
    first, batches = Refresh(cfg, tiny_store, mesh), train_batches(cfg, tiny_store)
    found = first.mine(5, TrainState(0, {"seed": 3}, ()), FakeEmbedder(), batches)
    again = embedded(cfg, tiny_store, FakeEmbedder(3), quiet=True)
    mining = Mining(relative_margin=1e-4)
    wanted = mine_split(cfg, tiny_store, *again, "document", mining, quiet=True)
    np.testing.assert_array_equal(first.mined["document"], wanted)
    share = np.mean((wanted < 0).all(axis=1))
    assert 0 < share < 1
    assert found["refresh/negatives"] == np.mean((wanted >= 0).sum(axis=1))
    assert f"for a pair, none for {share:.0%} of 24 pairs" in capsys.readouterr().err

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    abstract = with_shardings(abstract, jax.tree.map(lambda _: sharding.replicated(mesh), state))
    monkeypatch.setattr(refresh_module, "abstract_state", lambda *_: abstract)
    with Checkpointer(tmp_path, cfg.checkpoint) as checkpointer:
        checkpointer.save(4, Refresh(cfg, tiny_store, mesh).with_mined(state), {})
        before = Refresh(cfg, tiny_store, mesh)
        before.mined["document"] = wanted
        assert before.restore(checkpointer, None).state.mined is None
        assert not before.mined, "a run that goes back forgets what it mined later"
        checkpointer.save(5, first.with_mined(state), {})
        other = Refresh(cfg, tiny_store, mesh)
        assert other.restore(checkpointer, None).step == 5
        np.testing.assert_array_equal(other.mined["document"], wanted)
    batches.close()


def test_batches_go_on_with_what_is_mined(cfg, tiny_store):
    """At the very next batch, though others had been read ahead."""
    cfg.data.num_negatives = 2
    pairs, mined = tiny_store.pairs(SPLIT), {}
    batches = train_batches(cfg, tiny_store, mined=mined)
    plain = [next(batches) for _ in range(2)]
    assert not any(name.startswith("negative") for batch in plain for name in batch)
    mined["document"] = np.tile(np.int32([12, 13, -1]), (len(pairs), 1))
    batches.set_state(batches.get_state())
    later = [next(batches) for _ in range(2)]
    mined["document"] = np.full((len(pairs), 3), 14, np.int32)
    batches.set_state(batches.get_state())
    last = next(batches)
    batches.close()
    for batch in later:
        assert {tuple(sorted(row)) for row in batch["negative_document_id"].tolist()} == {(12, 13)}
    assert (last["negative_document_id"] == 14).all()
    cfg.data.negatives = ""
    whole = taken(train_batches(cfg, tiny_store), 5)
    for batch, own in zip(whole, [*plain, *later, last], strict=True):
        assert_equal(batch, {name: own[name] for name in batch})


def test_the_step_with_negatives_is_compiled_ahead(cfg, tiny_store):
    """By the time that it is asked for it is there, and is not even traced again."""
    cfg = tiny_store.resolve(cfg)
    mesh = sharding.make_mesh(cfg.mesh, 8)
    refresh, traced, whole = Refresh(cfg, tiny_store, mesh), [], sharding.replicated(mesh)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(whole, whole))
    def train_step(state, batch):
        traced.append(sorted(batch))
        return dataclasses.replace(state, step=state.step + 1), batch["weight"].sum()

    batches = train_batches(cfg, tiny_store, mined=refresh.mined)
    state = jax.device_put(TrainState(jnp.int32(0), {"x": jnp.ones(8)}, ()), whole)
    for _ in range(2):
        batch = sharding.to_global(next(batches), mesh)
        state, _ = train_step(state, batch)
        refresh.compile_ahead(train_step, state, batch)
    refresh._ahead.join()
    assert len(traced) == 2
    pairs = len(tiny_store.pairs(SPLIT))
    refresh.mined["document"] = np.tile(np.int32([12, -1]), (pairs, 1))
    batches.set_state(batches.get_state())
    batch = sharding.to_global(next(batches), mesh)
    batches.close()
    with Compilations() as compiled:
        state, _ = train_step(state, batch)
    assert int(state.step) == 3
    assert traced[1:] == [sorted(batch)]
    assert compiled.programs == 0


def test_the_schedule(cfg):
    data = cfg.data
    data.refresh_start = data.refresh_every = None
    schedule(data, 120)
    assert (data.refresh_start, data.refresh_every) == (60, 60)
    data.refresh_start = 120
    with pytest.raises(ConfigError, match="refresh_start=120 is not before the last of 120 steps"):
        schedule(data, 120)
    data.refresh_start = 120
    data.negatives = ""
    schedule(data, 120)


def test_of_so_many_batches_one_has_negatives(cfg, tiny_store):
    """The first one after the mining, whatever the step that a run is continued from."""
    cfg = tiny_store.resolve(cfg)
    refresh = Refresh(cfg, tiny_store, sharding.make_mesh(cfg.mesh, 8))
    cfg.data.refresh_start, cfg.data.refresh_batches = 2, 3
    rows = {"weight": 1, "negative_query": 2, "negative_document": 3, "negative_document_id": 4}
    assert refresh.in_turn(0, rows) == rows
    refresh.mined["document"] = np.zeros((24, 8), np.int32)
    full = [step for step in range(2, 12) if refresh.in_turn(step, rows) == rows]
    assert full == [2, 5, 8, 11]
    assert refresh.in_turn(3, rows) == {"weight": 1, "negative_query": 2}


def test_when_it_is_due_and_what_a_step_costs(cfg, tiny_store):
    cfg = tiny_store.resolve(cfg)
    refresh = Refresh(cfg, tiny_store, sharding.make_mesh(cfg.mesh, 8))
    assert [step for step in range(12) if refresh.due(step)] == [2, 5, 8, 11]
    before = refresh.flops({"query": {}, "document": {}})
    refresh.mined["document"] = np.zeros((24, 8), np.int32)
    assert refresh.flops({"query": {}, "document": {}}) == 1.25 * before
    cfg.data.refresh_batches = 1
    assert refresh.flops({"query": {}, "document": {}}) == 1.5 * before
    cfg.data.negatives = ""
    assert not any(map(Refresh(cfg, tiny_store, refresh._mesh).due, range(12)))
