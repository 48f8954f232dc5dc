"""Where parameters, moments and batches live, and that the mesh does not change the training."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from conftest import leave_out_images, make_cpu_mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey

from gcl_jax import sharding
from gcl_jax.checkpoints.state import abstract_state, init_state
from gcl_jax.config import MeshConfig
from gcl_jax.errors import ConfigError, UserError, reported_in_one_line
from gcl_jax.models.clip import abstract_model
from gcl_jax.optim import make_optimizer, trained_part
from gcl_jax.sharding import in_memory, make_mesh, param_spec, to_global
from gcl_jax.train.step import make_train_step


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "expected"),
    [
        ("visual proj", (768, 512), 2, P("fsdp")),
        ("visual proj", (512, 768), 2, P(None, "fsdp")),
        ("visual proj", (769, 512), 2, P(None, "fsdp")),
        ("visual proj", (769, 511), 2, P()),
        ("visual proj", (768, 512), 1, P()),
        ("visual proj", (100, 100), 2, P()),
        ("blocks kernel", (12, 768, 2304), 4, P(None, None, "fsdp")),
        ("blocks kernel", (4096, 8, 3), 4, P(None, "fsdp")),
        ("blocks kernel", (4096, 7, 3), 4, P()),
        ("text token_embedding", (49408, 512), 8, P(None, "fsdp")),
        ("text token_embedding", (49408, 513), 8, P("fsdp")),
        ("logit_scale", (), 2, P()),
    ],
)
def test_the_largest_divisible_dimension_is_split_never_the_scanned_one(
    path, shape, fsdp, expected
):
    keys = tuple(DictKey(name) for name in path.split())
    assert param_spec(keys, shape, fsdp) == expected


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(fsdp=4), (1, 2, 4)),
        (MeshConfig(4, 2), (1, 4, 2)),
        (MeshConfig(fsdp=2, slices=2), (2, 2, 2)),
    ],
)
def test_make_mesh_takes_all_devices(cfg, shape):
    assert make_mesh(cfg, 16).devices.shape == shape


@pytest.mark.parametrize(
    ("cfg", "batch_size", "message"),
    [
        (MeshConfig(data=3, fsdp=2), 16, "data=3 x fsdp=2 does not make the 8 devices"),
        (MeshConfig(fsdp=3), 24, "fsdp=3 does not make the 8 devices"),
        (MeshConfig(), 12, "12 is no multiple of the 8 devices"),
        (MeshConfig(slices=3), 24, "slices=3 x data=-1 x fsdp=1 does not make the 8 devices"),
        (MeshConfig(fsdp=8, slices=2), 16, "there are; data and fsdp are those of a slice"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(cfg, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(cfg, batch_size)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device that is not here."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = ""


def test_slices_are_those_that_the_devices_say():
    """Whatever their order; parameters stay within one. GPUs may be taken otherwise."""
    devices = [Device(i, slice_index=i % 2) for i in range(8)]
    for cfg in (MeshConfig(fsdp=2), MeshConfig(fsdp=2, slices=2)):
        made = make_mesh(cfg, 8, devices)
        assert made.devices.shape == (2, 2, 2)
        assert [[x.id for x in one.flat] for one in made.devices] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for cfg in (MeshConfig(fsdp=8), MeshConfig(fsdp=8, slices=1), MeshConfig(4, 2)):
        assert make_mesh(cfg, 8, devices).devices.shape == (1, 8 // cfg.fsdp, cfg.fsdp)
    assert make_mesh(MeshConfig(), 6, devices[:4] + devices[4::2]).devices.shape == (1, 6, 1)
    tpus = [dataclasses.replace(x, platform="tpu") for x in devices]
    with pytest.raises(ConfigError, match="slices=2 x data=-1 x fsdp=8 does not make the 8"):
        make_mesh(MeshConfig(fsdp=8), 8, tpus)
    with pytest.raises(ConfigError, match="slices=4, but the TPUs are 2 slices; set 0"):
        make_mesh(MeshConfig(slices=4), 8, tpus)


def test_to_global_splits_rows_over_all_devices_in_order(mesh):
    rows = np.arange(16, dtype=np.int32)
    made = to_global({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(made, rows)
    assert {shard.data.shape for shard in made.addressable_shards} == {(16 // mesh.size,)}


@pytest.fixture
def no_small_parameters(monkeypatch):
    """Else all parameters of the tiny towers but the largest are replicated."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
@pytest.mark.usefixtures("no_small_parameters")
def test_moments_and_averages_live_where_their_parameter_lives(mesh, tiny_config):
    optim = tiny_config.optim
    optim.freeze, optim.ema_decay = ("visual.ln_post", "text.token"), 0.9
    tx = make_optimizer(optim, 4, abstract_model(tiny_config.model)[1])
    state = init_state(tiny_config, tx, mesh)
    placement = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    trained = trained_part(optim, state.params)
    for moments in (*(optax.tree.get(state.opt_state, name) for name in ("mu", "nu")), state.ema):
        assert placement(moments) == placement(trained)
        kernel = moments["visual"]["transformer"]["blocks"]["attn"]["in_proj"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 16, 48 // 2)
    assert placement(abstract_state(tiny_config, tx, mesh)) == placement(state)


def train_three_steps(mesh, cfg, batch):
    """([metrics of each step], final state), on the host."""
    tx = make_optimizer(cfg.optim, 4, abstract_model(cfg.model)[1])
    state, step = init_state(cfg, tx, mesh), make_train_step(cfg, tx, mesh)
    history = []
    for _ in range(3):
        state, metrics = step(state, to_global(batch, mesh))
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state)


@pytest.mark.usefixtures("no_small_parameters")
def test_training_is_the_same_on_every_mesh(tiny_config, tiny_batch):
    """Three steps; the logit scale starts above its bound and is clamped by the first. Whichever
    way documents reach the queries, and in however many chunks the towers embed them."""
    tiny_config.model.max_logit_scale = 2.0
    tiny_config.optim.batch_size = 16
    tiny_batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), tiny_batch)
    history, state = train_three_steps(make_cpu_mesh(1, 1), tiny_config, tiny_batch)
    scales = [metrics["logit_scale"] for metrics in history]
    np.testing.assert_allclose(scales[:2], [1 / 0.07, np.exp(2)], rtol=1e-5)
    assert history[0]["loss"] > history[1]["loss"] > history[2]["loss"]
    assert state.step == 3

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for shape, form, chunks in (
        ((8, 1), "gather", 1),
        ((4, 2), "ring", 2),
    ):
        tiny_config.loss.form, tiny_config.optim.grad_cache_chunks = form, chunks
        other_history, other = train_three_steps(make_cpu_mesh(*shape), tiny_config, tiny_batch)
        jax.tree.map(close, other_history, history)
        jax.tree.map(close, other.params, state.params)
        jax.tree.map(
            lambda a, b: close(a, b, atol=1e-4 * np.abs(b).max()),
            optax.tree.get(other.opt_state, "mu"),
            optax.tree.get(state.opt_state, "mu"),
        )


def test_memory_saving_moments_are_the_same_on_every_mesh(tiny_config, tiny_batch):
    """Matrices of 128 x 128 and more are factored; their row and column means are on all devices,
    the momentum where its parameter is."""
    leave_out_images(tiny_config, tiny_batch)
    tiny_config.model.text.width = 128
    # The loss does not depend on the biases of keys: their gradients are rounding, made large.
    tiny_config.optim.freeze = (".*in_proj[.]bias",)
    tiny_config.optim.second_moment, tiny_config.optim.momentum_dtype = "factored", "bfloat16"
    history, state = train_three_steps(make_cpu_mesh(1, 1), tiny_config, tiny_batch)
    other_history, other = train_three_steps(make_cpu_mesh(4, 2), tiny_config, tiny_batch)
    blocks = optax.tree.get(state.opt_state, "v_row")["text"]["transformer"]["blocks"]
    assert blocks["mlp"]["c_fc"]["kernel"].shape == (1, 128)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), other_history, history)
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, other.params, state.params)


@pytest.mark.parametrize("name", ["lion", "sgd", "muon"])
@pytest.mark.usefixtures("no_small_parameters")
def test_any_optimizer_trains_split_parameters(name, tiny_config, tiny_batch):
    """With a frozen layer, slower ones and averages: the moments lie where their parameter does,
    and the step is the same as on one device."""
    optim = tiny_config.optim
    optim.optimizer, optim.lr, optim.warmup_steps = name, 1e-3, 0
    optim.layer_decay, optim.ema_decay = 0.5, 0.5
    optim.freeze = ("text", r"visual\.transformer\.blocks\.0\.", ".*in_proj[.]bias")
    tx = make_optimizer(optim, 4, abstract_model(tiny_config.model)[1])
    after = {}
    for shape in ((1, 1), (4, 2)) if name == "muon" else ((4, 2),):
        mesh = make_cpu_mesh(*shape)
        state = init_state(tiny_config, tx, mesh)
        before = jax.device_get(state.params)
        state, metrics = make_train_step(tiny_config, tx, mesh)(state, to_global(tiny_batch, mesh))
        assert metrics["skipped_steps"] == 0
        after[shape] = jax.device_get(state.params)
    blocks = lambda params: params["visual"]["transformer"]["blocks"]["mlp"]["c_fc"]["kernel"]
    changed = blocks(after[4, 2]) != blocks(before)
    assert not changed[0].any()
    assert changed[1].mean() > 0.9
    jax.tree.map(np.testing.assert_array_equal, after[4, 2]["text"], before["text"])
    kept = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "mlp']['c_fc']['kernel" in jax.tree_util.keystr(path)
    ]
    assert kept
    assert {x.sharding for x in kept} == {blocks(state.params).sharding}
    assert not blocks(state.params).sharding.is_fully_replicated
    if name == "muon":
        close = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, after[4, 2], after[1, 1])


# What XLA says, in its own words: of GPUs, TPUs (as they compile, load and run) and CPUs.
OUT_OF_MEMORY = {
    "Out of memory while trying to allocate 79623553024 bytes.": "74.16 GiB asked for at once",
    "Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM Debugging.\n"
    "BufferAssignment stats:\n     parameter allocation:  372.76MiB": "4.44 GiB asked for at once",
    "Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0": "2.99 GiB asked",
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G "
    "hbm.\n Exceeded hbm capacity by 6.47G.": "21.95 GiB asked for at once, 15.48 GiB there",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (64.00G) exceeds "
    "available HBM (15.75G).": "64.00 GiB asked for at once, 15.75 GiB there",
    "Error allocating device buffer: Attempting to allocate 129.50M. That was not possible. There "
    "are 78.17M free.; (0x0x0_HBM0)": "0.13 GiB asked for at once, 0.08 GiB there",
    "Attempting to reserve 10.51G at the bottom of memory. That was not possible. There are 8.97G "
    "free, 0B reserved, and 8.97G reservable.": "10.51 GiB asked for at once, 8.97 GiB there",
    "Out of memory allocating 17592186044416 bytes.": "16384.00 GiB asked for at once",
    "Underlying backend ran out of memory trying to instantiate command buffer": "out of memory",
}


@pytest.mark.parametrize(("said", "told"), OUT_OF_MEMORY.items())
def test_out_of_memory_is_one_line_with_its_figures(said, told, capsys):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")
    with (
        pytest.raises(UserError, match=f"{told}.*; lower the batch") as raised,
        in_memory(lambda: "lower the batch"),
    ):
        raise error
    assert "\n" not in str(raised.value)
    with pytest.raises(SystemExit), reported_in_one_line():
        raise error
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory")
    assert told in printed
    assert printed.count("\n") == 1


def test_other_errors_of_xla_pass():
    for scope in (in_memory(str), reported_in_one_line()):
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), scope:
            raise jax.errors.JaxRuntimeError("INTERNAL: 3.00G")
