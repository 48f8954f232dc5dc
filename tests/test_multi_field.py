"""Merged embeddings and the sum of loss terms, recomputed term by term from the method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from test_contrastive import by_hand
from test_objectives_of_merged import hard_negatives_by_hand, margins_by_hand

from gcl_jax.config import DataConfig, HardNegativesConfig, LossConfig, ObjectivesConfig
from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.multi_field import (
    merged_batch,
    multi_field_loss,
    pair_term_weights,
    product_dtype,
)
from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.clip import merge_fields

N = 16
DATA = DataConfig(
    query_fields={"query": 0.7, "category": 0.3}, document_fields={"image": 0.9, "title": 0.1}
)


def merged_by_hand(embeddings, present, weights):
    """Method, Loss 2: the weights of a row's present fields rescaled to sum 1, then normalised."""
    rows = []
    for i in range(N):
        left = {name: weight for name, weight in weights.items() if present[name][i]}
        row = sum(w / sum(left.values()) * embeddings[name][i] for name, w in left.items())
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def random_side(rng, fields):
    """Unit embeddings, and which are present: each row has at least its first or second field."""
    embeddings = {name: rng.normal(size=(N, 4)).astype(np.float32) for name in fields}
    for x in embeddings.values():
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    first, second = rng.random((2, N)) < 0.7
    return embeddings, dict(zip(fields, (first, second | ~first), strict=False))


def random_batch(data):
    rng = np.random.default_rng(0)
    queries, query_present = random_side(rng, data.query_fields)
    documents, document_present = random_side(rng, data.document_fields)
    batch = {
        "query_present": query_present,
        "document_present": document_present,
        "weight": rng.uniform(0.1, 1, N).astype(np.float32),
        "query_id": rng.integers(N, size=N).astype(np.int32),
        "document_id": rng.integers(N, size=N).astype(np.int32),
    }
    return queries, documents, batch


def pair_rows(batch, valid):
    return PairRows(batch["weight"], valid, batch["query_id"], batch["document_id"])


def compute(queries, documents, batch, **options):
    """(total, terms) at logit scale 20."""
    loss = jax.jit(functools.partial(multi_field_loss, **options))
    return loss({"query": queries, "document": documents}, batch, jnp.float32(20))


def test_merge_rescales_the_weights_of_the_fields_that_are_there():
    _, documents, batch = random_batch(DATA)
    present = batch["document_present"]
    assert not all(x.all() for x in present.values())
    merged = merge_fields(documents, present, DATA.document_fields)
    expected = merged_by_hand(documents, present, DATA.document_fields)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)


def test_tokens_of_all_fields_that_count_stand_side_by_side():
    queries, documents, batch = random_batch(DATA)
    rng = np.random.default_rng(1)
    tokens = {name: rng.normal(size=(N, t, 4)) for name, t in (("image", 3), ("title", 2))}
    embeddings = {"query": queries, "document": documents, "document_tokens": tokens}
    for weights in (DATA.document_fields, {"image": 0.0, "title": 1.0}):
        data = dataclasses.replace(DATA, document_fields=weights)
        found = merged_batch(embeddings, batch, 1.0, LossConfig(), data, make_cpu_mesh(1, 1)).tokens
        there = batch["document_present"]
        wanted = [tokens[f] * there[f][:, None, None] for f, weight in weights.items() if weight]
        assert found.keys() == {"document"}
        np.testing.assert_allclose(found["document"], np.concatenate(wanted, 1), rtol=1e-6)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(targets="diagonal"),
        LossConfig(
            targets="diagonal", merged=0.5, pair_weights={"query:title": 2.0, "category:image": 0.0}
        ),
        LossConfig(targets="diagonal", merged=0.0, weight_norm="mean", mask_duplicates=True),
        LossConfig(field_pairs=0.0),
    ],
    ids=["default", "pair weights", "pairs alone", "merged alone"],
)
def test_total_is_the_weighted_sum_over_rows_that_have_both_fields(mesh, loss):
    queries, documents, batch = random_batch(DATA)
    options = {"weight_norm": loss.weight_norm, "mask_duplicates": loss.mask_duplicates}

    def contrast(q, d, valid):
        return by_hand(q, d, 20.0, pair_rows(batch, valid), **options)

    expected = {}
    if loss.merged:
        expected["merged"] = (
            loss.merged,
            contrast(
                merged_by_hand(queries, batch["query_present"], DATA.query_fields),
                merged_by_hand(documents, batch["document_present"], DATA.document_fields),
                np.ones(N, bool),
            ),
        )
    for q in DATA.query_fields:
        for d in DATA.document_fields:
            weight = loss.pair_weights.get(f"{q}:{d}", loss.field_pairs / 4)
            valid = batch["query_present"][q] & batch["document_present"][d]
            if weight:
                expected[f"{q}:{d}"] = weight, contrast(queries[q], documents[d], valid)

    total, terms = compute(queries, documents, batch, loss=loss, data=DATA, mesh=mesh)
    assert terms.keys() == {f"gcl/{name}" for name in expected}
    for name, (_, value) in expected.items():
        np.testing.assert_allclose(terms[f"gcl/{name}"], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, sum(w * value for w, value in expected.values()), rtol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 1)], indirect=True)
def test_a_single_field_pair_is_counted_once(mesh):
    data = DataConfig(query_fields={"query": 1.0}, document_fields={"title": 1.0})
    queries, documents, batch = random_batch(DATA)
    queries, documents = {"query": queries["query"]}, {"title": documents["title"]}
    everywhere = {"query": np.ones(N, bool)}, {"title": np.ones(N, bool)}
    batch |= dict(zip(("query_present", "document_present"), everywhere, strict=True))

    rows = pair_rows(batch, np.ones(N, bool))
    single = by_hand(queries["query"], documents["title"], 20.0, rows)
    for loss in (
        LossConfig(targets="diagonal"),
        LossConfig(targets="diagonal", merged=0.0, pair_weights={"query:title": 1.0}),
    ):
        total, terms = compute(queries, documents, batch, loss=loss, data=data, mesh=mesh)
        np.testing.assert_allclose(total, single, rtol=1e-5)
        assert len(terms) == 1


def test_pair_weights_share_what_they_do_not_set():
    loss = LossConfig(field_pairs=2.0, pair_weights={"query:title": 3.0})
    assert pair_term_weights(loss, DATA) == {
        ("query", "image"): 0.5,
        ("query", "title"): 3.0,
        ("category", "image"): 0.5,
        ("category", "title"): 0.5,
    }


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)], indirect=True)
def test_fields_of_a_side_find_each_other(mesh):
    """Values by hand, gradients by the formula on one device; other rows of a document that comes
    twice are no negatives, and rows without one of the two fields are left out."""
    queries, documents, batch = random_batch(DATA)
    sides = {"query": queries, "document": documents}
    for side in sides:
        batch[f"{side}_id"] = np.arange(N, dtype=np.int32) // 2
    loss = LossConfig(targets="diagonal", merged=0.0, field_pairs=0.0, side_pairs=0.6)
    terms = (("query", "query", "category"), ("document", "image", "title"))

    def rows_of(side, a, b):
        present, ids = batch[f"{side}_present"], batch[f"{side}_id"]
        assert not (present[a] & present[b]).all()
        return PairRows(np.ones(N, np.float32), present[a] & present[b], ids, ids)

    def ours(sides):
        scale = jnp.float32(20)
        return multi_field_loss(sides, batch, scale, loss=loss, data=DATA, mesh=mesh)

    def reference(sides):
        return 0.3 * sum(
            gcl_loss_reference(s[a], s[b], 20.0, rows_of(side, a, b), mask_duplicates=True)
            for side, a, b in terms
            for s in [sides[side]]
        )

    (total, found), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(sides)
    assert found.keys() == {f"gcl/{side} {a}:{b}" for side, a, b in terms}
    for side, a, b in terms:
        fields, rows = sides[side], rows_of(side, a, b)
        value = by_hand(fields[a], fields[b], 20.0, rows, mask_duplicates=True)
        np.testing.assert_allclose(found[f"gcl/{side} {a}:{b}"], value, rtol=1e-5)
    wanted, by_reference = jax.value_and_grad(reference)(sides)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    # Embeddings are scaled to length 1 on the way: what changes their length changes nothing.
    along = jax.tree.map(lambda g, x: g - (g * x).sum(1, keepdims=True) * x, by_reference, sides)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, along)


@pytest.mark.parametrize("mesh", [(1, 1)], indirect=True)
def test_a_row_without_a_weighted_field_leaves_the_merged_term(mesh):
    """A document that has only a title, merged with weight 0: nothing to contrast with."""
    data = DataConfig(query_fields={"query": 1.0}, document_fields={"image": 1.0, "title": 0.0})
    queries, documents, batch = random_batch(data)
    batch["query_present"] = {"query": np.ones(N, bool)}
    valid = batch["document_present"]["image"]
    assert not valid.all()
    _, terms = compute(
        queries, documents, batch, loss=LossConfig(targets="diagonal"), data=data, mesh=mesh
    )
    expected = by_hand(queries["query"], documents["image"], 20.0, pair_rows(batch, valid))
    np.testing.assert_allclose(terms["gcl/merged"], expected, rtol=1e-5)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
def test_two_objectives_are_added_and_hard_negatives_merged_as_documents_are(mesh):
    queries, documents, batch = random_batch(DATA)
    rng, hard = np.random.default_rng(1), 3
    negatives = {name: rng.normal(size=(N, hard, 4)).astype(np.float32) for name in documents}
    present = {name: rng.random((N, hard)) < 0.6 for name in documents}
    ids = rng.integers(N, 2 * N, size=(N, hard)).astype(np.int32)
    batch |= {"negative_document_present": present, "negative_document_id": ids}

    q = merged_by_hand(queries, batch["query_present"], DATA.query_fields)
    d = merged_by_hand(documents, batch["document_present"], DATA.document_fields)
    valid = np.logical_or(*present.values())
    assert not valid.all()
    merged = np.float64(merge_fields(negatives, present, DATA.document_fields))
    given, rows = {"document": (merged, valid, ids)}, pair_rows(batch, np.ones(N, bool))
    margins = margins_by_hand(q, d, 20.0, given, rows, 2.0)
    by_negatives = hard_negatives_by_hand(q, d, 20.0, given, margins, rows, None, False, 0.4, 0.3)

    alone, terms = compute(
        queries, documents, batch, loss=LossConfig(targets="diagonal"), data=DATA, mesh=mesh
    )
    loss = LossConfig(
        objectives=ObjectivesConfig(gcl=0.5, hard_negatives=2.0),
        hard_negatives=HardNegativesConfig(rank=0.4, intra=0.3, max_margin=2.0),
    )
    arguments = {"query": queries, "document": documents, "negative_document": negatives}
    both = jax.jit(functools.partial(multi_field_loss, loss=loss, data=DATA, mesh=mesh))
    total, both_terms = both(arguments, batch, jnp.float32(20))
    assert both_terms.keys() == terms.keys() | {"hard_negatives/merged"}
    for name, value in terms.items():
        np.testing.assert_allclose(both_terms[name], value, rtol=1e-6)
    np.testing.assert_allclose(both_terms["hard_negatives/merged"], by_negatives, rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * alone + 2 * by_negatives, rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "towers", "dtype"),
    [
        ("auto", "float32", "float32"),
        ("auto", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_products_are_of_the_type_that_the_towers_compute(tiny_config, asked, towers, dtype):
    tiny_config.loss.dtype, tiny_config.model.dtype = asked, towers
    assert product_dtype(tiny_config) == dtype


def test_bfloat16_products_come_close_and_are_not_the_same():
    queries, documents, batch = random_batch(DATA)
    mesh = make_cpu_mesh(4, 2)
    exact, rough = (
        compute(
            queries,
            documents,
            batch,
            loss=LossConfig(targets="diagonal", dtype=dtype),
            data=DATA,
            mesh=mesh,
        )[0]
        for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == jnp.float32
    assert 1e-6 < abs(rough / exact - 1) < 0.02
