"""Optimizers and schedules of the learning rate, by name; which parameters a run trains, and each
layer's share of the learning rate.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import traverse_util

from gcl_jax.config import OptimConfig
from gcl_jax.errors import ConfigError, did_you_mean, first_line
from gcl_jax.models.clip import LORA
from gcl_jax.registry import OPTIMIZERS, SCHEDULES, TEXT_TOWERS, VISION_TOWERS, hint
from gcl_jax.sharding import Params


def total_steps(cfg: OptimConfig, num_pairs: int) -> int:
    """`cfg.steps`, or as many as `cfg.examples` or `cfg.epochs` over `num_pairs` need (1 at the
    least)."""
    examples = cfg.examples or epochs(cfg, num_pairs) * num_pairs
    return cfg.steps or max(1, round(examples / cfg.batch_size))


def epochs(cfg: OptimConfig, num_pairs: int) -> float:
    """`cfg.epochs`, or if that is None enough of them over `num_pairs` to learn from scratch, and
    no more than are likely to teach anything: see its meaning."""
    if cfg.epochs is not None:
        return cfg.epochs
    return min(50.0, max(5.0, float(math.ceil(1000 * cfg.batch_size / num_pairs))))


def warmup_steps(cfg: OptimConfig, steps: int) -> int:
    """`cfg.warmup_steps`, or if that is None a tenth of `steps`, at most 2000."""
    return min(2000, steps // 10) if cfg.warmup_steps is None else cfg.warmup_steps


def lr_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Linear up to `cfg.lr` in `warmup_steps`, then as `cfg.schedule` says, to the end at `steps`.

    To add one: `@SCHEDULES.register("mine") def f(cfg, steps) -> optax.Schedule`, the learning rate
    of the `steps` after the warm-up, counted from 0.
    """
    warmup = min(warmup_steps(cfg, steps), steps)
    rise = optax.linear_schedule(cfg.lr / (warmup + 1), cfg.lr, warmup)
    return optax.join_schedules([rise, SCHEDULES[cfg.schedule](cfg, steps - warmup)], [warmup])


@SCHEDULES.register("cosine")
def cosine(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Half a cosine down to 0."""
    return optax.cosine_decay_schedule(cfg.lr, max(1, steps))


@SCHEDULES.register("linear")
def linear(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """A straight line down to 0."""
    return optax.linear_schedule(cfg.lr, 0.0, max(1, steps))


@SCHEDULES.register("constant")
def constant(cfg: OptimConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(cfg.lr)


@SCHEDULES.register("wsd")
def wsd(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Warm-up, stable, decay (arXiv 2404.06395): a straight line down to 0 in the last
    `decay_fraction` of the steps."""
    falling = max(1, round(cfg.decay_fraction * steps))
    parts = [optax.constant_schedule(cfg.lr), optax.linear_schedule(cfg.lr, 0.0, falling)]
    return optax.join_schedules(parts, [steps - falling])


def decayed(params):
    """True where weight decay applies: matrices, not biases, gains, the class token or the logit
    scale (open_clip's rule); the stacked axis of the scanned blocks does not count."""

    def is_matrix(path, x) -> bool:
        return x.ndim - _is_stacked(path) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _is_stacked(path) -> bool:
    return any(getattr(key, "key", None) == "blocks" for key in path)


def lr_multipliers(cfg: OptimConfig, params: Params) -> dict[str, np.ndarray]:
    """{dotted path: float32 factor of its learning rate} of the parameters that are trained: a
    scalar, or for stacked blocks (layers, 1, ...), with 0 for a frozen layer.

    Frozen are the matches of `cfg.freeze` and, in a model with LoRA, all but `lora_a`, `lora_b`,
    `logit_scale`, `logit_bias` and the gates. In a tower of n blocks the embeddings count as layer
    0, the blocks as 1 to n, all that follows as n + 1; the factor is layer_decay^(n + 1 - layer),
    as in BEiT (arXiv 2106.08254), times those of `cfg.lr_multipliers` that match. Temperature and
    bias belong to no tower and have no decay.

    Args:
        params: the whole model's, arrays or ShapeDtypeStructs.

    Raises:
        ConfigError: a pattern that matches no parameter, or nothing left to train.
    """
    if isinstance(cfg.freeze, str):
        raise ConfigError(f"config.optim.freeze={cfg.freeze!r} must be a tuple of patterns")
    asked = cfg.lr_multipliers | dict.fromkeys(cfg.freeze, 0.0)
    flat = traverse_util.flatten_dict(params, sep=".")
    depths = {_tower(name): x.shape[0] for name, x in flat.items() if ".blocks." in name}
    lora, adapting = any(n.endswith(LORA) for n in flat), (*LORA, "logit_scale", "logit_bias")
    matched, multipliers = set(), {}
    for name, x in flat.items():
        depth = depths.get(_tower(name), 0)
        factors = []
        for layer, layer_name in _layers(name, depth):
            patterns = [pattern for pattern in asked if re.match(pattern, layer_name)]
            matched.update(patterns)
            adapts = name.endswith(adapting) or _tower(name) == "gates"
            asked_for = math.prod(asked[pattern] for pattern in patterns)
            factor = asked_for if adapts or not lora else 0.0
            factors.append(factor * cfg.layer_decay ** (depth + 1 - layer))
        if any(factors):
            shape = (-1, *[1] * (x.ndim - 1)) if ".blocks." in name else ()
            multipliers[name] = np.array(factors, np.float32).reshape(shape)
    if unmatched := [pattern for pattern in asked if pattern not in matched]:
        key = "freeze" if unmatched[0] in cfg.freeze else "lr_multipliers"
        examples = [next(_layers(name, depth=1))[1] for name in (min(flat), max(flat))]
        raise ConfigError(
            f"config.optim.{key}: {unmatched[0]!r} matches no parameter; their names are like "
            f"{' and '.join(examples)}"
        )
    if not multipliers:
        also = f" with lr_multipliers={cfg.lr_multipliers!r}" if cfg.lr_multipliers else ""
        raise ConfigError(f"config.optim.freeze={cfg.freeze!r}{also} leaves nothing to train")
    return multipliers


def _tower(name: str) -> str:
    return name.partition(".")[0]


def _layers(name: str, depth: int):
    """(layer, name within it) of all layers that the parameter `name` of a tower of `depth` blocks
    belongs to."""
    if ".blocks." in name:
        for block in range(depth):
            yield block + 1, name.replace(".blocks.", f".blocks.{block}.")
    else:
        yield (0 if _is_embedding(name) else depth + 1), name


def _is_embedding(name: str) -> bool:
    families = {"visual": VISION_TOWERS, "text": TEXT_TOWERS}.get(_tower(name))
    return any(name.split(".")[1] in one.embedding_names for one in (families or {}).values())


def trained_part(cfg: OptimConfig, params: Params) -> Params:
    """`params` without those that are frozen as a whole. Gradients, moments and moving averages
    are made of these alone. Raises as `lr_multipliers` does."""
    flat = traverse_util.flatten_dict(params, sep=".")
    return traverse_util.unflatten_dict({n: flat[n] for n in lr_multipliers(cfg, params)}, sep=".")


def with_part(params: Params, part: Params) -> Params:
    """`params` with the leaves of `part` in their place, cast to their dtype."""
    flat = traverse_util.flatten_dict(params)
    for name, x in traverse_util.flatten_dict(part).items():
        flat[name] = x.astype(flat[name].dtype)
    return traverse_util.unflatten_dict(flat)


def make_optimizer(cfg: OptimConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """`cfg.optimizer` for the trained part of `params` (arrays or ShapeDtypeStructs of the whole
    model): clipping by global norm (off when `clip_norm` is 0), then the update times
    `lr_multipliers`.

    It computes in float32, whatever the parameters' dtype, and keeps its moments as `cfg` says. A
    frozen layer takes no part in the norm. Raises as `lr_multipliers` does.

    To add one: `@OPTIMIZERS.register("mine") def f(cfg, schedule) -> optax.GradientTransformation`,
    which scales by the learning rate `schedule` and decays the weights where `decayed` says so.
    """
    multipliers = traverse_util.unflatten_dict(lr_multipliers(cfg, params), sep=".")
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    inner = optax.chain(*clip, _chosen(cfg)(cfg, lr_schedule(cfg, steps)))

    def init(params):
        return inner.init(in_float32(params))

    def update(gradients, state, params):
        gradients = jax.tree.map(
            lambda g, m: jnp.where(m > 0, g, 0.0), in_float32(gradients), multipliers
        )
        updates, state = inner.update(gradients, state, in_float32(params))
        return jax.tree.map(jnp.multiply, updates, multipliers), state

    trained = trained_part(cfg, params)
    shapes = jax.eval_shape(init, trained)
    if cfg.options:  # a value that it takes and cannot use shows in its update
        try:
            jax.eval_shape(update, trained, shapes, trained)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"config.optim.options={cfg.options}: {cfg.optimizer}: {first_line(error)}"
            ) from None
    if not optax.tree.get_all_with_path(shapes, "count"):
        inner = optax.chain(inner, optax.scale_by_schedule(lambda _: 1.0))  # for `updates_done`
    return optax.GradientTransformation(init, update)


def _chosen(cfg: OptimConfig) -> Callable[[OptimConfig, optax.Schedule], Any]:
    """A registered optimizer, or one of optax."""
    name = cfg.optimizer
    if cfg.second_moment != "full" and name != "adamw":
        raise ConfigError(
            f"config.optim.second_moment={cfg.second_moment!r} is of optimizer='adamw' alone, not "
            f"of {name!r}"
        )
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    found = _of_optax()
    if name not in found:
        names = sorted({*OPTIMIZERS, *found})
        raise ConfigError(
            f"config.optim.optimizer={name!r} is none of {', '.join(names)}"
            + (did_you_mean(name, names) or hint(name, OPTIMIZERS))
        )
    return functools.partial(from_optax, found[name])


# They need more than gradients and parameters, take no schedule, or train other parameters than
# those to evaluate.
_LEFT_OUT = {
    "dpsgd", "galore", "lbfgs", "momo", "momo_adam", "noisy_sgd", "optimistic_adam", "rprop",
    "schedule_free", "schedule_free_adamw", "schedule_free_sgd", "sm3", "sophia",
}  # fmt: skip


def _of_optax() -> dict[str, Callable]:
    """Its optimizers, and those of its `contrib`, by name."""
    return {
        name: make
        for name, make in {**vars(optax.contrib), **vars(optax)}.items()
        if callable(make)
        and name.islower()
        and not name.startswith(("_", "scale_by_"))
        and name not in _LEFT_OUT
        and "learning_rate" in _parameters(make)
    }


def _parameters(make: Callable) -> Mapping[str, Any]:
    try:
        return inspect.signature(make).parameters
    except ValueError:
        return {}


def from_optax(
    make: Callable, cfg: OptimConfig, schedule: optax.Schedule, **fixed
) -> optax.GradientTransformation:
    """An optimizer of optax with those options of `cfg` that it has arguments for, `fixed` ones,
    and `cfg.options`, each stronger than those before. If it decays no weights, or all of them,
    those that `decayed` names are decayed here, times the learning rate.

    Raises:
        ConfigError: `cfg.options` has what it does not take, or cannot use.
    """
    takes = _parameters(make)
    b1, b2 = cfg.betas
    decays = "weight_decay" in takes and bool({"mask", "weight_decay_mask"} & set(takes))
    known = {
        "learning_rate": schedule,
        "eps": cfg.eps,
        "betas": cfg.betas,
        "weight_decay": cfg.weight_decay if decays else 0.0,
        **dict.fromkeys(("b1", "beta", "momentum"), b1),
        **dict.fromkeys(("b2", "decay"), b2),
        **dict.fromkeys(("mask", "weight_decay_mask"), decayed),
        **dict.fromkeys(("mu_dtype", "accumulator_dtype", "dtype_momentum"), cfg.momentum_dtype),
    }
    given = {name: x for name, x in known.items() if name in takes} | fixed
    may = [name for name in takes if name != "learning_rate"]  # `lr` and `schedule` say that
    if unknown := set(cfg.options) - set(may):
        raise ConfigError(
            f"config.optim.options: {min(unknown)!r} is nothing that {cfg.optimizer} takes; it "
            f"takes {', '.join(may)}"
        )
    try:
        made = make(**given | cfg.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optim.options of {cfg.optimizer}: {error}") from None
    if given.get("weight_decay") or not cfg.weight_decay:
        return made
    rate = lambda count: -cfg.weight_decay * schedule(count)
    return optax.chain(made, optax.add_decayed_weights(rate, mask=decayed))


@OPTIMIZERS.register("adamw")
def adamw(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """optax's; or with Adafactor's second moment: normalised by that, cut to a root mean square of
    1 for each parameter, and only then averaged."""
    if cfg.second_moment == "full":
        return from_optax(optax.adamw, cfg, schedule)
    by_moments = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(cfg.betas[0], accumulator_dtype=cfg.momentum_dtype),
    )
    return optax.chain(
        by_moments,
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )


@OPTIMIZERS.register("adafactor")
def adafactor(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """optax's, whose `eps` is added to squares of gradients."""
    return from_optax(optax.adafactor, cfg, schedule, eps=1e-30)


@OPTIMIZERS.register("muon")
def muon(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """optax's for the matrices of the blocks, each layer's own, and their convolutions, and AdamW
    for all else, at updates of one size (arXiv 2502.16982), so that `lr` means what it does for
    AdamW."""
    matrix = optax.contrib.MuonDimensionNumbers(1, 2)  # (layers, inputs, outputs)
    kernel = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)  # (height, width, inputs, outputs)

    def matrices(params):
        def of(path, x):
            if _is_stacked(path):
                return matrix if x.ndim == 3 else None
            within = any(getattr(key, "key", None) == "layers" for key in path)
            return kernel if within and x.ndim == 4 else None

        return jax.tree_util.tree_map_with_path(of, params)

    b1, b2 = cfg.betas
    fixed = {"adam_b1": b1, "adam_b2": b2, "consistent_rms": 0.2, "weight_decay": 0.0}
    return from_optax(
        optax.contrib.muon, cfg, schedule, muon_weight_dimension_numbers=matrices, **fixed
    )


def updates_done(state: optax.OptState) -> jax.Array:
    """int32 scalar: how many updates this state of `make_optimizer` has made; the schedule of the
    learning rate counts these, not steps."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def in_float32(tree):
    return optax.tree.cast(tree, jnp.float32)


def apply_updates(params: Params, updates: Params, key: jax.Array) -> Params:
    """params + updates in the dtype of the parameters. bfloat16 is rounded stochastically, drawing
    from `key`: most updates are below half its precision, and rounding to nearest loses them."""
    leaves, structure = jax.tree.flatten(optax.apply_updates(in_float32(params), updates))
    targets = jax.tree.leaves(params)
    rounded = [
        _round_stochastically(x, jax.random.fold_in(key, i)) if p.dtype == jnp.bfloat16 else x
        for i, (x, p) in enumerate(zip(leaves, targets, strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def _round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of its two bfloat16 neighbours, the nearer the likelier: the mean is x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
    return cut.astype(jnp.bfloat16)
