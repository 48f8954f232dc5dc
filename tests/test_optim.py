"""Schedules, optimizers by name, the decay mask, and AdamW against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from gcl_jax import optim, registry
from gcl_jax.config import ModelConfig, OptimConfig, TextConfig, VisionConfig
from gcl_jax.errors import ConfigError
from gcl_jax.models.clip import abstract_model
from gcl_jax.models.presets import preset
from gcl_jax.optim import (
    decayed,
    lr_multipliers,
    lr_schedule,
    make_optimizer,
    total_steps,
    updates_done,
)
from gcl_jax.registry import OPTIMIZERS


@pytest.mark.parametrize(
    ("cfg", "pairs", "steps"),
    [
        (OptimConfig(steps=7), 10_000, 7),
        (OptimConfig(epochs=2.0, batch_size=64), 640, 20),
        (OptimConfig(epochs=0.5, batch_size=64), 640, 5),
        (OptimConfig(epochs=1.0, batch_size=64), 3, 1),
    ],
)
def test_total_steps(cfg, pairs, steps):
    assert total_steps(cfg, pairs) == steps


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "expected"),
    [
        (4, 24, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 14: 0.5, 19: 0.5 - 0.125**0.5, 24: 0.0}),
        (0, 10, {0: 1.0, 5: 0.5, 10: 0.0}),
        (9, 3, {0: 0.25, 2: 0.75}),
    ],
    ids=["warm-up and cosine", "no warm-up", "stopped in warm-up"],
)
def test_schedule_warms_up_then_follows_a_cosine_to_zero(warmup_steps, steps, expected):
    schedule = lr_schedule(OptimConfig(lr=1e-3, warmup_steps=warmup_steps), steps)
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), 1e-3 * share, rtol=1e-5, atol=1e-9)


def test_matrices_decay_and_nothing_else():
    """By the names of a real model: one dimension says little where blocks are stacked."""
    _, params = abstract_model(preset("ViT-B-32"))
    mask = traverse_util.flatten_dict(decayed(params), sep=".")
    spared = {name.split(".")[-1] for name, decays in mask.items() if not decays}
    assert spared == {"bias", "scale", "class_embedding", "logit_scale"}
    assert {name.split(".")[-1] for name, decays in mask.items() if decays} == {
        "kernel",
        "patch_embedding",
        "positional_embedding",
        "token_embedding",
        "proj",
    }


@pytest.mark.parametrize("clip_norm", [0.0, 0.5], ids="clip_norm={}".format)
def test_three_steps_follow_adamws_formula(clip_norm):
    cfg = OptimConfig(
        lr=1e-2, warmup_steps=1, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    shapes = {"proj": (3, 2), "bias": (2,), "blocks.kernel": (2, 3, 4), "blocks.scale": (2, 4)}
    decays = {"proj": 1, "bias": 0, "blocks.kernel": 1, "blocks.scale": 0}
    draw = lambda: {name: rng.normal(size=shape) for name, shape in shapes.items()}
    nest = lambda flat: traverse_util.unflatten_dict(jax.tree.map(jnp.float32, flat), sep=".")

    expected = draw()
    first, second = (dict.fromkeys(shapes, 0.0) for _ in range(2))
    params = nest(expected)
    tx, schedule = make_optimizer(cfg, 5, params), lr_schedule(cfg, 5)
    state = tx.init(params)
    for t in range(1, 4):
        gradients = draw()
        updates, state = tx.update(nest(gradients), state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, g in gradients.items():
            g = g * min(1, clip_norm / norm) if clip_norm else g
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            m, v = first[name] / (1 - 0.8**t), second[name] / (1 - 0.9**t)
            step = m / (np.sqrt(v) + 1e-3) + 0.1 * decays[name] * expected[name]
            expected[name] = expected[name] - float(schedule(t - 1)) * step
    for name, x in traverse_util.flatten_dict(params, sep=".").items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_factored_second_moment_follows_adafactors_formula():
    """Of matrices of 128 rows and columns, or more, be they stacked; three steps in float64."""
    cfg = OptimConfig(
        lr=1e-2, warmup_steps=1, weight_decay=0.1, clip_norm=0.0, second_moment="factored"
    )
    rng = np.random.default_rng(0)
    shapes = {"proj": (128, 160), "bias": (160,), "blocks.kernel": (2, 160, 128)}
    decays = {"proj": 1, "bias": 0, "blocks.kernel": 1}
    draw = lambda: {name: rng.normal(size=shape) for name, shape in shapes.items()}
    nest = lambda flat: traverse_util.unflatten_dict(jax.tree.map(jnp.float32, flat), sep=".")

    expected = draw()
    row, column, second, first = (dict.fromkeys(shapes, 0.0) for _ in range(4))
    params = nest(expected)
    tx, schedule = make_optimizer(cfg, 5, params), lr_schedule(cfg, 5)
    state = tx.init(params)
    kept = sum(x.size for x in jax.tree.leaves(state))
    assert kept < 1.05 * sum(map(np.prod, shapes.values())), "the momentum, and little else"
    for t in range(1, 4):
        gradients = draw()
        updates, state = tx.update(nest(gradients), state, params)
        params = optax.apply_updates(params, updates)

        old = 1 - t**-0.8
        for name, g in gradients.items():
            if g.ndim > 1:
                row[name] = old * row[name] + (1 - old) * (g**2).mean(-1, keepdims=True)
                column[name] = old * column[name] + (1 - old) * (g**2).mean(-2, keepdims=True)
                v = row[name] * column[name] / row[name].mean(-2, keepdims=True)
            else:
                v = second[name] = old * second[name] + (1 - old) * g**2
            u = g / np.sqrt(v)
            first[name] = 0.9 * first[name] + 0.1 * u / max(1, np.sqrt((u**2).mean()))
            step = first[name] / (1 - 0.9**t) + 0.1 * decays[name] * expected[name]
            expected[name] = expected[name] - float(schedule(t - 1)) * step
    for name, x in traverse_util.flatten_dict(params, sep=".").items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_momentum_in_bfloat16_takes_half_the_memory_and_little_away():
    params = {"proj": jnp.zeros((64, 64))}
    rng = np.random.default_rng(0)
    gradients = [{"proj": jnp.float32(rng.normal(size=(64, 64)))} for _ in range(5)]
    after = {}
    for dtype in ("float32", "bfloat16"):
        cfg = OptimConfig(lr=1e-2, warmup_steps=0, clip_norm=0.0, momentum_dtype=dtype)
        tx = make_optimizer(cfg, 10, params)
        state, x = tx.init(params), params
        for g in gradients:
            updates, state = tx.update(g, state, x)
            x = optax.apply_updates(x, updates)
        assert optax.tree.get(state, "mu")["proj"].dtype == dtype
        after[dtype] = np.asarray(x["proj"])
    difference = np.abs(after["bfloat16"] - after["float32"]).max()
    assert 0 < difference < 0.01 * np.abs(after["float32"]).max()


def shapes_of(**model):
    """A model of three vision layers and one text layer, without arrays."""
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=3, head_width=8)
    text = TextConfig(context_length=8, vocab_size=8, width=16, heads=2, layers=1)
    return abstract_model(ModelConfig(**{"embed_dim": 16, "vision": vision, "text": text} | model))[
        1
    ]


def test_learning_rates_fall_with_the_distance_from_the_output():
    multipliers = lr_multipliers(OptimConfig(layer_decay=0.5), shapes_of())
    blocks = {name: x for name, x in multipliers.items() if ".blocks." in name}
    assert len(blocks) == 2 * 12
    for name, x in blocks.items():
        expected = [0.125, 0.25, 0.5] if name.startswith("visual") else [0.5]
        np.testing.assert_array_equal(x.ravel(), expected, err_msg=name)
    rest = {name: float(x) for name, x in multipliers.items() if name not in blocks}
    assert rest == {
        **dict.fromkeys(
            [
                "visual.patch_embedding",
                "visual.class_embedding",
                "visual.positional_embedding",
                "visual.ln_pre.scale",
                "visual.ln_pre.bias",
            ],
            0.5**4,
        ),
        **dict.fromkeys(["text.token_embedding", "text.positional_embedding"], 0.5**2),
        **dict.fromkeys(["visual.ln_post.scale", "visual.ln_post.bias", "visual.proj"], 1.0),
        **dict.fromkeys(["text.ln_final.scale", "text.ln_final.bias"], 1.0),
        **dict.fromkeys(["text.projection.kernel", "logit_scale"], 1.0),
    }


def test_every_parameter_of_every_tower_has_its_place():
    """By hand: what BERT's and SigLIP's towers hold besides their blocks."""
    bert = {"family": "bert", "pool": "mean", "proj": "mlp", "tokenizer": "folder"}
    text = TextConfig(context_length=8, vocab_size=8, width=16, heads=2, layers=1, **bert)
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=3, head_width=8, pool="map")
    shapes = shapes_of(text=text, vision=vision, init_logit_bias=-10.0)
    multipliers = lr_multipliers(OptimConfig(layer_decay=0.5), shapes)
    low = {name for name, x in multipliers.items() if x.ndim == 0 and x < 1}
    assert low == {
        "visual.patch_embedding",
        "visual.patch_bias",
        "visual.positional_embedding",
        "text.token_embedding",
        "text.token_type_embedding",
        "text.positional_embedding",
        "text.ln_embedding.scale",
        "text.ln_embedding.bias",
    }
    assert {n.rpartition(".")[0] for n, x in multipliers.items() if x.ndim == 0 and x == 1} == {
        "",
        "text.projection",
        "visual.ln_post",
        "visual.pool",
        *(f"visual.pool.{part}" for part in ("q_proj", "kv_proj", "out_proj", "ln")),
        *(f"visual.pool.mlp.{part}" for part in ("c_fc", "c_proj")),
    }


@pytest.mark.parametrize(
    ("freeze", "left"),
    [
        (("visual",), {"text", "logit_scale"}),
        (("text", "logit_scale"), {"visual"}),
        ((r".*\.(bias|scale|kernel)$", ".*embedding", "logit"), {"visual"}),
    ],
)
def test_frozen_parameters_have_no_multiplier(freeze, left):
    multipliers = lr_multipliers(OptimConfig(freeze=freeze), shapes_of())
    assert {name.partition(".")[0] for name in multipliers} == left


def test_towers_and_layers_have_their_own_share_of_the_rate():
    """As freeze, layer decay and LoRA have it; 0 freezes, and what matches twice has both."""
    shapes, half, layer = shapes_of(), {"visual": 0.5}, r"visual\.transformer\.blocks\.1\."
    plain = lr_multipliers(OptimConfig(layer_decay=0.5), shapes)
    found = lr_multipliers(OptimConfig(layer_decay=0.5, lr_multipliers=half), shapes)
    assert found.keys() == plain.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, plain[name] * (0.5 if name.startswith("visual") else 1))
    twice = lr_multipliers(OptimConfig(lr_multipliers={"visual": 2.0, layer: 0.25}), shapes)
    stacked = next(x for name, x in twice.items() if name.startswith("visual.transformer.blocks."))
    assert stacked.ravel().tolist() == [2.0, 0.5, 2.0]
    for cfg in (OptimConfig(lr_multipliers={"visual": 0.0}), OptimConfig(freeze=("visual",))):
        assert lr_multipliers(cfg, shapes).keys() == {n for n in plain if not n.startswith("visu")}
    with pytest.raises(ConfigError, match=r"^config.optim.lr_multipliers: 'txet' matches no para"):
        lr_multipliers(OptimConfig(freeze=("visual",), lr_multipliers={"txet": 0.5}), shapes)


def test_lora_may_be_frozen_in_part():
    cfg = OptimConfig(freeze=("visual", "logit_scale"))
    multipliers = lr_multipliers(cfg, shapes_of(lora_rank=2))
    assert len(multipliers) == 2 * 4
    assert all(name.startswith("text.transformer.blocks.") for name in multipliers)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("visual", "txet"), "'txet' matches no parameter"),
        (("transformer",), "matches no parameter; their names are like .*blocks"),
        (("visual.transformer.blocks.3",), "blocks.3' matches no parameter"),
        ((".*",), "leaves nothing to train"),
        ("visual", "must be a tuple"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(freeze, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        lr_multipliers(OptimConfig(freeze=freeze), shapes_of())
    assert str(refusal.value).startswith("config.optim.freeze")


def test_updates_follow_the_multipliers_and_frozen_layers_do_not_clip():
    """Against an optimizer that has no layers: Adam's first step is the same for all."""
    rng = np.random.default_rng(0)
    blocks = {"kernel": rng.normal(size=(3, 4, 5))}
    params = jax.tree.map(jnp.float32, {"tower": {"transformer": {"blocks": blocks}, "head": 1.5}})
    gradients = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    kernel = lambda tree: np.asarray(tree["tower"]["transformer"]["blocks"]["kernel"])

    def updates(cfg, gradients):
        tx = make_optimizer(cfg, 10, params)
        return tx.update(gradients, tx.init(params), params)[0]

    plain = updates(OptimConfig(clip_norm=0.5, weight_decay=0.3), gradients)
    decayed_rates = updates(
        OptimConfig(clip_norm=0.5, weight_decay=0.3, layer_decay=0.5), gradients
    )
    shares = np.array([0.125, 0.25, 0.5]).reshape(3, 1, 1)
    np.testing.assert_allclose(kernel(decayed_rates), kernel(plain) * shares, rtol=1e-6)
    assert decayed_rates["tower"]["head"] == plain["tower"]["head"]

    freezing = OptimConfig(clip_norm=0.5, weight_decay=0.3, eps=1.0, freeze=("tower.*blocks.1.",))
    loud = jax.tree.map(jnp.copy, gradients)
    loud["tower"]["transformer"]["blocks"]["kernel"] = jnp.array(kernel(gradients)).at[1].set(1e9)
    frozen = updates(freezing, gradients)
    jax.tree.map(np.testing.assert_array_equal, updates(freezing, loud), frozen)
    assert (kernel(frozen)[1] == 0).all()
    assert (kernel(frozen)[[0, 2]] != 0).all()


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (OptimConfig(schedule="linear"), {0: 0.2, 4: 1.0, 14: 0.5, 24: 0.0}),
        (OptimConfig(schedule="constant"), {0: 0.2, 4: 1.0, 14: 1.0, 24: 1.0}),
        (OptimConfig(schedule="wsd"), {0: 0.2, 4: 1.0, 20: 1.0, 22: 0.5, 24: 0.0}),
        (
            OptimConfig(schedule="wsd", decay_fraction=0.5),
            {3: 0.8, 4: 1.0, 14: 1.0, 19: 0.5, 24: 0.0},
        ),
    ],
    ids=["linear", "constant", "wsd", "wsd 0.5"],
)
def test_other_schedules_warm_up_alike(cfg, expected):
    cfg.lr, cfg.warmup_steps = 1e-3, 4
    schedule = lr_schedule(cfg, 24)
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), 1e-3 * share, rtol=1e-5, atol=1e-9)


def drawn(shapes):
    """Two draws for every dotted name."""
    rng = np.random.default_rng(0)
    draw = lambda: {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    return [traverse_util.unflatten_dict(draw(), sep=".") for _ in range(2)]


BLOCKS = "visual.transformer.blocks"
CONVOLUTION = "visual.layers.0.conv_1"
SHAPES = {f"{BLOCKS}.kernel": (2, 8, 12), f"{BLOCKS}.bias": (2, 12), "visual.proj": (8, 4)}
SHAPES |= {CONVOLUTION: (3, 3, 4, 12), "visual.stem": (3, 3, 3, 4)}


def updates_of(cfg, times=1):
    params, gradients = drawn(SHAPES)
    tx = make_optimizer(cfg, 10, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(times):
        updates, state = update(gradients, state, params)
    assert updates_done(state) == times
    return traverse_util.flatten_dict(jax.device_get(updates), sep=".")


def test_every_optimizer_of_optax_updates_matrices_and_decays_them_alone():
    """But for those whose step depends on the size of the parameters, in the first step decay adds
    the same whatever the optimizer."""
    params = traverse_util.flatten_dict(drawn(SHAPES)[0], sep=".")
    names = {*OPTIMIZERS, *optim._of_optax()}
    assert names >= {"adamw", "adam", "lion", "sgd", "lamb", "adafactor", "muon", "rmsprop"}
    relative = {"lamb", "lars", "dadapt_adamw", "prodigy", "dog", "dowg", "cocob", "adadelta"}
    for name in names:
        with_decay, without = (
            updates_of(OptimConfig(optimizer=name, lr=0.1, warmup_steps=0, weight_decay=decay))
            for decay in (0.5, 0.0)
        )
        for parameter, x in without.items():
            assert np.isfinite(x).all(), name
            assert x.any() or name in ("dog", "adopt"), name
            if name not in relative:
                added = with_decay[parameter] - x
                decay = 0.0 if parameter.endswith("bias") else -0.1 * 0.5 * params[parameter]
                np.testing.assert_allclose(added, decay, atol=2e-6, err_msg=f"{name} {parameter}")


def test_an_optimizer_takes_what_it_knows_of_the_options():
    lion = updates_of(OptimConfig(optimizer="lion", lr=0.1, warmup_steps=0, weight_decay=0))
    assert {abs(round(float(x), 6)) for x in lion["visual.proj"].ravel()} == {0.1}
    heavy = {"optimizer": "sgd", "lr": 0.1, "warmup_steps": 0, "clip_norm": 0, "weight_decay": 0}
    heavy |= {"schedule": "constant", "betas": (0.5, 0.9)}
    gradient = drawn(SHAPES)[1]["visual"]["proj"]
    for options, factor in (({}, 1.5), ({"nesterov": True}, 1.75), ({"momentum": None}, 1.0)):
        updates = updates_of(OptimConfig(**heavy, options=options), times=2)
        np.testing.assert_allclose(updates["visual.proj"], -0.1 * factor * gradient, rtol=1e-5)


def test_muon_orthogonalises_every_layer_and_leaves_the_rest_to_adamw():
    plain = {"lr": 0.1, "warmup_steps": 0, "weight_decay": 0.1}
    muon, adamw = (updates_of(OptimConfig(optimizer=name, **plain)) for name in ("muon", "adamw"))
    for name in (f"{BLOCKS}.bias", "visual.proj", "visual.stem"):
        np.testing.assert_allclose(
            muon[name], updates_of(OptimConfig(optimizer="nadamw", **plain))[name], rtol=1e-4
        )
    params = traverse_util.flatten_dict(drawn(SHAPES)[0], sep=".")
    rms = lambda x: np.sqrt((x**2).mean())
    for name, matrices in ((f"{BLOCKS}.kernel", (2, 8, 12)), (CONVOLUTION, (1, 36, 12))):
        update = muon[name] + 0.1 * 0.1 * np.asarray(params[name])
        sizes = np.linalg.svd(update.reshape(matrices), compute_uv=False)
        assert sizes.shape == (matrices[0], min(matrices[1:]))
        assert sizes.max() < 2 * sizes.min()
        assert 0.1 < rms(muon[name]) / rms(adamw[name]) < 0.4


def test_layers_are_frozen_and_slowed_whatever_the_optimizer():
    for name in ("sgd", "lion", "muon", "adafactor"):
        plain = updates_of(OptimConfig(optimizer=name))
        slow = updates_of(OptimConfig(optimizer=name, layer_decay=0.5, clip_norm=0))
        fast = updates_of(OptimConfig(optimizer=name, clip_norm=0))
        shares = np.array([0.25, 0.5])[:, None, None]
        kernel = f"{BLOCKS}.kernel"
        np.testing.assert_allclose(slow[kernel], fast[kernel] * shares, rtol=1e-6)
        frozen = updates_of(OptimConfig(optimizer=name, freeze=("visual.transformer.blocks.0.",)))
        assert not frozen[kernel][0].any()
        assert frozen[kernel][1].any()
        assert plain[kernel].all()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            OptimConfig(optimizer="adamm"),
            "optimizer='adamm' is none of .*adamw.* mean 'adam'",
        ),
        (OptimConfig(optimizer="lbfgs"), "optimizer='lbfgs' is none of .*extensions"),
        (
            OptimConfig(optimizer="lion", options={"nestrov": True}),
            "options: 'nestrov' is nothing that lion takes; it takes b1",
        ),
        (OptimConfig(optimizer="lion", second_moment="factored"), "second_moment='factored' is of"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_in_one_line(cfg, message):
    with pytest.raises(ConfigError, match=f"^config.optim.{message}") as refusal:
        make_optimizer(cfg, 10, drawn(SHAPES)[0])
    assert "\n" not in str(refusal.value)


def test_an_optimizer_of_ones_own_needs_no_counter(monkeypatch):
    """One function, one registration."""
    monkeypatch.setattr(OPTIMIZERS, "_homes", dict(OPTIMIZERS._homes))
    monkeypatch.setattr(registry, "extensions", {})

    @OPTIMIZERS.register("plain")
    def plain(cfg, schedule):
        return optax.scale(-cfg.lr)

    updates = updates_of(OptimConfig(optimizer="plain", lr=0.5, clip_norm=0), times=3)
    np.testing.assert_allclose(updates["visual.proj"], -0.5 * drawn(SHAPES)[1]["visual"]["proj"])
