"""Opening a run: which of its checkpoints is read."""

import shutil

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh

from gcl_jax import config
from gcl_jax.checkpoints import state
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.saved import Saved
from gcl_jax.errors import ConfigError, DataError, UserError
from gcl_jax.models import clip
from gcl_jax.optim import make_optimizer
from gcl_jax.runs import load_config, load_model, parameters_digest

NDCG = "in_domain/NDCG@10"


@pytest.fixture
def workdir(tiny_config, tmp_path):
    """Checkpoints 1 to 3, of which 2 is the best; all of logit_scale is its step."""
    cfg, mesh = tiny_config, make_cpu_mesh(8, 1)
    cfg.checkpoint.best = NDCG
    config.save(cfg, tmp_path / "config.json")
    tx = make_optimizer(cfg.optim, 4, clip.abstract_model(cfg.model)[1])
    trained = state.init_state(cfg, tx, mesh)
    with Checkpointer(tmp_path, cfg.checkpoint, config=cfg) as checkpointer:
        for step, ndcg in enumerate((0.1, 0.3, 0.2), 1):
            trained.params["logit_scale"] = jax.device_put(
                np.float32(step), trained.params["logit_scale"].sharding
            )
            checkpointer.save(step, trained, {}, {NDCG: ndcg})
    return tmp_path


def test_the_newest_the_best_or_a_step_is_read(workdir):
    seen = set()
    for checkpoint, expected in (("newest", 3), ("best", 2), ("1", 1)):
        _, params, _, step = load_model(workdir, checkpoint)
        assert (step, float(params["logit_scale"])) == (expected, expected)
        seen.add(parameters_digest(params))
    assert len(seen) == 3
    with pytest.raises(DataError, match="has no checkpoint of step 7; it has 1, 2, 3"):
        load_model(workdir, "7")
    with pytest.raises(UserError, match="--checkpoint=last must be newest, best or a step"):
        load_model(workdir, "last")


def test_a_config_that_is_damaged_or_gone_is_read_from_the_newest_checkpoint(workdir, capsys):
    path = workdir / "config.json"
    cfg, good = config.load(path), path.read_bytes()
    (workdir / "checkpoints/3/about/metadata").write_text("{")
    for damaged in (
        b"\xff",
        b"null",
        b"[]",
        good[:-9],
        good.replace(b"embed_dim", b"embed_din"),
        None,
    ):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        found, _, _, step = load_model(workdir)
        assert (found, step) == (cfg, 2)
        assert f"warning: {path}" in (told := capsys.readouterr().err)
        assert "the configuration of the newest checkpoint is taken" in told
        path.write_bytes(good)
    shutil.rmtree(workdir / "checkpoints")
    path.write_bytes(b"null")
    with pytest.raises(ConfigError, match="must hold the keys of TrainConfig"):
        load_config(workdir)


def test_a_config_of_another_model_than_the_checkpoints_is_refused(workdir):
    cfg = config.load(workdir / "config.json")
    cfg.model.text.heads = 4
    config.save(cfg, workdir / "config.json")
    message = r"config.json says model.text.heads=4, and the run was trained with 2; restore that"
    with pytest.raises(ConfigError, match=message):
        load_model(workdir)


def test_a_checkpoint_copied_to_another_step_is_refused(workdir, capsys):
    shutil.copytree(workdir / "checkpoints/1", workdir / "checkpoints/7")
    with pytest.raises(DataError, match="checkpoints/7 is damaged: it is a copy of step 1"):
        load_model(workdir, "7")
    assert load_model(workdir).step == 3
    assert "checkpoints/7 is damaged and passed over" in capsys.readouterr().err


def test_the_step_is_that_of_the_parameters_though_the_run_goes_on(workdir, monkeypatch):
    read = Saved.read

    def read_while_another_is_saved(saved, wanted):
        shutil.copytree(workdir / "checkpoints/3", workdir / "checkpoints/4")
        return read(saved, wanted)

    monkeypatch.setattr(Saved, "read", read_while_another_is_saved)
    assert load_model(workdir).step == 3
