"""The table of slices: its formulas by hand, and that a row which departs from them is told."""

import pytest

from benchmarks import scaling
from gcl_jax.plan import planner

CASE = scaling.Case("ViT-B-32", "v5e:4x4", 256, 4)


def formulas(form: str = "gather", dtype: str = "bfloat16", case: scaling.Case = CASE):
    cfg, _ = planner.resolve(scaling.config(case, 16, dtype))
    cfg.loss.form = form
    return scaling.formulas(cfg, 16)


@pytest.mark.parametrize(
    ("form", "dtype", "loss"),
    [
        ("gather", "bfloat16", 6 * 4096 * 512 * 15 / 16),
        ("ring", "bfloat16", 8 * 4096 * 512),
        ("gather", "float32", 8 * 4096 * 512 * 15 / 16),
        ("ring", "float32", 12 * 4096 * 512),
    ],
)
def test_what_the_loss_should_send(form, dtype, loss):
    assert formulas(form, dtype)["loss"] == loss


def test_what_parameters_should_send():
    """Both towers' layers twice in bfloat16, and the rest, which is small, once; the table of
    tokens never."""
    layers = 12 * 12 * (768**2 + 512**2)
    assert formulas()["parameters"] == pytest.approx(2 * 2 * layers * 3 / 4, rel=0.02)
    demo = scaling.Case("demo", "v5e:4x4", 160, 4)
    layers, others = 12 * 128**2 * (3 + 1), 768 * 128 + 2 * 128 * 512
    assert formulas(case=demo)["parameters"] == pytest.approx(
        (2 * 2 * layers + 2 * others) * 3 / 4, rel=0.02
    )


def found(case: scaling.Case = CASE, **changes) -> dict:
    collectives = [
        {"kind": "all-gather", "part": "loss", "times": 1, "sent": 103.0, "exposed": 103.0},
        {"kind": "all-gather", "part": "parameters", "times": 9, "sent": 99.0, "exposed": 0.0},
        {"kind": "all-reduce", "part": "gradients", "times": 1, "sent": 50.0, "exposed": 50.0},
    ]
    return {
        "topology": case.topology,
        "chips": 16,
        "batch": 4096,
        "thorough": False,
        "peak": 2000.0,
        "copies": 1000.0,
        "formulas": {"loss": 100.0, "parameters": 100.0},
        "collectives": collectives,
        "sent": 252.0,
        "exposed": 153.0,
        "tower_flops": 4e12,
        "loss_flops": 1e12,
        "chip": {"flops": 1e12, "memory": 1e9, "hbm": 1e3, "link": 100.0},
        "projection": {"towers": 8.0, "loss": 2.0, "communication": 2.5},
        "work": {
            "flops": 6e12,
            "padded": 9e12,
            "memory": 1e4,
            "padding": 2.5e3,
            "copies": {"times": 3, "bytes": 1e3},
            "casts": {"times": 1, "bytes": 1e2},
            "culprits": [],
        },
    } | changes


LARGER = scaling.Case("ViT-B-32", "v5e:16x16", 256, 4)
OTHER = scaling.Case("ViT-B-32", "v6e:16x16", 256, 4)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({CASE: found(), LARGER: found(peak=3040.0, copies=2000.0)}, []),
        ({CASE: found(), OTHER: found(peak=9000.0)}, []),
        ({CASE: found(), LARGER: {"failed": "no compiler"}}, []),
        (
            {CASE: found(), LARGER: found(peak=3060.0, copies=2000.0)},
            ["v5e ViT-B-32 256 4 gather False: a chip holds"],
        ),
        (
            {CASE: found(formulas={"loss": 110.0, "parameters": 94.0})},
            ["gather False: loss sends -6.4% of the formula", "parameters sends +5.3%"],
        ),
    ],
    ids=[
        "as it should",
        "of another kind",
        "not compiled",
        "holds more",
        "sends otherwise",
    ],
)
def test_what_is_missed(rows, said):
    missed = scaling.missed(rows)
    assert len(missed) == len(said)
    assert all(part in line for part, line in zip(said, missed, strict=True))


def test_a_row_and_what_was_done_badly():
    assert scaling.efficiencies(found()) == (0.8, pytest.approx(10 / 11.53))
    text = scaling.row(CASE, found(thorough=True))
    assert text.startswith("| ViT-B-32, gather, thorough | v5e:4x4 | 16 | 4,096 | 5 / 6 |")
    assert "(+3.0%)" in text
    assert text.endswith("| 80.0% |")
    assert "| needs a compiler |" in scaling.row(CASE, {"failed": "needs a compiler"})
    badly = scaling.badly_done(CASE, found())
    assert "(25%); 50.0% more FLOPs" in badly
    # Memory takes 10 s and products 6 s, of which the model's own are 4.
    assert "so 40% of the peak in the model's own FLOPs" in badly
    assert "86.7% of a step computes" in badly


def test_a_single_chip_has_no_efficiency():
    alone = found(chips=1, collectives=[])
    del alone["projection"]
    assert scaling.row(CASE, alone).endswith("| - |")
    assert scaling.badly_done(CASE, alone).endswith("of the peak in the model's own FLOPs")


def test_every_row_is_a_configuration():
    cases = scaling.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.form for case in cases} == {"gather", "ring"}
    chips = {"v5e:2x2": 4, "v5p:8x8x8": 512}
    assert chips.keys() <= {case.topology for case in cases}
