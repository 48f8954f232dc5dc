"""A checkpoint gives back the same bits on any mesh, or one line that says why not."""

import jax
import numpy as np
import pytest

from gcl_jax import sharding
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.config import CheckpointConfig, MeshConfig
from gcl_jax.errors import DataError
from gcl_jax.optim import make_optimizer
from gcl_jax.state import abstract_model, abstract_state


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


def test_a_parameter_that_the_checkpoint_lacks_is_a_data_error(cfg, workdir):
    target = abstract(cfg)
    extra = {"logit_bias": target.params["logit_scale"]}
    with (
        Checkpointer(workdir, cfg.checkpoint) as checkpointer,
        pytest.raises(DataError, match="no logit_bias"),
    ):
        checkpointer.restore_params(target.params | extra)
