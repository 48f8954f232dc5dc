"""Lengths, evaluations and checkpoints of a run that its configuration leaves to the data."""

import copy
import json
import math
import shutil

import jax
import numpy as np
import pytest

from gcl_jax import config
from gcl_jax.config import CheckpointConfig, EvalConfig, OptimConfig, TrainConfig
from gcl_jax.data.store import RankedStore, write_checksums
from gcl_jax.errors import ConfigError
from gcl_jax.optim import total_steps
from gcl_jax.plan import planner
from gcl_jax.runs import load_model
from gcl_jax.train import loop
from gcl_jax.train.loop import train
from gcl_jax.train.setup import spelled_out

BEST = "val/NDCG@10"


def of(pairs, splits=("train", "val"), **parts):
    cfg = TrainConfig(**parts)
    cfg.data.train_split, cfg.eval.splits = "train", splits
    return spelled_out(cfg, pairs)


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "steps", "warmup", "every", "checkpoint"),
    [
        (20, 16, 50, 62, 6, 6, 6),
        (130, 32, 50, 203, 20, 20, 20),
        (1_080, 128, 50, 422, 42, 42, 42),
        (10_000, 256, 26, 1016, 101, 102, 102),
        (1_000_000, 256, 5, 19531, 1953, 2000, 200),
        (10_000_000, 256, 5, 195312, 2000, 19600, 200),
    ],
)
def test_length_and_evaluations_follow_the_pairs(
    pairs, batch, epochs, steps, warmup, every, checkpoint
):
    cfg = of(pairs)
    assert (cfg.optim.batch_size, cfg.optim.epochs, cfg.optim.warmup_steps) == (
        batch,
        epochs,
        warmup,
    )
    assert total_steps(cfg.optim, pairs) == steps
    assert (cfg.eval.every, cfg.checkpoint.every, cfg.checkpoint.best) == (every, checkpoint, BEST)


def test_what_is_asked_for_stays_and_what_is_spelled_out_fits():
    """Of any number of pairs, and any evaluations or checkpoints asked for: checkpoints that are
    compared are saved, and spelling out again changes nothing."""
    rng = np.random.default_rng(0)
    for pairs in (10 ** rng.uniform(0.5, 7, 8)).astype(int).tolist():
        for every in (None, int(rng.integers(1, 3000))):
            for saved in (None, int(rng.integers(1, 3000))):
                cfg = of(
                    pairs, eval=EvalConfig(every=every), checkpoint=CheckpointConfig(every=saved)
                )
                assert cfg.eval.every == every or every is None
                assert cfg.checkpoint.every == saved or saved is None
                assert 2 <= cfg.optim.batch_size <= pairs
                assert 5 <= cfg.optim.epochs <= 50
                assert not cfg.checkpoint.best or cfg.eval.every % cfg.checkpoint.every == 0
                assert spelled_out(cfg, pairs) == cfg
    asked = OptimConfig(steps=7, warmup_steps=3, batch_size=6)
    assert of(1_000_000, optim=asked).optim == asked
    assert of(100, ("train", "test")).eval.every == 0
    assert of(100, ("train", "test")).checkpoint == CheckpointConfig(every=200, best="")
    assert of(100, ("train",), checkpoint=CheckpointConfig(best="train/MRR")).eval.every > 0
    with pytest.raises(ConfigError, match="patience=2 counts evaluations by"):
        of(100, ("train", "test"), eval=EvalConfig(patience=2))


def test_plan_knows_the_same(tiny_config, tiny_store):
    cfg = tiny_config
    cfg.data.store, cfg.optim = str(tiny_store.directory), OptimConfig()
    found, data = planner.resolve(cfg)
    assert (data.pairs, found.optim.batch_size, found.optim.epochs) == (24, 16, 50)
    cfg.data.store = "nowhere"
    assert planner.resolve(cfg)[0].optim.batch_size == 256


@pytest.fixture
def cfg(tiny_config, tiny_store, tmp_path):
    """Texts alone, which compile fast, of a store with the splits train and val."""
    folder = tmp_path / "store"
    shutil.copytree(tiny_store.directory, folder)
    info = tiny_store.info
    splits = {"train": info["splits"]["in_domain"], "val": info["splits"]["novel_query"]}
    (folder / "store.json").write_text(json.dumps(info | {"splits": splits}))
    for name, old in (("train", "in_domain"), ("val", "novel_query")):
        (folder / "pairs" / old).rename(folder / "pairs" / name)
    shutil.rmtree(folder / "ground_truth", ignore_errors=True)
    write_checksums(folder)
    tiny_config.data.store, tiny_config.data.train_split = str(RankedStore(folder).directory), ""
    tiny_config.model.vision, tiny_config.data.document_fields = None, {"title": 1.0}
    tiny_config.optim = OptimConfig(lr=1e-3, steps=20)
    return tiny_config


@pytest.mark.usefixtures("compiled_once")
def test_a_run_ends_early_by_its_validation_split(cfg, tmp_path, monkeypatch, capsys):
    """Killed and continued it ends at the same step with the same parameters; called again it says
    so and stays as it is."""
    scores = {2: 0.2, 4: 0.6, 6: 0.5, 8: math.nan, 10: 0.6, 12: 0.1}

    def run(name, patience, first=2, kill_at=0):
        """The steps that are evaluated, from `first` on."""
        steps = []

        def evaluated(*_):
            steps.append(first + 2 * len(steps))
            if steps[-1] == kill_at:
                raise RuntimeError("killed")
            return {BEST: scores.get(steps[-1], 0.3)}

        monkeypatch.setattr(loop, "evaluate_in_training", evaluated)
        own = copy.deepcopy(cfg)
        own.eval.patience = patience
        train(own, tmp_path / name)
        return steps

    assert run("whole", 4) == [2, 4, 6, 8, 10, 12]
    line = f"config.eval.patience=4: no {BEST} above the 0.6000 of step 4 in 4 evaluations"
    assert f"{line}; the run ends at step 12 of 20" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="killed"):
        run("killed", 4, kill_at=8)
    assert run("killed", 4, first=8) == [8, 10, 12]
    for checkpoint, step in (("newest", 12), ("best", 10)):  # the later of two equals
        whole, again = (load_model(tmp_path / name, checkpoint) for name in ("whole", "killed"))
        assert whole.step == again.step == step
        jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)

    before = (tmp_path / "whole/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run("whole", 4) == []
    assert f"{line}; the run ends at step 12 of 20" in capsys.readouterr().err
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_with_the_length_that_it_began_with(cfg, tmp_path, monkeypatch):
    """Also one of an earlier version, whose config.json has other numbers; and one that grows. The
    last step is evaluated, too, so that it can be the best."""
    monkeypatch.setattr(loop, "evaluate_in_training", lambda *_: {BEST: 0.5})
    old = copy.deepcopy(cfg)
    old.optim = OptimConfig(lr=1e-3, epochs=1.0, warmup_steps=100, batch_size=8)
    old.eval.every, old.checkpoint.best, old.checkpoint.every = 0, "", 200
    train(old, tmp_path)
    written = config.load(tmp_path / "config.json")
    left_open = copy.deepcopy(cfg)
    left_open.optim = OptimConfig(lr=1e-3)
    assert train(left_open, tmp_path)["step"] == 3
    assert config.load(tmp_path / "config.json").optim == written.optim
    left_open.optim.epochs = 2.0
    assert train(left_open, tmp_path, resume_changes=["optim.epochs"])["step"] == 6
    assert config.load(tmp_path / "config.json").optim.warmup_steps == 100
    assert load_model(tmp_path, "best").step == 6
