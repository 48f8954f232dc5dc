"""The optimizer: AdamW with warm-up and cosine decay, as CLIP models are trained."""

import jax
import optax

from gcl_jax.config import OptimConfig


def total_steps(cfg: OptimConfig, num_pairs: int) -> int:
    """`cfg.steps`, or as many steps as `cfg.epochs` over `num_pairs` need (at least 1)."""
    return cfg.steps or max(1, round(cfg.epochs * num_pairs / cfg.batch_size))


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


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (off when `clip_norm` is 0), then AdamW."""
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    b1, b2 = cfg.betas
    adamw = optax.adamw(
        lr_schedule(cfg, steps), b1, b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed
    )
    return optax.chain(*clip, adamw)
