"""A tower of each kind from outside of the package: one file and one registration each."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gcl_jax import registry, sharding
from gcl_jax.checkpoints.state import init_state
from gcl_jax.config import MeshConfig
from gcl_jax.errors import ConfigError
from gcl_jax.losses.objectives import check_config
from gcl_jax.models.clip import abstract_model
from gcl_jax.models.flops import tower_flops
from gcl_jax.optim import lr_multipliers
from gcl_jax.port.convert import from_state_dict, to_state_dict
from gcl_jax.port.pretrained import export_pretrained
from gcl_jax.train.loop import train
from gcl_jax.train.setup import make_training
from gcl_jax.validation import validate

MODULE = Path(__file__).with_name("own_towers.py")


@pytest.fixture
def own(tiny_config, tiny_store, monkeypatch):
    """`tiny_config` with the two towers, which are unknown again after the test."""
    for towers in (registry.VISION_TOWERS, registry.TEXT_TOWERS):
        assert dict(towers), "all built-in ones are loaded"
        for name in ("_homes", "_things"):
            monkeypatch.setattr(towers, name, dict(getattr(towers, name)))
    monkeypatch.setattr(registry, "extensions", {})
    registry.load_extensions([str(MODULE)])
    cfg = tiny_config
    cfg.data.store = str(tiny_store.directory)
    cfg.model.vision.family, cfg.model.vision.options = "pixels", {"hidden": 32}
    cfg.model.text.family, cfg.model.text.context_length = "bag", 24
    cfg.optim.layer_decay, cfg.optim.steps = 0.5, 2
    return cfg


@pytest.mark.parametrize("fsdp", [1, 2])
def test_towers_of_ones_own_train(own, tmp_path, capsys, fsdp):
    own.mesh = MeshConfig(data=-1, fsdp=fsdp)
    assert np.isfinite(train(own, tmp_path / "run")["loss"])
    # Queries are cut to the longest, as padding is ignored; titles lie beside images.
    assert "query field 'query': 8 of 24 tokens" in capsys.readouterr().err


def test_their_embeddings_are_the_bottom_layer(own):
    multipliers = lr_multipliers(own.optim, abstract_model(own.model)[1])
    factors = {name: float(x) for name, x in multipliers.items()}
    assert factors == {
        "visual.first": 0.5,
        "visual.second": 1.0,
        "text.words": 0.5,
        "text.proj": 1.0,
        "logit_scale": 1.0,
    }


def test_their_tables_of_tokens_are_split_by_columns(own):
    """And give the same loss as whole ones."""
    losses = {}
    for fsdp in (1, 8):
        own.mesh = MeshConfig(data=-1, fsdp=fsdp)
        training = make_training(own)
        state = init_state(training.cfg, training.tx, training.mesh)
        batch = training.to_devices(next(iter(training.batches)))
        losses[fsdp] = float(training.train_step(state, batch)[1]["loss"])
    assert losses[8] == pytest.approx(losses[1], rel=1e-5)
    shapes = abstract_model(own.model)[1]
    spec = sharding.param_shardings(shapes, training.mesh)["text"]["words"].spec
    assert spec == P(None, "fsdp")


def test_towers_without_tokens_are_told(own):
    own.loss.objectives.filip = 1.0
    with pytest.raises(ConfigError, match=r"vision\.family=pixels: loss\.objectives\.filip needs"):
        check_config(own)
    own.model.vision = None
    with pytest.raises(ConfigError, match=r"text\.family=bag: .*, which this tower does not give"):
        check_config(own)


def test_what_they_declare_is_asked(own):
    assert tower_flops(own.model, "image") == 2 * 32 * (3 * 16**2 + 16)
    assert tower_flops(own.model, "text", tokens=8) == 2 * 16 * (8 + 16)
    validate(own)
    own.model.vision.options = {}
    with pytest.raises(ConfigError, match=r"model\.vision\.options must say"):
        validate(own)


def test_a_family_that_is_not_registered_is_named(tiny_config):
    tiny_config.model.text.family = "gru"
    with pytest.raises(
        ConfigError, match=r"model\.text\.family='gru' must be .*'bert'.*config.extensions"
    ):
        validate(tiny_config)


def test_they_are_written_and_read_under_our_own_names(own, tmp_path):
    rng = np.random.default_rng(0)
    shapes = abstract_model(own.model)[1]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    weights = to_state_dict(params, own.model, "gcl_jax")
    assert set(weights) >= {"visual.first", "text.words"}
    again = from_state_dict(weights, own.model)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    with pytest.raises(ConfigError, match="no tower of family bag or pixels"):
        export_pretrained(params, own.model, tmp_path / "out", "hugging_face")


def test_what_workers_and_checks_ask_of_a_family_needs_no_jax():
    code = (
        "import sys\n"
        "from gcl_jax.config import TextConfig\n"
        "from gcl_jax.models import families, flops, presets\n"
        "from gcl_jax.registry import TEXT_TOWERS\n"
        "assert TEXT_TOWERS['clip'].ignores_padding(TextConfig())\n"
        "flops.tower_flops(presets.preset('ViT-B-32'), 'image')\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
