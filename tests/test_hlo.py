"""Collectives, of small programs written by hand in each compiler's way, and of real ones."""

import jax
import jax.numpy as jnp
import pytest
from conftest import make_cpu_mesh
from jax.sharding import NamedSharding, PartitionSpec

from gcl_jax.config import MeshConfig
from gcl_jax.plan.hlo import Collective, read_collectives, read_program
from gcl_jax.plan.topology import open_topology
from gcl_jax.sharding import make_mesh
from tests.test_loss_memory import compile_loss, tpu_mesh

WEIGHT = (12, 512, 2048)


def read(body: str, more: str = "", batch: int = 4096, fsdp: int = 1) -> list[Collective]:
    text = f"HloModule m\n{more}\nENTRY %main.1 (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return read_collectives(read_program(text), 16, batch, [WEIGHT], fsdp)


ALL = "replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        (ALL, 16),
        ("replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", 4),
        ("replica_groups=[4,4]<=[16]", 4),
        ("replica_groups=[2,8]<=[8,2]T(1,0)", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 8),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=4], device_ids=([4,4]T(1,0)) {'b'}", 4),
        ("replica_groups={}", 16),
    ],
)
def test_a_ring_sends_all_but_its_own_share(groups, size):
    line = (
        f"  %all-reduce.1 = f32[512,2048]{{1,0:T(8,128)}} all-reduce(%p), {groups}, to_apply=%add"
    )
    (found,) = read(line)
    assert found[:4] == ("all-reduce", "gradients", 1, 2 * 4 * 512 * 2048 * (size - 1) / size)


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("bf16[512,2048]{1,0} all-gather(%p)", "all-gather", 2 * 512 * 2048 * 15 / 16),
        (
            "(bf16[32,2048]{1,0}, bf16[512,2048]{1,0}) all-gather-start(%p)",
            "all-gather",
            2 * 512 * 2048 * 15 / 16,
        ),
        ("f32[32,2048]{1,0} reduce-scatter(%p)", "reduce-scatter", 4 * 512 * 2048 * 15 / 16),
        (
            "(f32[512,2048]{1,0}, f32[32,2048]{1,0}) reduce-scatter-start(%p)",
            "reduce-scatter",
            4 * 512 * 2048 * 15 / 16,
        ),
        ("f32[512,2048]{1,0} collective-permute(%p)", "collective-permute", 4 * 512 * 2048),
        (
            "(f32[512,2048]{1,0}, f32[512,2048]{1,0}, u32[], u32[]) collective-permute-start(%p)",
            "collective-permute",
            4 * 512 * 2048,
        ),
        ("f32[512,2048]{1,0} all-to-all(%p)", "all-to-all", 4 * 512 * 2048 * 15 / 16),
        ("f32[512,2048]{1,0} all-reduce-start(%p)", "all-reduce", 8 * 512 * 2048 * 15 / 16),
    ],
)
def test_what_each_kind_sends(line, kind, sent):
    (found,) = read(f"  %x.1 = {line}, {ALL}")
    assert (found.kind, found.sent) == (kind, sent)


def test_the_end_of_an_asynchronous_one_is_not_a_second():
    body = f"""  %s = (bf16[32,2048], bf16[512,2048]) all-gather-start(%p), {ALL}
  %d = bf16[512,2048] all-gather-done(%s)"""
    assert [c.times for c in read(body)] == [1]


GATHER = f"  %s = (bf16[32,2048], bf16[512,2048]) all-gather-start(%p), {ALL}"
DONE = "  %d = bf16[512,2048] all-gather-done(%s)"
ALIAS = "  %b = f32[8] bitcast(%p)"
WORKS = "  %f = f32[8] fusion(%p), kind=kLoop, calls=%fused"


@pytest.mark.parametrize(
    ("lines", "exposed"),
    [
        ([f"  %s = bf16[512,2048] all-gather(%p), {ALL}", WORKS], True),
        ([GATHER, DONE, WORKS], True),
        ([WORKS, GATHER, ALIAS, DONE], True),
        ([GATHER, ALIAS, WORKS, DONE], False),
    ],
    ids=["blocking", "ends at once", "nothing but names between", "computes meanwhile"],
)
def test_a_collective_is_exposed_unless_something_computes_meanwhile(lines, exposed):
    (found,) = read("\n".join(lines))
    assert found.sent > 0
    assert found.exposed == (found.sent if exposed else 0.0)


@pytest.mark.parametrize("kind", ["async-start", "call-start"])
def test_a_collective_in_a_wrapper_of_its_own(kind):
    """As the NVIDIA compiler starts a reduce-scatter, and that of TPU7x on its SparseCores."""
    more = f"""%wrapped (p: f32[8]) -> f32[8] {{
  %reduce-scatter.1 = f32[32,2048] reduce-scatter(%p), {ALL}
}}
"""
    calls = "calls" if kind == "async-start" else "to_apply"
    start = f"  %s = ((f32[512,2048]), f32[32,2048]) {kind}(%p), {calls}=%wrapped"
    done = f"  %d = f32[32,2048] {kind.replace('start', 'done')}(%s)"
    (hidden,) = read("\n".join([start, WORKS, done]), more)
    (exposed,) = read("\n".join([start, done]), more)
    assert hidden.sent == exposed.sent == exposed.exposed == 4 * 512 * 2048 * 15 / 16
    assert hidden.exposed == 0


@pytest.mark.parametrize(
    ("said", "kind", "part", "share"),
    [
        ("ALL_REDUCE", "all-reduce", "gradients", 2 * 1 / 2),
        ("REDUCE_SCATTER", "reduce-scatter", "loss", 1 / 2),
        ("ALL_GATHER", "all-gather", "loss", 1),
        ("ALL_TO_ALL", "all-to-all", "loss", 1 / 2),
        ("ONE_TO_ONE", "collective-permute", "loss", 2 / 8),
    ],
)
def test_between_tpu_slices_are_transfers_of_their_hosts(said, kind, part, share):
    """As the compiler makes them for two slices of four chips, of which two exchange something."""
    target = "{{100000->200003},{200000->100003}}" if said == "ONE_TO_ONE" else '"{1,2}x{0:3}"'
    names = f'_xla_host_transfer_rendezvous="r",_xla_megascale_target={target}'
    names = f'frontend_attributes={{{names},_xla_megascale_transfer_type="{said}"}}'
    for meanwhile, hidden in ((ALIAS, False), (WORKS, True)):
        body = f"""  %t = token[] after-all()
  %r = (f32[128,8,128], u32[], token[]) recv(%t), {names}
  %s = (f32[128,8,128], u32[], token[]) send(%p, %t), {names}
  %sd = token[] send-done(%s)
{meanwhile}
  %rd = (f32[128,8,128], token[]) recv-done(%r)"""
        program = read_program(f"ENTRY %main.1 (p: f32[8]) -> f32[8] {{\n{body}\n}}\n")
        (found,) = read_collectives(program, 8, 64, [], slices=2)
        sent = 4 * 128 * 8 * 128 * share
        assert found == (kind, part, 1, sent, 0.0 if hidden else sent, "dcn")


CONDITION = """%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
"""
BODY = f"""%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %all-gather.1 = bf16[1,512,2048]{{2,1,0}} all-gather(%p), {ALL}
}}
"""


@pytest.mark.parametrize(
    ("condition", "known"),
    [(CONDITION, ""), ("%cond.1 {\n}\n", ', backend_config={"known_trip_count":{"n":"12"}}')],
)
def test_what_stands_in_a_loop_runs_as_often_as_it_turns(condition, known):
    loop = f"  %while.1 = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1{known}"
    (found,) = read(loop, condition + BODY)
    assert found[:4] == ("all-gather", "parameters", 12, 12 * 2 * 512 * 2048 * 15 / 16)


def test_a_collective_in_several_fusions_of_a_tpu_counts_once():
    """It starts in one, goes on in others while these compute, and ends in a third."""
    inner = f"  %all-gather.1 = f32[4096,512]{{1,0}} all-gather(%p), {ALL}"
    more = "".join(
        f"%{name} (p: f32[8]) -> f32[8] {{\n{inner}\n}}\n"
        for name in ("fused_computation.1", "async_collective_fusion.2", "fused_computation.3")
    )
    body = """  %async-collective-start = (f32[8]) fusion(%p), calls=%fused_computation.1
  %fusion.7 = f32[8] fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  %async-collective-done = f32[8] fusion(%p), calls=%fused_computation.3"""
    (found,) = read(body, more)
    assert found[:5] == ("all-gather", "loss", 1, 4 * 4096 * 512 * 15 / 16, 0.0)


def test_an_all_reduce_fused_with_its_slice_is_a_reduce_scatter():
    more = f"""%all-reduce-scatter.1 (p: f32[8]) -> f32[8] {{
  %all-reduce.1 = bf16[512,2048]{{1,0}} all-reduce(%p), {ALL}
}}
"""
    fusion = "  %f = bf16[128,2048] fusion(%p), calls=%all-reduce-scatter.1"
    (found,) = read(fusion, more)
    assert found[:4] == ("reduce-scatter", "gradients", 1, 2 * 512 * 2048 * 15 / 16)
    of_loss = f'{fusion}, metadata={{op_name="jit(f)/shard_map/reduce_scatter"}}'
    assert read(of_loss, more.replace("[512,", "[500,"))[0].part == "loss"


def test_a_collective_without_a_name_is_of_what_made_its_operand():
    """As the TPU compiler leaves a reduce-scatter that it had to fill up: 672 for 640 rows."""
    more = f"""%all-reduce-scatter.1 (p: f32[8]) -> f32[8] {{
  %all-reduce.1 = f32[10752,512]{{1,0}} all-reduce(%p), {ALL}
}}
"""
    body = """  %g = f32[10240,512] gather(%w), metadata={op_name="jit(f)/shard_map/while"}
  %b = f32[10240,512] bitcast(%g)
  %f = f32[672,512] fusion(%b), calls=%all-reduce-scatter.1
  %c = f32[672,512] collective-permute(%f), source_target_pairs={{0,1}}"""
    assert {c.part for c in read(body, more, batch=10240)} == {"loss"}
    assert "loss" not in {c.part for c in read(body.replace("shard_map", "x"), more, batch=10240)}


def test_parts_by_shape_where_names_were_merged():
    def part(
        shape: str, kind: str = "all-gather", name: str = "jit(f)/dot", batch: int = 4096
    ) -> str:
        line = f'  %x = {shape} {kind}(%p), {ALL}, metadata={{op_name="{name}"}}'
        return read(line, batch=batch, fsdp=4)[0].part

    assert part("bf16[1,512,512]") == "parameters"  # a fourth of a layer of `WEIGHT`
    assert part("bf16[12,512,2048]") == "parameters"
    assert part("bf16[1024,77,512]") == "activations"
    assert part("s32[512,2048]") == "activations"  # tokens
    assert part("s32[4096,77]", name="jit(f)/shard_map/all_gather") == "activations"
    assert part("f32[4096,512]") == "loss"
    assert part("f32[512,2048]", "all-reduce", batch=512) == "gradients"
    assert part("f32[16,1,256]", name="jit(f)/shard_map/all_gather") == "loss"
    # The compiler gives a merged all-reduce the name of one of its parts.
    assert part("bf16[512,2048]", "all-reduce", "jit(f)/shard_map/psum") == "gradients"
    merged = f"  %x = (f32[4096], f32[512,2048], f32[]) all-reduce(%p), {ALL}"
    assert {c.part for c in read(merged)} == {"loss", "gradients"}
    merged = f"  %x = (f32[256,300], f32[32,2048]) reduce-scatter(%p), {ALL}"
    named = f'{merged}, metadata={{op_name="jit(f)/shard_map/reduce_scatter"}}'
    sent = {c.part: c.sent for c in read(named, fsdp=16)}
    assert sent == {"loss": 4 * 256 * 300 * 15, "gradients": 4 * 32 * 2048 * 15}


def test_a_real_scan_gathers_each_layer_once_per_pass():
    mesh = make_cpu_mesh(1, 8)
    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def forward(weights, x):
        def layer(x, w):
            return x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec())), 0

        return jax.lax.scan(layer, x, weights)[0]

    given = [jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)]
    given.append(jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows))
    text = jax.jit(forward, out_shardings=rows).lower(*given).compile().as_text()
    (found,) = read_collectives(read_program(text), 8, 16, [(5, 64, 64)], 8)
    assert found.part == "parameters"
    assert found.sent == 5 * 4 * 64 * 64 * 7 / 8


@pytest.mark.parametrize("where", ["cpu", "tpu"])
@pytest.mark.parametrize(("form", "per_element"), [("gather", 6), ("ring", 8)])
def test_the_loss_sends_what_the_formula_says(form, per_element, where):
    """performance: Loss. Documents in bfloat16, their gradients in float32."""
    batch, dim = 16384, 512
    mesh = make_cpu_mesh(4, 2) if where == "cpu" else tpu_mesh()
    # A CPU multiplies, and sends, no bfloat16.
    dtype, more = (jnp.float32, 2) if where == "cpu" else (jnp.bfloat16, 0)
    program = compile_loss(mesh, batch, form, False, dim, dtype)
    found = read_collectives(read_program(program.as_text()), mesh.size, batch, [])
    # Documents travel once in the gather, twice in the ring.
    expected = (per_element + more * (1 if form == "gather" else 2)) * batch * dim
    if form == "gather":
        expected *= (mesh.size - 1) / mesh.size
    assert sum(c.sent for c in found if c.part == "loss") == pytest.approx(expected, rel=0.05)
    assert sum(c.sent for c in found if c.part != "loss") < 0.001 * expected


@pytest.mark.parametrize(
    ("layout", "slices", "form"),
    [
        ("2x2", 2, "gather"),
        pytest.param("16x16", 2, "gather", marks=pytest.mark.slow),
        pytest.param("16x16", 2, "ring", marks=pytest.mark.slow),
        pytest.param("16x16", 4, "gather", marks=pytest.mark.slow),
        pytest.param("16x16", 4, "ring", marks=pytest.mark.slow),
    ],
)
def test_the_loss_crosses_slices_once_and_not_for_each_device(layout, slices, form):
    """docs/pods.md: Several slices. A slice sends documents and their gradients, each row once to
    each of the others; in the ring all that it holds to the next, as often as there are slices."""
    tpu_mesh()  # skips without libtpu
    target = open_topology(f"v5e:{layout}*{slices}")
    devices = len(target.devices)
    batch, dim = 128 * devices, 512
    mesh = make_mesh(MeshConfig(fsdp=2), batch, target.devices)
    program = compile_loss(mesh, batch, form, False, dim, jnp.bfloat16)
    text = program.as_text()
    found = read_collectives(read_program(text), devices, batch, [], 2, slices)
    sent = {
        network: sum(c.sent for c in found if c.part == "loss" and c.network == network)
        for network in ("ici", "dcn")
    }
    all_rows = batch * dim * (6 if form == "gather" else 8)
    across = all_rows * ((slices - 1) / slices if form == "gather" else 1)
    assert sent["dcn"] * devices / slices == pytest.approx(across, rel=0.05)
    of_slice = devices // slices
    within = all_rows * ((of_slice - 1) / of_slice if form == "gather" else 1)
    assert sent["ici"] == pytest.approx(within, rel=0.05)
