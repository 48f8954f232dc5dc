"""A checkpoint gives back the same bits on any mesh, or one line that says why not."""

import jax
import numpy as np
import pytest

from gcl_jax import sharding
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.config import CheckpointConfig, MeshConfig
from gcl_jax.errors import DataError
from gcl_jax.optim import make_optimizer
from gcl_jax.state import abstract_model, abstract_state, averaged_params


@pytest.fixture
def cfg(tiny_config, monkeypatch):
    """Small arrays, all of them sharded where a mesh has an fsdp axis."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2)
    tiny_config.model.text.vocab_size = 64
    tiny_config.checkpoint = CheckpointConfig(keep=1)
    return tiny_config


def abstract(cfg, mesh=None):
    tx = make_optimizer(cfg.optim, 10, abstract_model(cfg.model)[1])
    return abstract_state(cfg, tx, sharding.make_mesh(mesh or MeshConfig(), 8))


def random_state(cfg, seed):
    """A state of random bits of its dtypes, on 8 x 1 devices."""
    rng = np.random.default_rng(seed)
    bits = lambda x: rng.normal(size=x.shape, scale=100).astype(x.dtype)
    return jax.tree.map(lambda x: jax.device_put(bits(x), x.sharding), abstract(cfg))


@pytest.fixture
def workdir(cfg, tmp_path):
    """Of a run that saved at steps 3 and 9 and keeps one checkpoint."""
    with Checkpointer(tmp_path, cfg.checkpoint) as checkpointer:
        for step in (3, 9):
            checkpointer.save(step, random_state(cfg, step), {"position": 8 * step})
    return tmp_path


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(4, 2)], ids=["8x1", "4x2"])
def test_the_newest_checkpoint_comes_back_bit_for_bit_on_any_mesh(cfg, workdir, mesh):
    target, saved = abstract(cfg, mesh), random_state(cfg, 9)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        assert checkpointer.latest_step() == 9
        state, position = checkpointer.restore(target)
        params = checkpointer.restore_params(target.params)
    assert position == {"position": 72}
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    jax.tree.map(np.testing.assert_array_equal, params, saved.params)
    placement = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert placement(state) == placement(target)
    assert placement(params) == placement(target.params)


def test_only_the_newest_stay(workdir):
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["9"]


def assert_refused(workdir, cfg, message):
    """Both ways of restoring answer with one line."""
    target = abstract(cfg)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        for restore, what in (
            (checkpointer.restore, target),
            (checkpointer.restore_params, target.params),
        ):
            with pytest.raises(DataError, match=message) as refusal:
                restore(what)
            assert "\n" not in str(refusal.value)


def test_no_checkpoint_is_a_data_error(cfg, tmp_path):
    assert_refused(tmp_path, cfg, "no complete checkpoint")


@pytest.mark.parametrize(("part", "key"), [("vision", "layers"), ("text", "width")])
def test_a_changed_model_is_a_data_error(cfg, workdir, part, key):
    section = getattr(cfg.model, part)
    setattr(section, key, 2 * getattr(section, key))
    assert_refused(workdir, cfg, r"checkpoints/9 does not fit this configuration.*shape")


def test_missing_and_surplus_parameters_are_all_named(cfg, workdir):
    target = abstract(cfg).params
    target["logit_bias"] = target.pop("logit_scale")
    target["text"]["extra"] = target["text"].pop("token_embedding")
    with (
        Checkpointer(workdir, cfg.checkpoint) as checkpointer,
        pytest.raises(DataError, match="fit this configuration") as refusal,
    ):
        checkpointer.restore_params(target)
    for problem in (
        "no logit_bias",
        "surplus logit_scale",
        "no text.extra",
        "surplus text.token_embedding",
    ):
        assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(4, 2)], ids=["8x1", "4x2"])
def test_moving_averages_come_back_and_replace_the_parameters(cfg, tmp_path, mesh):
    """Of the text tower alone: the image tower is frozen and has none."""
    cfg.optim.ema_decay, cfg.optim.freeze = 0.9, ("visual",)
    saved, target = random_state(cfg, 1), abstract(cfg, mesh)
    with Checkpointer(tmp_path, cfg.checkpoint) as checkpointer:
        checkpointer.save(1, saved, {})
        checkpointer._manager.wait_until_finished()
        state, _ = checkpointer.restore(target)
        params = checkpointer.restore_params(target.params)
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    placement = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert placement(state) == placement(target)
    assert placement(params) == placement(target.params)
    jax.tree.map(np.testing.assert_array_equal, params["visual"], saved.params["visual"])
    jax.tree.map(np.testing.assert_array_equal, params["text"], saved.ema["text"])
    jax.tree.map(np.testing.assert_array_equal, params, averaged_params(saved))


def test_a_checkpoint_without_moving_averages_is_refused_by_a_run_that_keeps_them(cfg, workdir):
    cfg.optim.ema_decay = 0.9
    with (
        Checkpointer(workdir, cfg.checkpoint) as checkpointer,
        pytest.raises(DataError, match="does not fit this configuration") as refusal,
    ):
        checkpointer.restore(abstract(cfg))
    assert "\n" not in str(refusal.value)
