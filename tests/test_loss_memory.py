"""What the compiled loss holds and sends, read from the compiler's output: on eight CPU devices,
and for a slice of real TPUs, for which the compiler needs none."""

import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from jax.sharding import AxisType, Mesh

from gcl_jax.config import LossConfig
from gcl_jax.losses.contrastive import gcl_loss, gcl_losses
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.pairs import KnownWeights, PairRows
from gcl_jax.registry import OBJECTIVES
from gcl_jax.sharding import BATCH_AXES, batch_sharding, replicated

DIM = 128
# Half of what a device has of the smallest batch, so that tiles are as large for all of them.
BLOCK_SIZE = 128
COLLECTIVES = ("all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def tpu_mesh() -> Mesh:
    """A v5e slice of 4 x 4 chips."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu (the [tpu] extra)")
    from jax.experimental import topologies

    # Else libtpu asks the metadata server of a machine that is no TPU host.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Nobody drives a chip here, so other processes may have loaded it too.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    devices = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu").devices
    return Mesh(np.array(devices).reshape(1, 8, 2), BATCH_AXES, axis_types=(AxisType.Auto,) * 3)


def compile_loss(
    mesh: Mesh, batch: int, form: str, is_known: bool, dim: int = DIM, dtype=jnp.float32
):
    """The compiled (value, gradients by queries, documents and scale)."""
    rows, everywhere = batch_sharding(mesh), replicated(mesh)

    def array(shape, dtype=jnp.float32, sharding=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    one_each = lambda dtype: array((batch,), dtype, rows)
    pairs = PairRows(*map(one_each, (jnp.float32, jnp.bool, jnp.int32, jnp.int32)))
    table = [array((1001,), jnp.int32), array((10_000,), jnp.int32), array((10_000,))]
    known = KnownWeights(*table, search_steps=7) if is_known else None

    def loss(queries, documents, logit_scale, pairs, known):
        options = {"mesh": mesh, "form": form, "block_size": BLOCK_SIZE, "mask_duplicates": True}
        return gcl_loss(queries, documents, logit_scale, pairs, known=known, **options)

    return (
        jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1, 2)),
            out_shardings=(everywhere, (rows, rows, everywhere)),
        )
        .lower(*[array((batch, dim), dtype, rows)] * 2, array(()), pairs, known)
        .compile()
    )


def bytes_per_device(program) -> int:
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def largest_array(text: str) -> int:
    """The number of elements of the largest array of the program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|u32|pred)\[(\d[\d,]*)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def sent(text: str) -> set[str]:
    """Which of `COLLECTIVES` the program uses."""
    return {name for name in COLLECTIVES if re.search(rf" {name}(-start)?\(", text)}


def check(mesh: Mesh, batches, form: str, is_known: bool) -> None:
    programs = {batch: compile_loss(mesh, batch, form, is_known) for batch in batches}
    needed = [bytes_per_device(program) / batch for batch, program in programs.items()]
    assert max(needed[1:]) <= 1.05 * needed[0]
    for batch, program in programs.items():
        text = program.as_text()
        # The documents with their gradients, less than any N x N or (N / devices) x N array.
        assert largest_array(text) <= 2 * batch * DIM < batch // mesh.size * batch
        if form == "gather":
            assert {"all-gather", "reduce-scatter"} <= sent(text)
        else:
            assert sent(text) == {"collective-permute"}


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize("is_known", [False, True])
def test_memory_is_linear_and_documents_go_the_stated_way(form, is_known):
    check(make_cpu_mesh(4, 2), (4096, 16384, 65536), form, is_known)


@pytest.mark.parametrize(
    ("form", "is_known"), [pytest.param("gather", True, marks=pytest.mark.slow), ("ring", False)]
)
def test_on_a_tpu_slice_too(form, is_known):
    """Of batches so large that they do not fit into the vector memory, which is not counted."""
    check(tpu_mesh(), (262144, 393216), form, is_known)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["circle", "roar", "lambdaloss", "filip"])
def test_other_objectives_hold_no_rows_of_logits(name):
    """Nor of known weights: less than a device's share of one matrix; filip of four tokens each."""
    mesh, pairs = make_cpu_mesh(4, 2), 8192
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    struct = jax.ShapeDtypeStruct
    one, tokens = OBJECTIVES[name], 4 if OBJECTIVES[name].needs_tokens else 1
    shape = (pairs, tokens, DIM // tokens) if tokens > 1 else (pairs, DIM)
    x = struct(shape, jnp.float32, sharding=rows)
    kinds = jnp.float32, jnp.bool, jnp.int32, jnp.int32
    described = PairRows(*(struct((pairs,), kind, sharding=rows) for kind in kinds))
    table = ((1001,), jnp.int32), ((10_000,), jnp.int32), ((10_000,), jnp.float32)
    known = KnownWeights(*(struct(*x, sharding=everywhere) for x in table), search_steps=7)

    def loss(queries, documents, described, known):
        term = Term("", "", described)
        options = {"mesh": mesh, "known": known, "block_size": BLOCK_SIZE}
        logits = Logits({"": queries}, {"": documents}, 20.0, [term], **options)
        losses = gcl_losses if one.needs_tokens else one.function
        return losses(logits, LossConfig())[0]

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(x, x, described, known).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * pairs**2 / 8 * 4
