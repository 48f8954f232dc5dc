"""The optimizer: AdamW with warm-up and cosine decay, as CLIP models are trained; which parameters
a run trains, and each layer's share of the learning rate.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from gcl_jax.config import OptimConfig
from gcl_jax.errors import ConfigError
from gcl_jax.sharding import Params

# What a tower computes before its blocks.
EMBEDDINGS = {
    "patch_embedding",
    "patch_bias",
    "class_embedding",
    "token_embedding",
    "token_type_embedding",
    "positional_embedding",
    "ln_pre",
    "ln_embedding",
}


def total_steps(cfg: OptimConfig, num_pairs: int) -> int:
    """`cfg.steps`, or as many as `cfg.examples` or `cfg.epochs` over `num_pairs` need (1 at the
    least)."""
    return cfg.steps or max(1, round((cfg.examples or cfg.epochs * num_pairs) / cfg.batch_size))


def lr_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Linear up to `cfg.lr` in `warmup_steps`, then a cosine to 0 at `steps`."""
    warmup = min(cfg.warmup_steps, steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(cfg.lr / (warmup + 1), cfg.lr, warmup),
            optax.cosine_decay_schedule(cfg.lr, max(1, steps - warmup)),
        ],
        [warmup],
    )


def decayed(params):
    """True where weight decay applies: matrices, not biases, gains, the class token or the logit
    scale (open_clip's rule); the stacked axis of the scanned blocks does not count."""

    def is_matrix(path, x) -> bool:
        stacked = any(getattr(key, "key", None) == "blocks" for key in path)
        return x.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def lr_multipliers(cfg: OptimConfig, params: Params) -> dict[str, np.ndarray]:
    """{dotted path: float32 factor of its learning rate} of the parameters that are trained: a
    scalar, or for stacked blocks (layers, 1, ...), with 0 for a frozen layer.

    Frozen are the matches of `cfg.freeze` and, in a model with LoRA, all but `lora_a`, `lora_b`,
    `logit_scale` and `logit_bias`. In a tower of n blocks the embeddings count as layer 0, the
    blocks as 1 to n, all that follows as n + 1; the factor is layer_decay^(n + 1 - layer), as in
    BEiT (arXiv 2106.08254). Temperature and bias belong to no tower: 1.

    Args:
        params: the whole model's, arrays or ShapeDtypeStructs.

    Raises:
        ConfigError: a pattern that matches no parameter, or nothing left to train.
    """
    if isinstance(cfg.freeze, str):
        raise ConfigError(f"config.optim.freeze={cfg.freeze!r} must be a tuple of patterns")
    flat = traverse_util.flatten_dict(params, sep=".")
    depths = {_tower(name): x.shape[0] for name, x in flat.items() if ".blocks." in name}
    lora = any(map(_is_lora, flat))
    matched, multipliers = set(), {}
    for name, x in flat.items():
        depth = depths.get(_tower(name), 0)
        factors = []
        for layer, layer_name in _layers(name, depth):
            patterns = {pattern for pattern in cfg.freeze if re.match(pattern, layer_name)}
            matched |= patterns
            frozen = patterns or (lora and not _is_lora(name) and not name.startswith("logit_"))
            factors.append(0.0 if frozen else cfg.layer_decay ** (depth + 1 - layer))
        if any(factors):
            shape = (-1, *[1] * (x.ndim - 1)) if ".blocks." in name else ()
            multipliers[name] = np.array(factors, np.float32).reshape(shape)
    if unmatched := [pattern for pattern in cfg.freeze if pattern not in matched]:
        examples = [next(_layers(name, depth=1))[1] for name in (min(flat), max(flat))]
        raise ConfigError(
            f"config.optim.freeze: {unmatched[0]!r} matches no parameter; their names are like "
            f"{' and '.join(examples)}"
        )
    if not multipliers:
        raise ConfigError(f"config.optim.freeze={cfg.freeze!r} leaves nothing to train")
    return multipliers


def _tower(name: str) -> str:
    return name.partition(".")[0]


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_a", ".lora_b"))


def _layers(name: str, depth: int):
    """(layer, name within it) of all layers that the parameter `name` of a tower of `depth` blocks
    belongs to."""
    if ".blocks." in name:
        for block in range(depth):
            yield block + 1, name.replace(".blocks.", f".blocks.{block}.")
    else:
        yield (0 if EMBEDDINGS & set(name.split(".")[1:2]) else depth + 1), name


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
    """AdamW for the trained part of `params` (arrays or ShapeDtypeStructs of the whole model):
    clipping by global norm (off when `clip_norm` is 0), then the update times `lr_multipliers`.

    It computes in float32, whatever the parameters' dtype, and keeps its moments as `cfg` says. A
    frozen layer takes no part in the norm. Raises as `lr_multipliers` does.
    """
    multipliers = traverse_util.unflatten_dict(lr_multipliers(cfg, params), sep=".")
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    adamw = optax.chain(
        _scaled_by_moments(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(lr_schedule(cfg, steps)),
    )
    inner = optax.chain(*clip, adamw)

    def init(params):
        return inner.init(in_float32(params))

    def update(gradients, state, params):
        gradients = jax.tree.map(
            lambda g, m: jnp.where(m > 0, g, 0.0), in_float32(gradients), multipliers
        )
        updates, state = inner.update(gradients, state, in_float32(params))
        return jax.tree.map(jnp.multiply, updates, multipliers), state

    return optax.GradientTransformation(init, update)


def _scaled_by_moments(cfg: OptimConfig) -> optax.GradientTransformation:
    """Adam's; or Adafactor's: normalised by a factored second moment, cut to a root mean square of
    1 for each parameter, and only then averaged."""
    b1, b2 = cfg.betas
    if cfg.second_moment == "full":
        return optax.scale_by_adam(b1, b2, cfg.eps, mu_dtype=cfg.momentum_dtype)
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(b1, accumulator_dtype=cfg.momentum_dtype),
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
