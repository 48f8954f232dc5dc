"""Hard negatives that a run mines with its own model, between steps: data.negatives="refresh".

Before the first time batches have no hard negatives, so that an objective that contrasts with them
is plain contrast until then, and such a step costs as much; afterwards one of so many batches has
them. What was mined last is in every checkpoint, so that a run that is continued goes on with it.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gcl_jax import distributed
from gcl_jax.checkpoints.checkpointer import Checkpointer, Restored
from gcl_jax.checkpoints.state import TrainState, abstract_state, averaged_params
from gcl_jax.config import DataConfig, TrainConfig
from gcl_jax.data.negatives import REFRESH
from gcl_jax.data.pipeline import Batch, Side
from gcl_jax.data.store import RankedStore
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import ConfigError
from gcl_jax.mine.mining import Mining, embedded, mine_split
from gcl_jax.models import flops
from gcl_jax.models.flops import TextLengths
from gcl_jax.sharding import batch_sharding, replicated

SIDE: Side = "document"


def schedule(data: DataConfig, steps: int) -> None:
    """Spells out when a run of `steps` steps mines.

    Raises:
        ConfigError: it never does.
    """
    if data.negatives != REFRESH:
        return
    if data.refresh_start is None:
        data.refresh_start = steps // 2
    data.refresh_every = data.refresh_every or steps - steps // 2
    if data.refresh_start >= steps:
        raise ConfigError(
            f"config.data.refresh_start={data.refresh_start} is not before the last of {steps} "
            "steps: no hard negatives would ever be mined"
        )


class Refresh:
    """The hard negatives that a run has mined, and when it mines again; nothing where it does not.

    Attributes:
        mined: {"document": int32 (pairs, H)}, rows of the store; empty before the first time.
    """

    def __init__(self, cfg: TrainConfig, store: RankedStore, mesh: Mesh):
        """`cfg`: with `schedule` spelled out."""
        self._cfg, self._store, self._mesh = cfg, store, mesh
        self._asked = cfg.data.negatives == REFRESH
        count = max(Mining().num_negatives, cfg.data.num_negatives)
        self._mining = Mining(num_negatives=count, relative_margin=cfg.data.refresh_margin)
        self._shape = len(store.pairs(cfg.data.train_split)), count
        self._ahead: threading.Thread | None = None
        self.mined: dict[str, np.ndarray] = {}

    def compile_ahead(self, train_step: Any, state: TrainState, batch: Mapping) -> None:
        """Begins to compile `train_step` for batches with negatives, in a thread beside the steps
        without, of which `batch` is one; once. A GPU compiles by trying out kernels, for which it
        needs memory and quiet: not there."""
        if self._ahead or not self._asked or self.mined or jax.default_backend() == "gpu":
            return
        split, count = batch_sharding(self._mesh), self._cfg.data.num_negatives

        def several(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((len(x), count, *x.shape[1:]), x.dtype, sharding=split)

        own = {name: batch[name] for name in (SIDE, f"{SIDE}_present", f"{SIDE}_id")}
        wider = dict(batch) | {f"negative_{name}": jax.tree.map(several, own[name]) for name in own}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, wider)
        )

        def compile_it() -> None:
            with contextlib.suppress(Exception):  # the step itself will meet and tell it
                train_step.lower(*abstract).compile()

        self._ahead = threading.Thread(target=compile_it)
        self._ahead.start()

    def due(self, step: int) -> bool:
        """Whether it is time to mine when `step` steps are done."""
        start, every = self._cfg.data.refresh_start, self._cfg.data.refresh_every
        return self._asked and step >= (start or 0) and (step - (start or 0)) % (every or 1) == 0

    def in_turn(self, step: int, rows: Batch) -> Batch:
        """`rows` for the step after `step`: without what was mined if it is not their turn."""
        since = step - (self._cfg.data.refresh_start or 0)
        if not self.mined or since % self._cfg.data.refresh_batches == 0:
            return rows
        return {name: x for name, x in rows.items() if not name.startswith(f"negative_{SIDE}")}

    def mine(self, step: int, state: TrainState, embedder: Embedder, batches: Any) -> dict:
        """Searches the training corpus with the model of `state`; `batches` go on with what is
        found. On all processes alike. Returns what to log."""
        if self._ahead:
            self._ahead.join()
        began, quiet = time.perf_counter(), not distributed.is_first()
        found = embedded(
            self._cfg, self._store, embedder.with_params(averaged_params(state)), quiet=True
        )
        rows = np.full(self._shape, -1, np.int32)
        if not quiet:
            rows = mine_split(self._cfg, self._store, *found, SIDE, self._mining, quiet=True)
        if jax.process_count() > 1:
            rows = np.asarray(multihost_utils.broadcast_one_to_all(rows))
        self._take(rows)
        batches.set_state(batches.get_state())  # what was read ahead has those of before
        counts, seconds = (rows >= 0).sum(axis=1), time.perf_counter() - began
        distributed.announce(
            f"\nstep {step}: mined hard negatives in {seconds:.1f} s: {counts.mean():.2f} for a "
            f"pair, none for {np.mean(counts == 0):.0%} of {len(counts)} pairs"
        )
        return {"refresh/seconds": seconds, "refresh/negatives": float(counts.mean())}

    def with_mined(self, state: TrainState) -> TrainState:
        """`state` as it goes into a checkpoint."""
        if not self._asked:
            return state
        mined = self.mined.get(SIDE, np.full(self._shape, -1, np.int32))
        placed = jax.device_put({SIDE: mined}, replicated(self._mesh))
        return dataclasses.replace(state, mined=placed)

    def restore(
        self, checkpointer: Checkpointer, tx: optax.GradientTransformation
    ) -> Restored | None:
        """What `Checkpointer.restore` returns for a run with the optimizer `tx`; what was mined is
        taken from it."""
        abstract = abstract_state(self._cfg, tx, self._mesh)
        if not self._asked:
            return checkpointer.restore(abstract)
        like = jax.ShapeDtypeStruct(self._shape, np.int32, sharding=replicated(self._mesh))
        restored = checkpointer.restore(dataclasses.replace(abstract, mined={SIDE: like}))
        if restored is None:
            return None
        self._take(np.asarray(restored.state.mined[SIDE]))
        return restored._replace(state=dataclasses.replace(restored.state, mined=None))

    def _take(self, rows: np.ndarray) -> None:
        self.mined.clear()
        if (rows >= 0).any():
            self.mined[SIDE] = rows

    def flops(self, text_lengths: TextLengths) -> float:
        """Of the towers in a step, on average, as batches are now."""
        cfg, kinds = self._cfg, self._store.kinds
        found = flops.train_flops(cfg, kinds, text_lengths)
        if not self._asked:
            return found
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, negatives=""))
        plain = flops.train_flops(cfg, kinds, text_lengths)
        return plain + bool(self.mined) * (found - plain) / cfg.data.refresh_batches
