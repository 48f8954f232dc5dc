"""Configuration: presets, round trip through JSON, clear refusals."""

import argparse
import dataclasses
import functools
import json
import re
import runpy
from pathlib import Path

import pytest

from gcl_jax import config, paths
from gcl_jax.config import DataConfig, LossConfig, ObjectivesConfig, TrainConfig
from gcl_jax.data.sampling import KINDS
from gcl_jax.errors import ConfigError, UserError
from gcl_jax.losses.objectives import check_config
from gcl_jax.models import presets
from gcl_jax.prepare.stores import directory_of
from gcl_jax.train.flags import override, parse, read_config, take_overrides
from gcl_jax.validation import unused, validate

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    cfg = runpy.run_path(str(path))["get_config"]()
    validate(cfg)
    check_config(cfg)


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if "SigLIP" in name])
def test_the_template_of_siglip_takes_every_size(name):
    cfg = read_config(f"configs/finetune_siglip.py:{name}")
    validate(cfg)
    assert cfg.model == presets.preset(name)
    assert cfg.init_from == f"timm/{name}"


def test_json_round_trip(tmp_path):
    cfg = TrainConfig(model=presets.preset("ViT-B-16"))
    cfg.loss.pair_weights = {"query:image": 0.25}
    config.save(cfg, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == cfg


def test_preset_is_a_copy():
    presets.preset("ViT-L-14").vision.width = 1
    assert presets.preset("ViT-L-14").vision.width == 1024


def test_unknown_preset_and_key_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"ViT-Z-1.* near are ViT-"):
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
        ("data.sampler", "scores", "must be one of .*; did you mean 'score'"),
        ("loss.score_to_weight", "cubic", "must be one of \\('constant'"),
        ("loss.objectives", ObjectivesConfig(gcl=0.0), "all weights are 0"),
        ("loss.objectives.fused", -1.0, "weight of 0 or more"),
        ("loss.objectives.gcl", float("nan"), "weight of 0 or more"),
        ("loss.listnet.temperature", -0.1, "0 or more"),
        ("loss.listmle.levels", 0, "from 1 to 100"),
        ("loss.rince.levels", 0, "from 1 to 100"),
        ("loss.rince.spread", 0.5, "1 or more"),
        ("loss.circle.margin", 1.0, "0 or more, below 1"),
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


SIZES = [one for one in config.described() if one.key.startswith("model.") and one.type is int]


@pytest.mark.parametrize("one", SIZES, ids=lambda one: one.key)
def test_absurd_sizes_are_refused(one):
    """At once: 10**12 layers took forever."""
    for size in (10**12, 2**31 - 1):
        cfg = TrainConfig()
        *path, name = one.key.split(".")
        setattr(functools.reduce(getattr, path, cfg), name, size)
        with pytest.raises(ConfigError, match=rf"config\.{one.key}={size} must be from \d+ to \d+"):
            validate(cfg)


def test_an_option_of_an_objective_without_weight_is_refused():
    objectives = ObjectivesConfig(gcl=0.0, fused=1.0)
    cfg = TrainConfig(loss=LossConfig(objectives, weight_norm="mean"))
    with pytest.raises(ConfigError, match=r"loss\.weight_norm='mean' is of loss\.objectives"):
        validate(cfg)
    cfg.loss.weight_norm = "none"
    validate(cfg)


@pytest.mark.parametrize(
    ("flag", "owner"),
    [
        ("data.batch_of=all_stores", "data.stores, which names none"),
        ("data.num_negatives=2", "data.negatives and data.text_negatives"),
        ("data.refresh_every=5", "data.negatives='refresh', which is ''"),
        ("data.refresh_margin=0.1", "data.negatives='refresh', which is ''"),
        ("loss.list_size=8", "loss.objectives roar, lambdaloss and distill"),
        ("loss.distill_from=x", "loss.objectives.distill, whose weight is 0"),
        ("loss.unimodal.fields=title", "loss.objectives.unimodal, whose weight is 0"),
        ("loss.hard_negatives.hardness=5", "loss.objectives.hard_negatives, whose weight is 0"),
    ],
)
def test_a_flag_of_what_is_not_there_is_refused(flag, owner):
    key = flag.partition("=")[0]
    given = ["--config=configs/own_data.py", f"--config.{flag}"]
    with pytest.raises(ConfigError, match=re.escape(f"config.{key} is of {owner}")) as error:
        parse(argparse.ArgumentParser(), given)
    assert "\n" not in str(error.value)


def test_an_option_of_a_file_may_have_no_effect():
    """A flag takes away what it belongs to; a run's file may be of other defaults."""
    flags = [f"--config.loss.objectives.{name}" for name in ("one_to_k=0", "gcl=1")]
    _, cfg = parse(argparse.ArgumentParser(), ["--config=configs/emoji_languages.py", *flags])
    assert list(unused(cfg)) == ["loss.one_to_k.text_to_text"]


def test_stores_stand_in_place_of_the_store_of_the_file(tmp_path):
    stores = [("data.stores.a", "1"), ("data.stores.b", "2")]
    cfg = read_config("configs/own_data.py", stores)
    assert (cfg.data.store, cfg.data.stores) == ("", {"a": 1, "b": 2})
    validate(cfg)
    with pytest.raises(ConfigError, match=r"data\.store='x' and data\.stores.*leave one out"):
        validate(read_config("configs/own_data.py", [*stores, ("data.store", "x")]))
    (file := tmp_path / "both.py").write_text(
        "from gcl_jax.config import *\n"
        "def get_config(): return TrainConfig(data=DataConfig(stores={'a': 1, 'b': 1}))\n"
    )
    assert read_config(str(file), [("data.store", "emoji")]).data.named == "emoji"
    with pytest.raises(ConfigError, match=r"config\.data\.store is empty: name a folder"):
        validate(read_config(str(file), [("data.store", "")]))


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


def cfg_with(*flags: str) -> TrainConfig:
    rest, overrides = take_overrides([*flags, "--workdir=x"])
    assert rest == ["--workdir=x"]
    cfg = TrainConfig()
    for key, text in overrides:
        override(cfg, key, text)
    return cfg


def test_options_are_set_from_texts():
    cfg = cfg_with(
        "--config.optim.lr=3e-4",
        "--config.optim.steps",
        "7",
        "--config.data.unique_queries",
        "--noconfig.model.text.causal",
        "--config.optim.betas=0.8,0.95",
        '--config.optim.freeze=("visual","text")',
        "--config.eval.splits=in_domain,zero_shot",
        "--config.model.init_logit_bias=-10",
        "--config.data.store=123",
    )
    assert (cfg.optim.lr, cfg.optim.steps, cfg.data.unique_queries) == (3e-4, 7, True)
    assert cfg.model.text.causal is False
    assert cfg.optim.betas == (0.8, 0.95)
    assert cfg.optim.freeze == ("visual", "text")
    assert cfg.eval.splits == ("in_domain", "zero_shot")
    assert cfg.model.init_logit_bias == -10
    assert cfg.data.store == "123"
    validate(cfg)


def test_entries_of_a_dict_that_the_file_does_not_name_are_set():
    cfg = cfg_with(
        "--config.data.document_fields.image=0.9",
        "--config.data.document_fields.alt.text=0.1",
        "--config.loss.pair_weights.query:image=2",
        "--config.loss.objectives.sigmoid=0.5",
        "--config.data.query_fields={'en': 1, 'de': 2}",
        "--config.optim.options.nesterov=True",
    )
    assert cfg.data.document_fields == {"image": 0.9, "alt.text": 0.1}
    assert cfg.loss.pair_weights == {"query:image": 2}
    assert cfg.loss.objectives == {"gcl": 1.0, "sigmoid": 0.5}
    assert cfg.loss.objectives.sigmoid == 0.5
    assert cfg.data.query_fields == {"en": 1, "de": 2}
    assert cfg.optim.options == {"nesterov": True}


def test_models_and_their_parts_are_set_by_preset():
    cfg = cfg_with("--config.model.dtype=bfloat16", "--config.model=ViT-L-14")
    assert cfg.model == dataclasses.replace(presets.preset("ViT-L-14"), dtype="bfloat16")
    cfg = cfg_with("--config.model.text=all-MiniLM-L6-v2", "--config.model.vision=none")
    assert cfg.model.text == presets.preset("all-MiniLM-L6-v2").text
    assert cfg.model.vision is None


def test_the_model_comes_before_its_options_wherever_it_stands(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from gcl_jax.config import TrainConfig as get_config\n")
    texts = [("model.vision.width", "64"), ("model", "ViT-B-16"), ("model.vision", "ViT-L-14")]
    cfg = read_config(str(path), texts)
    assert (cfg.model.vision.width, cfg.model.vision.layers) == (64, 24)
    assert cfg.model.text == presets.preset("ViT-B-16").text


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("optim.lerning_rate=1", "did you mean config.optim.layer_decay?"),
        ("optim.lr=abc", "config.optim.lr='abc' must be a number; write for example"),
        ("optim.steps=1.5", "must be a whole number"),
        ("optim.betas=3", "must be a tuple of 2 numbers; write for example --config.optim.betas="),
        ("optim.betas=(1,2,3)", "must be a tuple of 2 numbers"),
        ("optim.lr.x=3", "lr has no parts"),
        ("optim=adam", "it has options of its own: set one, such as --config.optim.lr=..."),
        ("lr=1", "did you mean config.optim.lr?"),
        ("modle=ViT-B-32", "did you mean config.model?"),
        ("data.document_fields=x", "write for example --config.data.document_fields.image=0.9"),
        ("model=ViT-B-33", "config.model=ViT-B-33: "),
        ("data.document_fields=image", "must be a dict of names and weights"),
        ("data.document_fields.image=much", "must be a number"),
        ("data.unique_queries=maybe", "must be True or False"),
    ],
)
def test_a_wrong_text_is_answered_in_one_line(flag, message):
    with pytest.raises(ConfigError) as error:
        cfg_with(f"--config.{flag}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"write --config\.optim\.lr=VALUE"):
        take_overrides(["--config.optim.lr"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.betas", 3),
        ("optim.betas", ("a",)),
        ("optim.betas", (2.0, 2.0)),
        ("optim.freeze", (1,)),
        ("optim.weight_decay", -1.0),
        ("optim.eps", float("nan")),
        ("optim.lr", True),
        ("seed", -1),
        ("seed", 2**31),
        ("model.preprocess.mean", (2.0, 2.0)),
        ("model.init_logit_scale", -float("inf")),
        ("model.text", None),
        ("data.document_fields", {1: 1.0}),
        ("loss.merged", -1.0),
        ("loss.thresholds", ("x",)),
        ("hang_seconds", 1e12),
        ("extensions", "my_module"),
    ],
)
def test_values_of_a_wrong_type_or_without_sense_are_refused(key, value):
    cfg = TrainConfig()
    *path, name = key.split(".")
    setattr(functools.reduce(getattr, path, cfg), name, value)
    with pytest.raises(ConfigError, match=rf"config\.{re.escape(key)}") as error:
        validate(cfg)
    assert "\n" not in str(error.value)


def test_names_of_the_first_version_are_understood(tmp_path):
    cfg = cfg_with("--config.sick.patience=3", "--config.optim.chunks=4")
    assert (cfg.nonfinite.patience, cfg.optim.grad_cache_chunks) == (3, 4)
    cfg.sick.patience, cfg.optim.chunks = 5, 2
    assert (cfg.nonfinite.patience, cfg.optim.grad_cache_chunks) == (5, 2)
    saved = dataclasses.asdict(cfg)
    saved["sick"], saved["optim"]["chunks"] = saved.pop("nonfinite"), 8
    del saved["optim"]["grad_cache_chunks"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = config.load(tmp_path / "config.json")
    assert (loaded.nonfinite.patience, loaded.optim.grad_cache_chunks) == (5, 8)


def test_score_weights_are_those_that_can_be_chosen():
    assert config.choices("loss.score_to_weight") == KINDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 1", "must return a gcl_jax.TrainConfig"),
        ("import nothing_like_this", "ModuleNotFoundError: No module named"),
        ("x = (", "SyntaxError"),
        ("def get_config(size): pass", "TypeError"),
    ],
)
def test_a_config_file_that_fails_is_answered_in_one_line(text, message, tmp_path):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_config(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no path"),
        ("a\0b", "is no path"),
        (Path("gs://b/x"), "gs:/b/x is no address; write gs://BUCKET/PATH"),
        ("gs://b//x", "gs://b//x is no address"),
        ("s3://b/../x", "s3://b/../x is no address"),
        ("https://a.b/c", "addresses of this kind .https://. are not read or written; give a path"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x: "),
        ("file/x", "file/x cannot be made: .*file is a file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_no_output_can_be_written_to_is_refused(tmp_path, monkeypatch, text, said):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        paths.output_path(text)


def test_paths_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert paths.output_path("~/new/x") == tmp_path / "new/x"
    assert str(paths.local_path("runs/run:1")) == "runs/run:1"
    (tmp_path / "new").mkdir(mode=0o500)
    assert paths.output_path("~/new") == tmp_path / "new", "which may be finished"


def test_a_store_a_run_and_negatives_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory_of("~/store") == tmp_path / "store"
    with pytest.raises(ConfigError, match=r"config\.data\.negatives: foo://b: addresses"):
        validate(TrainConfig(data=DataConfig(negatives="foo://b")))
    with pytest.raises(ConfigError, match=r"config\.extensions: foo://b: addresses"):
        validate(TrainConfig(extensions=("foo://b",)))
