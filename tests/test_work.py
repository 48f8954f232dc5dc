"""What a program computes and moves: hand-written ones, and real ones against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from gcl_jax.plan.hlo import arrays, read_program
from gcl_jax.plan.work import Moved, product_flops, read_work


def program(body: str, more: str = ""):
    return read_program(
        f"HloModule m\n{more}\nENTRY %main.1 (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


def test_what_an_array_takes_in_tiles():
    """Logits of 50 tokens, as ViT-B-32's lie on a TPU: 64 becomes 128 lanes, 50 seven groups."""
    (logits,) = arrays("bf16[256,12,64,50]{2,3,1,0:T(8,128)(2,1)}")
    assert logits.size == 2 * 256 * 12 * 64 * 50
    assert logits.laid_out == 2 * 256 * 12 * 128 * 56
    assert logits.space == 0
    vector, scalar, plain = arrays("(f32[130]{0:T(128)S(1)}, s32[]{:T(128)}, pred[3,50]{1,0})")
    assert (vector.size, vector.laid_out, vector.space) == (520, 1024, 1)
    assert (scalar.size, scalar.laid_out) == (4, 4)
    assert (plain.size, plain.laid_out) == (150, 150)


def compiled(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def products(text: str) -> float:
    found = read_program(text)
    return sum(product_flops(one, found)[0] for one in found.by_name.values())


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 3), "padding": "VALID"},
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (3, 1), "padding": ((4, 1), (-1, 2)), "lhs_dilation": (2, 1)},
        {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (1, 2)},
    ],
)
def test_convolutions_as_xla_counts_them(options):
    layout = ("NHWC", "HWIO", "NHWC")
    program = compiled(
        lambda x, w: jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options),
        (2, 9, 8, 5),
        (3, 4, 5, 7),
    )
    assert products(program.as_text()) == program.cost_analysis()["flops"] > 0


def test_products_of_a_scan_count_as_often_as_it_turns():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    program = compiled(layers, (16, 64), (5, 64, 64))
    found = read_work(read_program(program.as_text()))
    assert found.flops == 5 * 2 * 16 * 64 * 64
    assert found.padded == 5 * 2 * 16 * 128 * 128
    # Each turn reads its own layer: all of them in every turn alone would be more.
    assert found.memory < 5 * 5 * 4 * 64 * 64


BATCHED = """  %q = bf16[128,2,12,64]{3,2,1,0} parameter(0)
  %k = bf16[128,2,12,64]{3,2,1,0} parameter(1)
  %x = bf16[128,64,1]{2,1,0} parameter(2)
  %w = bf16[32,12,128]{2,1,0} parameter(3)
"""


@pytest.mark.parametrize(
    ("line", "flops", "padded"),
    [
        (
            "f32[128,2,12,12]{3,2,1,0} convolution(%q, %k), window={size=128x2 stride=127x1 "
            "lhs_dilate=128x2}, dim_labels=01bf_01oi->01bf",
            2 * 128 * 2 * 12 * 12 * 64,
            2 * 128 * 2 * 16 * 128 * 128,
        ),
        (
            "bf16[64,12,32]{2,1,0} convolution(%x, %w), window={size=12 pad=11_11 rhs_reversal=1}, "
            "dim_labels=fb0_o0i->b0f",
            2 * 64 * 12 * 32 * 128,
            2 * 12 * 128 * 32 * 128,
        ),
        (
            "f32[128,2,12,12]{3,2,1,0} dot(%q, %k), lhs_batch_dims={0,1}, "
            "lhs_contracting_dims={3}, rhs_batch_dims={0,1}, rhs_contracting_dims={3}",
            2 * 128 * 2 * 12 * 12 * 64,
            2 * 128 * 2 * 16 * 128 * 128,
        ),
        (
            "(f32[128,2,12,12]{3,2,1,0}, s8[4096]{0}) custom-call(%q, %k), "
            'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
            '"dot_dimension_numbers":{"lhs_contracting_dimensions":["3"],'
            '"rhs_contracting_dimensions":["3"],"lhs_batch_dimensions":["0","1"]}}}',
            2 * 128 * 2 * 12 * 12 * 64,
            2 * 128 * 2 * 16 * 128 * 128,
        ),
    ],
    ids=["a TPU's batches", "a TPU's rows within the window", "dot", "cuBLAS"],
)
def test_products_in_each_compilers_way(line, flops, padded):
    found = program(f"{BATCHED}  ROOT %r = {line}")
    work = read_work(found)
    assert (work.flops, work.padded) == (flops, padded)
    item = 4 if "f32" in line else 2
    operands = ("q", "k") if "%q" in line else ("x", "w")
    read = sum(found.by_name[name].arrays[0].size for name in operands)
    assert work.memory == read + item * flops / 2 / (128 if "%w" in line else 64)


FUSED = """%cast (a: f32[8,100]) -> bf16[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  ROOT %c = bf16[8,100]{1,0} convert(%a)
}
%turned (a: f32[8,100]) -> bf16[100,8] {
  %a.1 = f32[8,100]{1,0} parameter(0)
  %t = f32[100,8]{1,0} transpose(%a.1), dimensions={1,0}
  ROOT %c.1 = bf16[100,8]{1,0} convert(%t)
}
%scaled (a: f32[8,100]) -> bf16[8,100] {
  %a.2 = f32[8,100]{1,0} parameter(0)
  %m = f32[8,100]{1,0} multiply(%a.2, %a.2)
  ROOT %c.2 = bf16[8,100]{1,0} convert(%m)
}
%sliced (a: f32[12,8,100], i: s32[], u: f32[1,8,100]) -> f32[12,8,100] {
  %a.3 = f32[12,8,100]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b.3 = f32[12,800]{1,0} parameter(2)
  %z = f32[12,8,100]{2,1,0} bitcast(%b.3)
  %s = f32[1,8,100]{2,1,0} dynamic-slice(%z, %i), dynamic_slice_sizes={1,8,100}
  ROOT %d = f32[12,8,100]{2,1,0} dynamic-update-slice(%a.3, %s, %i)
}
"""
START = "  %p = f32[8,100]{1,0:T(8,128)} parameter(0)\n"


@pytest.mark.parametrize(
    ("line", "copies", "casts"),
    [
        ("bf16[8,100]{1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%cast", 0, 1),
        ("bf16[8,100]{1,0} convert(%p)", 0, 1),
        ("bf16[100,8]{1,0} fusion(%p), kind=kLoop, calls=%turned", 1, 0),
        ("f32[8,100]{0,1} copy(%p)", 1, 0),
        ("f32[8,100]{1,0:T(8,128)S(1)} copy(%p)", 0, 0),
        ("bf16[8,100]{1,0} fusion(%p), kind=kLoop, calls=%scaled", 0, 0),
    ],
)
def test_what_is_a_copy_or_a_cast_and_nothing_else(line, copies, casts):
    work = read_work(program(f'{START}  ROOT %r = {line}, metadata={{op_name="jit(f)/x"}}', FUSED))
    assert (work.copies.times, work.casts.times) == (copies, casts)
    assert [one.name for one in work.culprits] == ["jit(f)/x"] * (copies + casts)


def test_padding_and_loops():
    """Twelve turns of a cast, out of and into tiles of which a hundred columns leave 28 empty."""
    body = """%cond.1 (p: s32[]) -> pred[] {
}
%body.1 (p: f32[8,100]) -> f32[8,100] {
  %p.1 = f32[8,100]{1,0:T(8,128)} parameter(0)
  ROOT %c.5 = bf16[8,100]{1,0:T(8,128)(2,1)} convert(%p.1)
}
"""
    loop = "  ROOT %w = f32[8,100] while(%p), condition=%cond.1, body=%body.1, "
    loop += 'backend_config={"known_trip_count":{"n":"12"}}'
    work = read_work(program(START + loop, body))
    assert work.casts == Moved(12, 12 * 6 * 8 * 128)
    assert work.memory == work.casts.bytes
    assert work.padding == 12 * 6 * 8 * 28


def test_of_what_a_fusion_slices_and_updates_only_that_moves():
    body = """  %all = f32[12,8,100]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %flat = f32[12,800]{1,0} parameter(2)
  ROOT %r = f32[12,8,100]{2,1,0} fusion(%all, %n, %flat), kind=kLoop, calls=%sliced"""
    assert read_work(program(body, FUSED)).memory == 4 + 2 * 4 * 8 * 100


def test_a_product_stacked_in_place_beside_what_follows():
    """As the GPU's compiler has it: a fusion of its own stream, a cuBLAS call within one; nothing
    of them is as large as the stack, or as a workspace of bytes."""
    body = """  %all = f32[12,8,100]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %flat = f32[12,800]{1,0} parameter(2)
  %x = f32[8,64]{1,0} parameter(3)
  %y = f32[64,100]{1,0} parameter(4)
  %begun = ((f32[12,8,100]{2,1,0}, s32[], f32[12,800]{1,0}), f32[12,8,100]{2,1,0}, u32[]) \
fusion-start(%all, %n, %flat), kind=kLoop, calls=%sliced
  %f = f32[12,8,100]{2,1,0} fusion-done(%begun)
  ROOT %r = (f32[12,8,100]{2,1,0}, s8[4096]{0}) fusion(%f, %x, %y, %n), kind=kCustom, calls=%gemm"""
    gemm = """%gemm (a: f32[12,8,100], x: f32[8,64], y: f32[64,100], n: s32[]) -> f32[12,8,100] {
  %a.4 = f32[12,8,100]{2,1,0} parameter(0)
  %x.4 = f32[8,64]{1,0} parameter(1)
  %y.4 = f32[64,100]{1,0} parameter(2)
  %n.4 = s32[] parameter(3)
  %c.4 = (f32[8,100]{1,0}, s8[4096]{0}) custom-call(%x.4, %y.4), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %g.4 = f32[8,100]{1,0} get-tuple-element(%c.4), index=0
  %b.4 = f32[1,8,100]{2,1,0} bitcast(%g.4)
  %d.4 = f32[12,8,100]{2,1,0} dynamic-update-slice(%a.4, %b.4, %n.4)
  %w.4 = s8[4096]{0} get-tuple-element(%c.4), index=1
  ROOT %t.4 = (f32[12,8,100]{2,1,0}, s8[4096]{0}) tuple(%d.4, %w.4)
}
"""
    work = read_work(program(body, FUSED + gemm))
    stacked, product = 4 + 2 * 4 * 8 * 100, 4 * (8 * 64 + 64 * 100 + 8 * 100) + 4
    assert work.memory == stacked + product
    assert work.flops == 2 * 8 * 100 * 64


def test_what_goes_into_faster_memory_is_read_once():
    body = """  %p = f32[12,8,100]{2,1,0:T(8,128)} parameter(0)
  %s = ((f32[12,8,100]{2,1,0:T(8,128)}), f32[3,8,100]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%p), slice={[0:3], [0:8], [0:100]}
  %d = f32[3,8,100]{2,1,0:T(8,128)S(1)} slice-done(%s)
  %c = (f32[12,8,100]{2,1,0:T(8,128)S(1)}, f32[12,8,100]{2,1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%p)
  ROOT %e = f32[12,8,100]{2,1,0:T(8,128)S(1)} copy-done(%c)"""
    work = read_work(program(body))
    assert work.memory == (3 + 12) * 4 * 8 * 128
    assert work.padding == (3 + 12) * 4 * 8 * 28
    assert work.copies == Moved()
