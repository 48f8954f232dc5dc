"""A run starts from another run, or from what `load_pretrained` reads; else it says why not."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from test_finetune import draw_params

from gcl_jax import config, sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.state import TrainState, init_state
from gcl_jax.config import MeshConfig
from gcl_jax.errors import DataError
from gcl_jax.models.clip import abstract_model, abstract_params
from gcl_jax.optim import make_optimizer, with_part
from gcl_jax.port import pretrained
from gcl_jax.train.loop import as_begun, train
from gcl_jax.train.setup import load_init_from, max_logit_scale
from gcl_jax.train.step import MAX_LOGIT_SCALE


@pytest.fixture
def cfg(tiny_config, tmp_path, monkeypatch):
    """Starts from a run at tmp_path that does not exist yet; all parameters are sharded."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2)
    tiny_config.model.text.vocab_size = 64
    tiny_config.init_from = str(tmp_path)
    return tiny_config


MESH = sharding.make_mesh(MeshConfig(4, 2), 8)


def save_run(cfg, params, ema=None):
    folder = Path(cfg.init_from)
    config.save(cfg, folder / "config.json")
    with Checkpointer(folder, cfg.checkpoint) as checkpointer:
        checkpointer.save(3, TrainState(np.int32(3), params, (), ema), {})


def give(monkeypatch, params):
    """Has `load_pretrained` return `params`; it notes what it was asked for."""
    asked = []
    read = lambda source, cfg: asked.append((source, cfg)) or params
    monkeypatch.setattr(pretrained, "load_pretrained", read)
    return asked


def test_from_the_averages_of_a_run(cfg):
    params = draw_params(cfg)
    ema = {"text": jax.tree.map(lambda x: x + 1, params["text"])}
    save_run(cfg, params, ema)
    started = load_init_from(cfg, MESH)
    jax.tree.map(np.testing.assert_array_equal, started, with_part(params, ema))
    expected = abstract_params(cfg.model, MESH)
    assert jax.tree.map(lambda x: x.sharding, started) == jax.tree.map(
        lambda x: x.sharding, expected
    )


@pytest.mark.parametrize("pretrained", [False, True], ids=["run", "pretrained"])
def test_lora_begins_where_its_base_ended(cfg, monkeypatch, pretrained):
    params = draw_params(cfg)
    base = dataclasses.replace(cfg.model)
    if pretrained:
        cfg.init_from = "weights.safetensors"
        asked = give(monkeypatch, params)
    else:
        save_run(cfg, params)
    cfg.model = dataclasses.replace(cfg.model, lora_rank=2)
    tx = make_optimizer(cfg.optim, 1, abstract_model(cfg.model)[1])
    state = init_state(cfg, tx, MESH, load_init_from(cfg, MESH))
    flat = traverse_util.flatten_dict(jax.device_get(state.params), sep=".")
    for name, x in traverse_util.flatten_dict(params, sep=".").items():
        np.testing.assert_array_equal(flat.pop(name), x, err_msg=name)
    assert {name.rpartition(".")[2] for name in flat} == {"lora_a", "lora_b"}
    assert all((x == 0).all() == name.endswith("lora_b") for name, x in flat.items())
    if pretrained:
        assert asked == [("weights.safetensors", base)]


def test_pretrained_weights_take_the_models_dtype_and_lack_no_more_than_a_temperature(
    cfg, monkeypatch
):
    params = draw_params(cfg)
    del params["logit_scale"]
    give(monkeypatch, params)
    cfg.model.param_dtype = "bfloat16"
    started = load_init_from(cfg, MESH)
    to_bfloat16 = lambda x: x.astype(ml_dtypes.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, started, jax.tree.map(to_bfloat16, params))
    kernel = started["text"]["transformer"]["blocks"]["attn"]["in_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 16, 48 // 2)

    del params["text"]["token_embedding"]
    params["visual"]["proj"] = np.zeros((16, 4), np.float32)
    params["head"] = np.zeros(3, np.float32)
    message = (
        r"no text.token_embedding; surplus head; visual.proj has shape \(16, 4\), not \(16, 16\)"
    )
    with pytest.raises(DataError, match=message):
        load_init_from(cfg, MESH)


def test_a_run_of_another_shape_is_refused(cfg):
    save_run(cfg, draw_params(cfg))
    cfg.model.text.layers = 3
    with pytest.raises(DataError, match="kernel has shape") as refusal:
        load_init_from(cfg, MESH)
    assert "\n" not in str(refusal.value)


def test_a_run_without_a_checkpoint_is_refused(cfg):
    save_run(cfg, draw_params(cfg))
    for folder in Path(cfg.init_from, "checkpoints").iterdir():
        folder.rename(Path(cfg.init_from) / "elsewhere")
    with pytest.raises(DataError, match="holds no complete checkpoint"):
        load_init_from(cfg, MESH)


@pytest.mark.parametrize(
    ("asked", "initial", "found", "expected"),
    [
        (None, 2.0, None, MAX_LOGIT_SCALE),
        (None, 2.0, 4.0, MAX_LOGIT_SCALE),
        (None, 2.0, np.log(112.3), np.log(112.3)),
        (None, 5.0, None, 5.0),  # a preset, trained anew
        (4.0, 2.0, np.log(112.3), 4.0),
    ],
)
def test_a_temperature_above_100_is_its_own_bound(cfg, capsys, asked, initial, found, expected):
    cfg.model.max_logit_scale, cfg.model.init_logit_scale = asked, initial
    start = {} if found is None else {"logit_scale": jnp.float32(found)}
    assert max_logit_scale(cfg.model, start) == pytest.approx(expected)
    told = f"the logit scale starts at {np.exp(expected):.4g}, above 100: that is its bound"
    assert (told in capsys.readouterr().err) == (expected > MAX_LOGIT_SCALE)


@pytest.mark.slow
def test_a_run_keeps_an_imported_temperature(tiny_config, tiny_store, tmp_path):
    """And one that starts from that run; and that run, when it goes on."""
    cfg = tiny_config
    params = draw_params(cfg) | {"logit_scale": np.log(np.float32(112.3))}
    cfg.init_from = str(tmp_path / "imported")
    save_run(cfg, params)
    cfg.data.store, cfg.optim.steps, cfg.optim.warmup_steps = str(tiny_store.directory), 3, 1
    cfg.optim.lr, cfg.log_every = 1e-6, 1
    for name in ("first", "second"):
        workdir = tmp_path / name
        assert train(cfg, workdir)["logit_scale"] == pytest.approx(112.3, rel=1e-4)
        bound = config.load(workdir / "config.json").model.max_logit_scale
        assert bound == pytest.approx(np.log(112.3), rel=1e-4)
        assert as_begun(cfg, workdir).model.max_logit_scale == bound
        assert train(cfg, workdir, resume_changes=["optim.steps"])["step"] == 3
        cfg.init_from = str(workdir)
