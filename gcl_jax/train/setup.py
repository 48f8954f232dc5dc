"""What a training run is made of, before its first step."""

import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gcl_jax import config, distributed, optim, paths, sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.saved import require_fit
from gcl_jax.checkpoints.state import TrainState, abstract_state, init_state
from gcl_jax.config import ModelConfig, TrainConfig
from gcl_jax.data import mixture
from gcl_jax.data.pipeline import longest_texts, padded_length, sampled_pairs, train_batches
from gcl_jax.data.sampling import advice, pair_weights, pairs_per_epoch, records_without_fields
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import ConfigError, did_you_mean
from gcl_jax.evaluate import metrics
from gcl_jax.losses.objectives import check_data, check_inputs
from gcl_jax.losses.pairs import KnownWeights
from gcl_jax.models.clip import LORA, abstract_model, abstract_params
from gcl_jax.models.families import untrained_towers
from gcl_jax.models.layers import Numerics
from gcl_jax.prepare.stores import open_stores
from gcl_jax.registry import OBJECTIVES
from gcl_jax.runs import is_run, load_config, require_sealed
from gcl_jax.sharding import Params
from gcl_jax.train.flags import RESUMABLE
from gcl_jax.train.refresh import Refresh, schedule
from gcl_jax.train.step import MAX_LOGIT_SCALE, Metrics, known_weights, make_train_step
from gcl_jax.validation import CHECKPOINT_EVERY, checkpoint_every, unused, validate


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """The parts of a run. `cfg` is resolved for `store`; `batches` is this host's endless iterator;
    `steps` and `schedule` (of the learning rate) are those of the whole run; `constants` go with
    every batch to `train_step`; `lengths` are the token columns of texts."""

    cfg: TrainConfig
    store: RankedStore
    batches: Any
    steps: int
    schedule: optax.Schedule
    mesh: Mesh
    tx: optax.GradientTransformation
    train_step: Callable[[TrainState, Mapping], tuple[TrainState, Metrics]]
    constants: dict[str, KnownWeights]
    refresh: Refresh
    lengths: dict[str, dict[str, int]]

    def to_devices(self, rows: Mapping) -> dict:
        """This host's rows of a batch as the global batch that `train_step` takes."""
        return sharding.to_global(rows, self.mesh) | self.constants


def make_training(cfg: TrainConfig) -> Training:
    """Everything but the state, which takes memory, and the directory of the run.

    Raises:
        ConfigError, DataError: the configuration, or the data that it names, cannot be used.
    """
    if cfg.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError(
            "config.model.attention='cudnn' needs an NVIDIA GPU, and jax finds none; use 'auto'"
        )
    parameters = abstract_model(cfg.model)[1]
    # An unknown name or pattern, what objectives lack, and what is not installed, are told before
    # data are opened, which may take minutes.
    check_inputs(cfg)
    tx, text = optim.make_optimizer(cfg.optim, 1, parameters), cfg.model.text
    load_tokenizer(text.tokenizer, text.context_length, text.clean)
    store, asked = open_stores(cfg.data), cfg
    cfg = store.resolve(cfg)
    # Else GPUs would wait for each other in programs that differ.
    kernel = Numerics.of(cfg.model, jax.default_backend()).attention
    distributed.require_alike({"the code": distributed.code(), "what attends": kernel})
    distributed.require_alike(_options(cfg))
    split = cfg.data.train_split
    if not asked.data.train_split and mixture.is_held_out(split):
        raise ConfigError(
            f"store {store.directory} has no split to train on, only {', '.join(store.splits)}; to "
            f"train on one of these all the same, name it: --config.data.train_split={split}"
        )
    pairs = sampled_pairs(cfg, store)
    cfg = spelled_out(cfg, pairs)
    check_data(cfg, pair_weights(cfg, pairs))
    require_metric(cfg)
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    require_memory(cfg, tx, mesh)
    for line in (*records_without_fields(cfg, store), *untrained_towers(cfg, store.kinds).values()):
        distributed.announce(line)
    lengths = text_lengths(cfg, store)
    place, refresh = (jax.process_index(), jax.process_count()), Refresh(cfg, store, mesh)
    batches = train_batches(cfg, store, *place, lengths, pairs, refresh.mined)
    distributed.announce(f"training on split {split!r} of {store.directory}: {len(pairs)} pairs")
    queries = [len(np.unique(x.query)) for x in (store.pairs(split), pairs)]
    if queries[0] > queries[1]:
        distributed.announce(
            f"config.data.unique_queries: {queries[0]} queries have {queries[1]} different texts"
        )
    epoch = pairs_per_epoch(cfg, pairs)
    if epoch < len(pairs):
        distributed.announce(
            f"config.data.unique_queries leaves {len(pairs) - epoch} of {len(pairs)} pairs out of "
            "each epoch, others every time"
        )
    steps = optim.total_steps(cfg.optim, epoch)
    for line in (in_words(cfg, steps, epoch), *mixture.in_words(cfg, pairs, steps)):
        distributed.announce(line)
    for line in (*unused(cfg).values(), *advice(cfg, pairs, steps, not asked.optim.batch_size)):
        distributed.announce(f"warning: {line}")
    tx = optim.make_optimizer(cfg.optim, steps, parameters)
    train_step = make_train_step(cfg, tx, mesh)
    constants = {}
    if cfg.loss.targets == "known":
        weights = known_weights(cfg, store)
        constants["known"] = jax.device_put(weights, sharding.replicated(mesh))
    return Training(
        cfg,
        store,
        batches,
        steps,
        optim.lr_schedule(cfg.optim, steps),
        mesh,
        tx,
        train_step,
        constants,
        refresh,
        lengths,
    )


def spelled_out(cfg: TrainConfig, pairs: Pairs | int) -> TrainConfig:
    """A copy of `cfg`, which is resolved for its store, with what it leaves to the `pairs` of the
    training split, as the samplers see them; or to their number, where there is no store yet.

    Raises:
        ConfigError: what `pairs_per_epoch` raises, or options that do not go together.
    """
    cfg = copy.deepcopy(cfg)
    options, evaluation, checkpoint = cfg.optim, cfg.eval, cfg.checkpoint
    count = pairs if isinstance(pairs, int) else mixture.fewest(pairs)
    options.batch_size = options.batch_size or batch_size(count)
    epoch = pairs if isinstance(pairs, int) else pairs_per_epoch(cfg, pairs)
    if not (options.steps or options.examples):
        options.epochs = optim.epochs(options, epoch)
    steps = optim.total_steps(options, epoch)
    options.warmup_steps = optim.warmup_steps(options, steps)
    schedule(cfg.data, steps)
    held_out = mixture.validation_splits(cfg)
    if evaluation.every is None:
        unit = checkpoint.every or (CHECKPOINT_EVERY if steps >= 10 * CHECKPOINT_EVERY else 1)
        tenth = unit * max(1, round(steps / 10 / unit))
        evaluation.every = tenth if held_out or checkpoint.best else 0
    if checkpoint.best is None:
        comparable = evaluation.every and evaluation.every % (checkpoint.every or 1) == 0
        checkpoint.best = f"{held_out[0]}/NDCG@10" if held_out and comparable else ""
    checkpoint.every = checkpoint_every(cfg)
    validate(cfg)
    return cfg


def batch_size(pairs: int) -> int:
    """Of so many pairs in the training split: from 32 to 256, if there are as many."""
    power = lambda most: 2 ** int(math.log2(max(2, most)))
    return min(256, power(pairs), max(32, power(pairs / 8)))


def in_words(cfg: TrainConfig, steps: int, epoch: int) -> str:
    """The length of a run of `steps` steps, in one line; `cfg` is spelled out."""
    size, evaluation = cfg.optim.batch_size, cfg.eval
    parts = [f"{steps} steps of {size} pairs ({steps * size / epoch:.3g} epochs)"]
    parts.append(f"{cfg.optim.warmup_steps} of them to warm up")
    if evaluation.every:
        parts.append(f"an evaluation every {evaluation.every}")
    if cfg.checkpoint.best:
        parts.append(f"--checkpoint=best by {cfg.checkpoint.best}")
    return ", ".join(parts)


def less_memory(training: Training) -> str:
    """What to change when a step does not fit into a device's memory."""
    cfg, mesh = training.cfg, training.mesh
    state = sharding.bytes_per_device(abstract_state(cfg, training.tx, mesh)) / 2**30
    chunks, ways = 2 * cfg.optim.grad_cache_chunks, []
    if cfg.model.remat != "full":
        ways.append("--config.model.remat=full")
    if cfg.optim.batch_size % (chunks * mesh.size) == 0:
        ways.append(f"--config.optim.grad_cache_chunks={chunks}")
    of_slice = mesh.size // mesh.shape[sharding.SLICE]
    if mesh.shape["fsdp"] < of_slice:
        ways.append(f"--config.mesh.fsdp={of_slice} (which splits the state)")
    return (
        f"the state of the run takes {state:.2f} GiB of it. Try {', '.join([*ways, ''])}or an "
        f"--config.optim.batch_size below {cfg.optim.batch_size}, which alone changes the result; "
        "`python -m gcl_jax.plan` says without the device what fits"
    )


def require_memory(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh) -> None:
    """Raises `ConfigError` if the state alone is more than the memory of a machine that trains on
    its CPUs: the system would end the process, where other devices say that they are full."""
    needed = sharding.bytes_per_device(abstract_state(cfg, tx, mesh)) * jax.local_device_count()
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu" and needed > has:
        raise ConfigError(
            f"config.model: parameters and optimizer take {needed / 2**30:.3g} GiB, and this "
            f"machine has {has / 2**30:.3g} GiB; lower its sizes"
        )


def _options(cfg: Any) -> dict[str, Any]:
    """{key: value} of what may not differ from process to process."""
    own = ("data.num_workers", "data.cached_records")
    keys = [one.key for one in config.described() if one.key not in own]
    return {f"config.{key}": config.value(cfg, key) for key in keys}


def text_lengths(cfg: TrainConfig, store: RankedStore) -> dict[str, dict[str, int]]:
    """{"query" and "document": {field: tokens}} of the text fields that need less than the context
    length in this run; the processes share the search, and its result."""

    def largest(own: np.ndarray) -> np.ndarray:
        return multihost_utils.process_allgather(own).reshape(-1, len(own)).max(axis=0)

    place = jax.process_index(), jax.process_count()
    longest = longest_texts(cfg, store, *place, largest, quiet=not distributed.is_first())
    most, found = cfg.model.text.context_length, dict[str, dict[str, int]]()
    for side, fields in longest.items():
        found[side] = {field: padded_length(n, most) for field, n in fields.items()}
        for field, tokens in found[side].items():
            distributed.announce(f"{side} field {field!r}: {tokens} of {most} tokens")
    return found


def require_metric(cfg: TrainConfig) -> None:
    """Raises `ConfigError` unless evaluation in training gives the metric that says which
    checkpoints are best. `cfg` is resolved for its store."""
    best = cfg.checkpoint.best
    names = [f"{split}/{name}" for split in cfg.eval.splits for name in metrics.names()]
    if best and best not in names:
        raise ConfigError(
            f"config.checkpoint.best={best!r} must be one of {', '.join(names)}"
            + did_you_mean(best, names)
        )


def start_or_continue(
    training: Training,
    checkpointer: Checkpointer,
    workdir: Path,
    resume_changes: Collection[str] = (),
) -> tuple[int, TrainState]:
    """(steps done, state): from the run's own newest checkpoint, with the data going on where they
    were; else with parameters of another run or pretrained ones (`init_from`), or random ones.
    `resume_changes` are keys that may differ from the run's.

    Raises:
        ConfigError: the run in `workdir` is another one, or none to continue.
        DataError: checkpoints or weights that cannot be read.
    """
    cfg, steps = training.cfg, training.steps
    # A bucket has no empty folders.
    if not paths.address(workdir) and not checkpointer.directory.is_dir():
        raise ConfigError(
            f"--workdir={workdir} must lie on storage that all processes share: process "
            f"{jax.process_index()} does not see what process 0 writes there"
        )
    latest = checkpointer.latest_step()
    if latest is None:
        start = load_init_from(cfg, training.mesh) if cfg.init_from else {}
        distributed.announce(f"starting from {cfg.init_from or 'random parameters'}")
        cfg.model.max_logit_scale = max_logit_scale(cfg.model, start)
        return 0, init_state(cfg, training.tx, training.mesh, start)
    if latest == 0:
        raise ConfigError(
            f"{workdir} holds an imported model, which no training continues; choose another "
            f"--workdir and set --config.init_from={workdir}"
        )
    started = load_config(workdir)
    require_sealed(started, workdir)
    check_same_run(cfg, started, workdir, latest, resume_changes)
    cfg.init_from = started.init_from
    restored = training.refresh.restore(checkpointer, training.tx)
    assert restored is not None  # `latest` says that there is one
    step, state, position = restored
    training.batches.set_state(position)
    distributed.announce(f"continuing {workdir} from step {step} of {steps}")
    return step, state


def max_logit_scale(model: ModelConfig, start: Params) -> float:
    """`model.max_logit_scale`, or if that is None the log of 100, or of the scale that a run starts
    with, if that is larger: of `start`, parameters of another model, or of the configuration."""
    if model.max_logit_scale is not None:
        return model.max_logit_scale
    scale = float(start.get("logit_scale", model.init_logit_scale))
    if scale > MAX_LOGIT_SCALE:
        distributed.announce(
            f"the logit scale starts at {math.exp(scale):.4g}, above 100: that is its bound "
            f"(config.model.max_logit_scale={scale:.6g})"
        )
    return max(scale, MAX_LOGIT_SCALE)


def load_init_from(cfg: TrainConfig, mesh: Mesh) -> Params:
    """The parameters that `cfg.init_from` gives to the model `cfg.model`, placed on `mesh`.

    It is the workdir of another run (its moving averages, if it has any), WORKDIR@STEP for one of
    its checkpoints, or whatever `gcl_jax.port.pretrained.load_pretrained` reads. LoRA's matrices,
    gates, temperature and the logits' bias are left out where it lacks them: they start as the
    configuration says.

    Raises:
        ConfigError, DataError: no such source, or parameters that are missing, left over or of
            another shape, all named.
    """
    abstract = abstract_params(cfg.model, mesh)
    wanted = traverse_util.flatten_dict(abstract, sep=".")
    optional = [n for n in wanted if n.endswith(LORA) or n.startswith(("logit_", "gates."))]
    source, step = paths.local_path(cfg.init_from), None
    if not source.exists() and (found := re.fullmatch(r"(.+)@(\d+)", cfg.init_from)):
        source, step = paths.local_path(found[1]), int(found[2])
    if is_run(source):
        with Checkpointer(source, cfg.checkpoint, read_only=True) as checkpointer:
            return checkpointer.restore_params(abstract, optional, step)
    from gcl_jax.port.pretrained import load_pretrained  # with other libraries' readers

    base = dataclasses.replace(cfg.model, lora_rank=0)
    found = traverse_util.flatten_dict(load_pretrained(cfg.init_from, base), sep=".")
    wanted = {name: x for name, x in wanted.items() if name in found or name not in optional}
    require_fit(cfg.init_from, wanted, found)
    placed = {name: _placed(found[name], x) for name, x in wanted.items()}
    return traverse_util.unflatten_dict(placed, sep=".")


def _placed(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """`array` in the dtype of `target`; a device gets its own shard only."""
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: np.asarray(array[index], target.dtype)
    )


# What continues a run may change these unasked: they say how to compute, not what.
_FREE = {"data.digest", "data.num_workers", "data.cached_records"}
_FREE |= {"model.attention", "model.remat", "loss.form", "optim.grad_cache_chunks"}


def check_same_run(
    cfg: TrainConfig,
    started: TrainConfig,
    workdir: Path,
    step: int,
    resume_changes: Collection[str] = (),
) -> None:
    """Raises `ConfigError` when `cfg` would train something else than the run in `workdir`, whose
    newest checkpoint is of `step`; what `resume_changes` names may differ, and what is unused."""
    digests = {started.data.digest, cfg.data.digest} - {""}
    if len(digests) > 1:
        raise ConfigError(
            f"store {cfg.data.named} has been prepared again: its contents are not those that the "
            f"run in {workdir} was trained on; prepare it as it was, or choose another --workdir"
        )
    # As JSON, where a list and a tuple are the same.
    ours, theirs = (
        {key: json.dumps(value) for key, value in _options(c).items()} for c in (cfg, started)
    )
    parts = ("model", "data", "loss", "optim", "seed")
    unused = tuple(f"loss.{name}." for name in OBJECTIVES if not cfg.loss.objectives.get(name))
    free = _FREE.union(resume_changes)
    changed = (key.removeprefix("config.") for key in ours if ours[key] != theirs[key])
    differ = [key for key in changed if key.partition(".")[0] in parts and key not in free]
    differ = [key for key in differ if not key.startswith(unused)]
    if not differ:
        return
    shown = differ[:3]
    listed = ", ".join(f"config.{key}={ours[f'config.{key}']}" for key in shown)
    instead = ", ".join(theirs[f"config.{key}"] for key in shown)
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    go_on = ""
    if all(key.startswith(RESUMABLE) for key in differ):
        go_on = f"to go on with it from step {step}, add --resume_changes={','.join(differ)}; "
    raise ConfigError(
        f"{listed}{more}: the run in {workdir} has {instead}; {go_on}to start another run from its "
        f"parameters, choose another --workdir and --config.init_from={workdir}@{step}"
    )
