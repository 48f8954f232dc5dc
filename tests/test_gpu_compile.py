"""Programs compiled for an H100 that is not here: what they hold, compute, read and write.

`make test-gpu-compile` runs these in an environment of its own, with jax's CUDA plugin.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from gcl_jax.losses.contrastive import gcl_loss
from gcl_jax.losses.pairs import KnownWeights, PairRows
from gcl_jax.models.layers import attention
from gcl_jax.models.presets import PRESETS, preset
from gcl_jax.plan import planner
from gcl_jax.plan.hlo import Program, read_program
from gcl_jax.plan.topology import CUDA_PLUGINS, open_topology
from gcl_jax.plan.work import read_work
from gcl_jax.search import mesh_search
from gcl_jax.search.index import TILE
from gcl_jax.sharding import batch_sharding, make_mesh, replicated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS),
        reason="needs jax's CUDA plugin (the [cuda] extra)",
    ),
]

# Names, loops, and what only holds others.
STARTS_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all",
}  # fmt: skip


def resolved(model: ModelConfig, **options) -> tuple[TrainConfig, planner.Data]:
    """A text as the query, an image as the document; in bfloat16, the rest at its defaults."""
    model.dtype = "bfloat16"
    fields = {"query_fields": {"query": 1.0}, "document_fields": {"image": 1.0}}
    data = DataConfig(store="none", **fields)
    return planner.resolve(TrainConfig(model=model, data=data, optim=OptimConfig(**options)))


def attention_flops(model: ModelConfig) -> float:
    """Of the scores and weighted sums of a pair in training, which cuDNN computes, not a product of
    the program: in all blocks but the last, which has a single query."""
    assert model.vision is not None
    towers = [
        (model.vision, (model.vision.image_size // model.vision.patch_size) ** 2 + 1),
        (model.text, model.text.context_length),
    ]
    return 3 * sum(4 * t**2 * tower.width * (tower.layers - 1) for tower, t in towers)


@pytest.mark.parametrize(
    ("name", "batch", "gib"),
    [
        ("ViT-L-14", 128, 24),
        ("ViT-L-14", 256, 40),
        ("ViT-B-16", 512, 25),
        ("ViT-B-32", 1024, 24),
    ],
)
def test_default_settings_fit_and_compute_no_product_twice(name, batch, gib):
    cfg, data = resolved(preset(name), batch_size=batch)
    plan = planner.compile_plan(cfg, data, open_topology("h100:1"))
    assert plan.temporaries <= gib * 2**30
    once = plan.tower_flops - batch * attention_flops(cfg.model) + plan.loss_flops
    assert 0.97 * once < plan.work.flops < 1.01 * once


def test_each_preset_trains():
    """jax refuses what its cuDNN attention cannot when it is traced."""
    seen = set()
    for name in PRESETS:
        model = preset(name)
        text = model.text
        seen.add((text.context_length, text.width // text.heads, text.causal))
        if vision := model.vision:
            patches = (vision.image_size // vision.patch_size) ** 2
            seen.add((patches + (vision.pool == "tok"), vision.head_width, False))
    assert {(257, 64, False), (77, 64, True), (257, 88, False)} <= seen
    for t, channels, is_causal in seen:
        q = k = v = jax.ShapeDtypeStruct((2, t, 2, channels), jnp.bfloat16)

        def summed(q, k, v, is_causal=is_causal):
            options = {"is_causal": is_causal, "lengths": None, "implementation": "cudnn"}
            return jnp.sum(attention(q, k, v, **options).astype(jnp.float32))

        traced = jax.jit(jax.grad(summed, (0, 1, 2))).trace(q, k, v)
        assert "dot_product_attention_bwd" in str(traced.jaxpr)


SMALL = {"width": 128, "layers": 2}


@pytest.mark.parametrize(("fsdp", "chunks"), [(1, 2), (8, 1)])
def test_attention_stays_on_its_device(fsdp, chunks):
    """Eight GPUs, batch split or parameters too; in chunks, which each device has of its own."""
    vision = VisionConfig(image_size=48, patch_size=16, **SMALL)
    text = TextConfig(context_length=13, heads=2, vocab_size=512, **SMALL)
    model = ModelConfig(embed_dim=64, vision=vision, text=text)
    cfg, data = resolved(model, batch_size=64, grad_cache_chunks=chunks)
    cfg.mesh.fsdp = fsdp
    topology = open_topology("h100:8")
    mesh = make_mesh(cfg.mesh, 64, topology.devices)
    compiled = planner.lower(cfg, data, mesh)[0].compile(compiler_options=topology.compiler_options)
    kernels = re.findall(r"bf16\[(\d+),[^=]* custom-call\(.*__cudnn\$fmha", compiled.as_text())
    assert kernels
    assert set(kernels) == {str(64 // 8 // chunks)}


def compiled_loss(batch: int, devices: int = 1, search_steps: int = 0, **options):
    """The compiled (value, gradients) of `gcl_loss` with 512 dimensions in bfloat16; known weights
    of lists of up to 2^`search_steps` documents, if any."""
    target = open_topology(f"h100:{devices}")
    mesh = make_mesh(MeshConfig(), batch, target.devices)
    array = lambda sharding, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    of_pairs = functools.partial(array, batch_sharding(mesh))
    number = array(replicated(mesh), jnp.float32)
    kinds = jnp.float32, jnp.bool_, jnp.int32, jnp.int32
    rows = PairRows(*(of_pairs(kind, batch) for kind in kinds))
    known = None
    if search_steps:
        table = (jnp.int32, 78_001), (jnp.int32, 3_930_000), (jnp.float32, 3_930_000)
        arrays = (array(replicated(mesh), *one) for one in table)
        known = KnownWeights(*arrays, search_steps=search_steps)

    def loss(queries, documents, scale, rows, known):
        return gcl_loss(queries, documents, scale, rows, mesh=mesh, known=known, **options)

    embeddings = of_pairs(jnp.bfloat16, batch, 512)
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(
        embeddings, embeddings, number, rows, known
    )
    return lowered.compile(compiler_options=target.compiler_options)


def kernels_started(program: Program) -> int:
    return sum(
        times
        for name, times in program.runs.items()
        for one in program.computations[name]
        if one.opcode not in STARTS_NOTHING and not one.opcode.endswith("-done")
    )


@pytest.mark.parametrize(
    ("kernel", "traffic", "started", "held"), [("triton", 12, 100, 0.7), ("xla", 45, 650, 0.6)]
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_the_loss_of_32768_pairs(kernel, traffic, started, held):
    """GiB read and written, kernels, GiB of temporary memory."""
    compiled = compiled_loss(32_768, kernel=kernel)
    program = read_program(compiled.as_text())
    assert read_work(program).memory < traffic * 2**30
    assert kernels_started(program) <= started
    assert compiled.memory_analysis().temp_size_in_bytes < held * 2**30


@pytest.mark.parametrize("kernel", ["xla", "triton"])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_the_loss_of_known_targets_has_no_loop_of_unknown_length(kernel):
    """Also of lists that are looked up in several turns, on several devices."""
    text = compiled_loss(8192, devices=8, search_steps=9, kernel=kernel).as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    assert all("known_trip_count" in line for line in loops)


def test_search_selects_and_never_sorts():
    """2,000,000 documents of 512 dimensions, the best 100, 2,048 queries: the program that every
    chunk and every tile of queries goes through, and that of the search page's few queries."""
    target = open_topology("h100:1")
    mesh = jax.sharding.Mesh(np.array(target.devices), ("data",))

    def of(shape, dtype, *spec):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    lanes, kept, number = mesh_search.LANES[0], mesh_search.KEPT, of((), jnp.int32)
    chunk = of((mesh_search.CHUNK, 512), jnp.bfloat16, "data")
    for queries in (TILE, mesh_search.FEW):
        best = tuple(of((queries, lanes, kept), x, None, "data") for x in (jnp.float32, jnp.int32))
        asked = of((queries, 512), jnp.bfloat16)
        lowered = mesh_search._merge_chunk.lower(best, asked, chunk, number, number, mesh)
        compiled = lowered.compile(compiler_options=target.compiler_options)
        program = read_program(compiled.as_text())
        calls = [one for one in program.by_name.values() if one.opcode == "custom-call"]
        (product,) = (one for one in calls if "__cublas" in one.line)
        dtypes = [program.by_name[name].arrays[0].dtype for name in product.operands]
        assert dtypes == ["bf16", "bf16"]
        assert sum("__gpu$TopK" in one.line for one in calls) == 2
        assert not any(one.opcode == "sort" for one in program.by_name.values())
        assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * 2**30
        assert read_work(program).memory < (5 if queries == TILE else 1) * 2**30
