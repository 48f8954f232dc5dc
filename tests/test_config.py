"""Configuration: presets, round trip through JSON, clear refusals."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from gcl_jax import config
from gcl_jax.config import LossConfig, ObjectivesConfig, TrainConfig
from gcl_jax.errors import ConfigError
from gcl_jax.models import presets
from gcl_jax.validation import validate

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    validate(runpy.run_path(str(path))["get_config"]())


def test_json_round_trip(tmp_path):
    cfg = TrainConfig(model=presets.preset("ViT-B-16"))
    cfg.loss.pair_weights = {"query:image": 0.25}
    config.save(cfg, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == cfg


def test_preset_is_a_copy():
    presets.preset("ViT-L-14").vision.width = 1
    assert presets.preset("ViT-L-14").vision.width == 1024


def test_unknown_preset_and_key_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="ViT-B-32"):
        presets.preset("ViT-Z-1")
    with pytest.raises(ConfigError, match="no key lerning_rate"):
        config.from_dict(config.OptimConfig, {"lerning_rate": 1.0})
    with pytest.raises(ConfigError, match="not found"):
        config.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.vision.patch_size", 225, "larger than the image"),
        ("model.text.width", 500, "no multiple of heads=8"),
        ("model.dtype", "float16", "must be one of"),
        ("data.document_fields", {"image": float("nan")}, "weight of 0 or more"),
        ("data.document_fields", {"image": 0.0}, "all weights are 0"),
        ("model.preprocess.interpolation", "nearest", "must be one of"),
        ("model.preprocess.resize_mode", "crop", "must be one of"),
        ("model.preprocess.fill_color", 256, "from 0 to 255"),
        ("data.augmentation", "mixup", "must be one of"),
        ("data.sampler", "scores", "must be one of"),
        ("loss.score_to_weight", "cubic", "must be one of \\('constant'"),
        ("loss.objectives", ObjectivesConfig(gcl=0.0), "all weights are 0"),
        ("loss.objectives.fused", -1.0, "weight of 0 or more"),
        ("loss.objectives.gcl", float("nan"), "weight of 0 or more"),
        ("loss.listnet.temperature", -0.1, "0 or more"),
        ("loss.listmle.levels", 0, "1 or more"),
        ("loss.rince.levels", 0, "1 or more"),
        ("loss.rince.spread", 0.5, "1 or more"),
        ("loss.one_to_k.text_to_text", -0.5, "0 or more"),
        ("loss.hard_negatives.max_margin", -1.0, "0 or more"),
        ("loss.mixed.temperature", 0.0, "above 0"),
        ("loss.mixed.beta", 0.0, "above 0"),
        ("optim.batch_size", 1, "no negatives"),
        ("optim.lr", 0.0, "above 0"),
        ("checkpoint.every", 0, "1 or more"),
    ],
)
def test_what_cannot_work_is_refused_by_name(key, value, message):
    cfg = TrainConfig()
    *path, name = key.split(".")
    holder = cfg
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, name, value)
    with pytest.raises(ConfigError, match=message) as error:
        validate(cfg)
    assert f"config.{key}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoid", {}, "config.model.init_logit_bias must be set for loss.objectives.sigmoid"),
        ("bixse", {}, "config.model.init_logit_bias must be set for loss.objectives.bixse"),
        ("listnet", {}, "config.loss.targets must be 'known' for loss.objectives.listnet"),
        ("listmle", {}, "config.loss.targets must be 'known' for loss.objectives.listmle"),
        ("rince", {}, "config.loss.targets must be 'known' for loss.objectives.rince"),
        ("fused", {"weight_norm": "mean"}, "config.loss.weight_norm='mean' is of loss.objectives"),
    ],
)
def test_what_an_objective_needs_is_named(name, options, message):
    cfg = TrainConfig(loss=LossConfig(ObjectivesConfig(gcl=0.0, **{name: 1.0}), **options))
    with pytest.raises(ConfigError, match=message) as error:
        validate(cfg)
    assert "\n" not in str(error.value)
    cfg.model.init_logit_bias, cfg.loss.targets, cfg.loss.weight_norm = -10.0, "known", "none"
    validate(cfg)


def test_presets_clean_texts_as_their_models_were_trained():
    """open_clip's cleaning for its own models, none for those of sentence-transformers."""
    kinds = ("ViT-B-32", "ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32", "all-MiniLM-L6-v2")
    cleaning = [presets.preset(name).text.clean for name in kinds]
    assert cleaning == ["", "canonicalize", "", "none"]


def test_dataclasses_are_slotted():
    with pytest.raises(AttributeError):
        TrainConfig().lerning_rate = 1.0
    assert dataclasses.is_dataclass(TrainConfig)


@pytest.mark.parametrize(("key", "value"), [("sampler", "score"), ("unique_queries", True)])
def test_samplers_that_exclude_each_other_are_refused(key, value):
    cfg = config.TrainConfig()
    cfg.data.pairs_per_query = 2
    setattr(cfg.data, key, value)
    with pytest.raises(ConfigError, match=rf"config\.data\.pairs_per_query=2 .*{key}") as error:
        validate(cfg)
    assert "\n" not in str(error.value)
