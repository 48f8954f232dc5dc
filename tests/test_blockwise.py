"""The blockwise loss on every mesh, in both forms, against the reference on one device."""

import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from test_contrastive import assert_close, make_rows, mixed_rows, unit_rows
from test_targets import scored_batch

from gcl_jax.config import LossConfig
from gcl_jax.errors import ConfigError
from gcl_jax.losses import blockwise, logits
from gcl_jax.losses.contrastive import gcl_loss, gcl_loss_reference, gcl_losses
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.pairs import KnownWeights, PairRows

FORMS = ("gather", "ring")
KNOWN = KnownWeights.of_pairs(np.zeros(1, int), np.zeros(1, int), np.ones(1))


@pytest.mark.parametrize(
    ("platform", "kind", "size"),
    [
        ("cpu", "cpu", 1024),
        ("tpu", "TPU v5 lite", 2048),
        ("gpu", "NVIDIA H100 80GB HBM3", 8192),
        ("gpu", "NVIDIA A100-SXM4-40GB", 8192),
        ("gpu", "NVIDIA L4", 4096),
        ("gpu", "a GPU of tomorrow", 4096),
    ],
)
def test_the_size_of_tiles_is_the_devices(platform, kind, size):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    assert blockwise.fitting_block_size(device) == size


@functools.cache
def compiled(loss, **options):
    """(value, gradients by queries, documents, scale and bias), compiled once per shape."""

    def with_bias(queries, documents, logit_scale, logit_bias, rows, known):
        arguments = queries, documents, logit_scale, rows
        return loss(*arguments, logit_bias=logit_bias, known=known, **options)

    return jax.jit(jax.value_and_grad(with_bias, argnums=(0, 1, 2, 3)))


def assert_equals_reference(batch, mesh, form, block_size, is_known=False, **options):
    (q, d, scale, rows), known = batch
    given = q, d, np.float32(scale), np.float32(-3.0), rows, known if is_known else None
    value, (*by_rows, by_scale, by_bias) = compiled(gcl_loss_reference, **options)(*given)
    loss = compiled(gcl_loss, mesh=mesh, form=form, block_size=block_size, **options)
    actual, (*actual_by_rows, actual_by_scale, actual_by_bias) = loss(*given)
    assert_close((actual, actual_by_rows), (value, by_rows), 1e-5)
    # Sums over all pairs, which may cancel: that by the bias always does.
    rounding = 1e-6 * max(abs(value), 1)
    np.testing.assert_allclose(actual_by_scale, by_scale, rtol=1e-5, atol=rounding)
    np.testing.assert_allclose([by_bias, actual_by_bias], 0, atol=rounding)


def mixed(rng, n):
    """Every kind of row, in a table of known pairs that covers a third of all combinations."""
    (q, d, _, rows), known = scored_batch(rng, n)
    rows = make_rows(n, mixed_rows(rng, n).weight, rows.valid, rows.query_id, rows.document_id)
    return (q, d, 30.0, rows), known


def first_device_weightless_second_invalid(rng, n):
    """The other shards' weights differ by orders of magnitude."""
    device = np.arange(n) * 8 // n
    (q, d, _, rows), known = scored_batch(rng, n)
    weight = 10.0 ** (device - 4) * (device > 0)
    return (q, d, 100.0, make_rows(n, weight, device != 1, rows.query_id, rows.document_id)), known


def identical_embeddings(rng, n):
    (q, _, _, rows), known = scored_batch(rng, n)
    x = np.tile(q[:1], (n, 1))
    return (x, x, 100.0, rows), known


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_norm": "mean", "mask_duplicates": True},
        {"is_known": True, "mask_duplicates": True},
    ],
    ids=["diagonal", "masked", "known"],
)
def test_value_and_gradients_equal_the_reference(mesh, form, options):
    """In tiles that divide neither a device's rows nor all columns."""
    rng = np.random.default_rng(0)
    for make in (mixed, first_device_weightless_second_invalid, identical_embeddings):
        assert_equals_reference(make(rng, 40), mesh, form, 3, **options)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_known", [False, True])
def test_one_row_a_device(mesh, form, is_known):
    assert_equals_reference(mixed(np.random.default_rng(0), 8), mesh, form, 4, is_known)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 10_000),
    is_known=st.booleans(),
    weight_norm=st.sampled_from(["none", "sum"]),
)
def test_any_batch_equals_the_reference(form, scale, seed, is_known, weight_norm):
    (q, d, _, rows), known = mixed(np.random.default_rng(seed), 16)
    batch = (q, d, scale, rows), known
    mesh = make_cpu_mesh(2, 2)
    assert_equals_reference(batch, mesh, form, 64, is_known, weight_norm=weight_norm)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_embeddings_have_float32_statistics(mesh, form):
    """The logits of bfloat16 factors are exact in float32: only the gradients are rounded."""
    rng = np.random.default_rng(1)
    (q, d, scale, rows), _ = mixed(rng, 24)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, d)]
    options = {"mesh": mesh, "form": form, "block_size": 5}
    value, gradients = compiled(gcl_loss, **options)(*rounded, scale, 0.0, rows, None)
    full = [x.astype(jnp.float32) for x in rounded]
    expected, by = compiled(gcl_loss_reference)(*full, scale, 0.0, rows, None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert [x.dtype for x in gradients] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    assert_close([np.float32(x) for x in gradients], by, 2**-7)


@pytest.mark.parametrize("form", FORMS)
def test_ids_that_agree_in_their_lower_words_differ(form):
    """Four pairs: 5 and 5 + 2^32 are two queries, 5 and 5 are one."""
    rng = np.random.default_rng(2)
    high = np.int64(2) ** 32
    query_id, document_id = np.array([5, 5 + high, 5, -5]), np.array([0, high, 2 * high, 3 * high])
    rows = PairRows(np.ones(4, np.float32), np.ones(4, bool), query_id, document_id)
    assert rows.query_id.dtype == np.uint32
    small = make_rows(4, query_id=[0, 1, 0, 2])
    arguments = unit_rows(rng, 4), unit_rows(rng, 4), 10.0
    options = {"mesh": make_cpu_mesh(2, 2), "form": form, "mask_duplicates": True}
    expected = gcl_loss_reference(*arguments, small, mask_duplicates=True)
    assert expected != gcl_loss_reference(*arguments, small)
    for loss in (
        functools.partial(gcl_loss_reference, mask_duplicates=True),
        jax.jit(functools.partial(gcl_loss, **options)),
    ):
        actual = loss(*arguments, rows)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_known", [False, True])
def test_terms_share_fields_and_each_counts_its_rows(mesh, form, is_known):
    rng = np.random.default_rng(3)
    (q, d, scale, rows), known = mixed(rng, 24)
    known = known if is_known else None
    fields = {"a": q, "b": unit_rows(rng, 24)}, {"a": d, "c": unit_rows(rng, 24)}
    pairs = [("a", "a"), ("b", "a"), ("a", "c"), ("b", "c")]
    terms = [
        Term(
            a, b, make_rows(24, rows.weight, rng.random(24) < 0.7, rows.query_id, rows.document_id)
        )
        for a, b in pairs
    ]
    share = np.float32([1.0, 0.5, 2.0, 0.1])

    def together(queries, documents, scale):
        options = {"mesh": mesh, "form": form, "block_size": 4, "known": known}
        logits = Logits(queries, documents, scale, terms, **options)
        return jnp.dot(share, jnp.stack(gcl_losses(logits, LossConfig())))

    def one_by_one(queries, documents, scale):
        losses = [
            gcl_loss_reference(queries[a], documents[b], scale, rows, known=known)
            for a, b, rows, _ in terms
        ]
        return jnp.dot(share, jnp.stack(losses))

    arguments = *fields, np.float32(scale)
    actual, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*arguments)
        for f in (together, one_by_one)
    )
    assert_close(actual, expected, 1e-5)


def test_auto_hands_documents_round_when_their_copies_are_too_large(monkeypatch):
    rng = np.random.default_rng(4)
    (*arguments, rows), _ = mixed(rng, 16)
    mesh = make_cpu_mesh(8, 1)
    text = lambda: jax.jit(functools.partial(gcl_loss, mesh=mesh)).lower(*arguments, rows).as_text()
    assert "all_gather" in text()
    monkeypatch.setattr(logits, "GATHER_LIMIT", 16 * 4 * 8 - 1)
    jax.clear_caches()  # of the call that is compiled by itself
    assert "all_gather" not in text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "rign"}, "form='rign' must be one of"),
        ({"weight_norm": "max"}, "weight_norm='max' must be one of"),
        ({"block_size": 0}, "block_size 0 must be 1 or more"),
        ({"n": 12}, "12 pairs is no multiple of the 8 devices"),
        ({"weight": np.ones((16, 1), np.float32)}, r"weight .* \(16, 1\); 16 embeddings need"),
        ({"weight": np.ones(8, np.float32)}, r"weight of the pairs has shape \(8,\)"),
        ({"query_id": np.zeros(3, np.int32)}, r"query_id of the pairs has shape \(3,\)"),
        ({"documents": np.zeros((16, 5), np.float32)}, r"\(16, 5\) float32 is not \(16, 4\)"),
        ({"documents": np.zeros((16, 4), jnp.bfloat16)}, r"\(16, 4\) bfloat16 is not"),
        ({"queries": np.zeros((16, 4), np.float16)}, "float32 or bfloat16, not float16"),
        (
            {"query_id": np.arange(16), "known": KNOWN},
            "query_id has 64 bits: known weights are looked up by",
        ),
        ({"queries": np.zeros(16, np.float32)}, r"shape \(N, D\), not \(16,\)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_compiles(change, message):
    n = change.pop("n", 16)
    rng = np.random.default_rng(5)
    given = {"queries": unit_rows(rng, n), "documents": unit_rows(rng, n)}
    rows = {name: getattr(make_rows(n), name) for name in PairRows.__slots__}
    for holder in (given, rows):
        holder |= {name: change.pop(name) for name in list(change) if name in holder}
    loss = functools.partial(gcl_loss, mesh=make_cpu_mesh(8, 1), **change)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(loss, *given.values(), 10.0, PairRows(**rows))
