"""Objectives of merged embeddings against their formulas in float64, sharded and in tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from scipy.special import logsumexp
from test_contrastive import assert_close, make_rows, mixed_rows, unit_rows
from test_objectives import value_and_numeric_gradients
from test_targets import DOCUMENTS, QUERIES, compiled, scored_batch

from gcl_jax.config import (
    HardNegativesConfig,
    LossConfig,
    MixedConfig,
    OneToKConfig,
    UnimodalConfig,
)
from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.objectives import Merged, Negatives, Views
from gcl_jax.losses.of_merged import (
    filip_loss,
    fused_loss,
    hard_negatives_loss,
    mixed_loss,
    one_to_k_loss,
)
from gcl_jax.losses.unimodal import unimodal_loss

N, LANGUAGES, HARD = 16, 3, 3
SCALE = np.float32(15.0)
MASKED = -1e9


class Tiled(Merged):
    """In tiles that do not divide the batch."""

    def logits(self, *arguments, **options):
        size = 5 * max([x.shape[1] for x in self.tokens.values()], default=1)
        return dataclasses.replace(super().logits(*arguments, **options), block_size=size)


def merged(q, d, scale, rows, *, texts=(), present=(), negatives=(), key=None, **how):
    fields, there = ({str(k): x for k, x in enumerate(side)} for side in (texts, present))
    return Tiled(q, d, rows.completed(), scale, fields, there, dict(negatives), key, **how)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def duplicates(a, b):
    """Which pairs of `a` have their query or their document in common with which of `b`."""
    same_query = a.query_id[:, None] == b.query_id
    return same_query | (a.document_id[:, None] == b.document_id)


def fused_by_hand(q, d, scale, rows, mask):
    q, d, rows = jax.tree.map(lambda x: x[rows.valid], (q, d, rows))
    kinds, own = (q, d, unit(q + d)), np.eye(len(q), dtype=bool)
    masked = duplicates(rows, rows) & ~own & mask
    total = 0
    for a in range(3):
        z = [scale * kinds[a] @ c.T for c in kinds]
        among = [np.where(masked | (own & (a == c)), MASKED, z[c]) for c in range(3)]
        log_sum = logsumexp(np.hstack(among), axis=1)
        total += sum(np.sum(rows.weight * (log_sum - np.diag(z[b]))) for b in range(3) if b != a)
    return total / 6 / len(q)


def draws(key, beta, simplex):
    """(shares (N, k) of each mix-up of nodes, the own pair's first; of the own side in each mix-up
    of edges)."""
    by_beta, by_half = jax.random.split(key)
    a = np.float64(jax.random.beta(by_beta, beta, beta, (N, 1), jnp.float32))
    shares = np.hstack([a, 1 - a])
    if simplex:
        shares = np.float64(jax.random.uniform(by_beta, (N, simplex)))
        shares /= shares.sum(1, keepdims=True)
    return shares, np.float64(jax.random.uniform(by_half, (N, 1), maxval=0.5))


def mixed_by_hand(q, d, _scale, rows, shares, b, temperature):
    def mixed(x, i):
        return sum(a * x[i - j if rows.valid[i - j] else i] for j, a in enumerate(shares[i]))

    nodes = [unit(np.stack([mixed(x, i) for i in range(N)])) for x in (q, d)]
    edges = [unit(b * q + (1 - b) * d), unit(b * d + (1 - b) * q)]
    losses = []
    for x, y in ((q, d), nodes, edges):
        x, y = x[rows.valid], y[rows.valid]
        log_sum = logsumexp(np.hstack([x @ x.T, y @ y.T]) / temperature, axis=1)
        losses.append(log_sum - np.sum(x * y, axis=1) / temperature)
    return np.mean(rows.weight[rows.valid] * np.mean(losses, axis=0))


def one_to_k_by_hand(_q, d, scale, texts, present, rows, mask, text_to_text):
    """texts (k, n, d) and present (k, n), by language."""
    language, pair = np.nonzero(present & rows.valid)
    texts, of_text = texts[language, pair], jax.tree.map(lambda x: x[pair], rows)
    own = np.arange(N)[:, None] == pair
    d, rows, own = jax.tree.map(lambda x: x[rows.valid], (d, rows, own))
    z = np.where(duplicates(rows, of_text) & ~own & mask, MASKED, scale * d @ texts.T)
    to_text, to_document = (
        np.where(own, logsumexp(z, axis=axis, keepdims=True) - z, 0).sum(axis) for axis in (1, 0)
    )
    total = np.mean(rows.weight * to_text / own.sum(1)) + np.mean(of_text.weight * to_document)
    same_query = of_text.query_id[:, None] == of_text.query_id
    same_text = same_query & (language[:, None] == language)
    partners = same_query & ~same_text
    left_out = same_text | (duplicates(of_text, of_text) & ~partners & mask)
    z = np.where(left_out, MASKED, scale * texts @ texts.T)
    losses = np.where(partners, logsumexp(z, axis=1, keepdims=True) - z, 0).sum(1)
    among = np.mean(of_text.weight * losses / np.maximum(partners.sum(1), 1))
    return total / 2 + text_to_text * among


def contrast_by_hand(z, t, extra):
    """-sum_ij T_ij log softmax_rows(Z)_ij, with further columns in the denominators."""
    return np.sum(t * (logsumexp(np.hstack([z, extra]), axis=1, keepdims=True) - z))


def margins_by_hand(q, d, scale, negatives, rows, max_margin):
    """{side: (h,)}, the mean lead of the pairs over each of their negatives."""
    margins = {}
    for side, (x, there, _) in negatives.items():
        there = there & rows.valid[:, None]
        z = np.einsum("nd,nhd->nh", q if side == "document" else d, x)
        gap = np.where(there, np.float64(scale * (np.sum(q * d, axis=1)[:, None] - z)), 0)
        margins[side] = np.clip(gap.sum(0) / np.maximum(there.sum(0), 1), 0, max_margin)
    return margins


def hard_negatives_by_hand(
    q, d, scale, negatives, margins, rows, known, mask, rank, intra, hardness=None
):
    """negatives: {side: (embeddings (n, h, d), valid, id)}. margins: constants to gradients.
    known: weights (queries, documents). hardness: (cosines of all documents, the pairs' and then
    the negatives', by queries; of all queries by documents) times alpha, constants to gradients."""
    weight, valid = rows.weight, rows.valid
    t = np.diag(weight) if known is None else known[np.ix_(rows.query_id, rows.document_id)]
    t = np.where(valid[:, None] & valid, t, 0)
    own = np.eye(N, dtype=bool) & valid
    z = scale * q @ d.T
    out = ~(valid[:, None] & valid) | (duplicates(rows, rows) & ~own & (t == 0) & mask)
    z = np.where(out, MASKED, z)
    pair = scale * np.sum(q * d, axis=1)
    sides = {"query": (q, rows.query_id), "document": (d, rows.document_id)}
    total, extra = 0, {"query": np.empty((N, 0)), "document": np.empty((N, 0))}
    for side, (x, there, ids) in negatives.items():
        other = {"query": "document", "document": "query"}[side]
        (mine, my_ids), (partner, partner_ids) = sides[side], sides[other]
        there = there & valid[:, None]

        # In the denominators of the other side, one column for each negative.
        mined_here = partner_ids[:, None] == np.repeat(partner_ids, HARD)
        relevant = (my_ids[:, None] == ids.reshape(-1)) & mask
        if known is not None:
            of_side = {side: ids.reshape(-1), other: partner_ids}
            found = known[np.ix_(of_side["query"], of_side["document"])] > 0
            relevant |= found if side == "document" else found.T
        out = ~there.reshape(-1) | (relevant & ~mined_here)
        extra[other] = np.where(out, MASKED, scale * partner @ x.reshape(N * HARD, -1).T)

        gap = pair[:, None] - scale * np.einsum("nd,nhd->nh", partner, x)
        ranked = np.where(there, np.maximum(margins[side] - gap, 0), 0).sum(1)
        total += rank * np.sum((weight * ranked / np.maximum(there.sum(1), 1))[valid])
        within = np.where(there, scale * np.einsum("nd,nhd->nh", mine, x), MASKED)
        among = logsumexp(np.hstack([pair[:, None], within]), axis=1) - pair
        total += intra * np.sum((weight * among)[valid])
    columns, rows_ = (np.hstack([z, extra["query"]]), np.hstack([z.T, extra["document"]]))
    attracted = (t > 0) | own
    if hardness is not None:
        for side, here in ((columns, attracted), (rows_, attracted.T)):
            more = hardness["query" if side is columns else "document"]
            side += np.where(np.hstack([here, np.zeros((N, side.shape[1] - N), bool)]), 0, more)
    contrast = contrast_by_hand(columns[:, :N], t, columns[:, N:]) + contrast_by_hand(
        rows_[:, :N], t.T, rows_[:, N:]
    )
    return total / valid.sum() + contrast / (2 * (valid.sum() if known is None else t.sum()))


def filip_by_hand(x, y, scale, there, rows, known, mask):
    """there: which tokens of x (n, t, d) and y (n, s, d) are real, (n, t) and (n, s)."""
    table = np.diag(rows.weight) if known is None else known
    table = np.where(rows.valid[:, None] & rows.valid, table, 0)
    labelled = np.eye(N, dtype=bool) | (table > 0)
    out = ~rows.valid | (duplicates(rows, rows) & ~labelled & mask)
    products, total = np.einsum("ntd,msd->ntms", x, y), 0
    directions = (products, *there, table), (products.transpose(2, 3, 0, 1), *there[::-1], table.T)
    for z, real, other, t in directions:
        best = np.where(other, z, -np.inf).max(3)
        means = scale * np.stack([best[i, real[i]].mean(0) for i in range(N)])
        means = np.where(out, MASKED, means)
        total += np.sum(t * (logsumexp(means, axis=1, keepdims=True) - means))
    return total / (2 * (rows.valid.sum() if known is None else table.sum()))


# Cases: (arguments, ours of keywords and arguments, the same by hand).


@functools.cache
def batch():
    """(queries, documents, rows, known, embeddings by id): repeated ids repeat the embedding, so
    that logits tie; some rows are invalid."""
    rng = np.random.default_rng(0)
    (*_, rows), known = scored_batch(rng, N)
    tables = {"query": unit_rows(rng, QUERIES), "document": unit_rows(rng, DOCUMENTS)}
    q, d = tables["query"][rows.query_id], tables["document"][rows.document_id]
    assert 0 < rows.valid.sum() < N
    assert len(set(rows.query_id)) < N > len(set(rows.document_id))
    return q, d, rows, known, tables


def fused_case(mask):
    q, d, rows, *_ = batch()

    def ours(how, q, d, scale):
        return fused_loss(merged(q, d, scale, rows, mask_duplicates=mask, **how), LossConfig())

    return (q, d, SCALE), ours, functools.partial(fused_by_hand, rows=rows, mask=mask)


def mixed_case(temperature, beta, simplex):
    q, d, rows, *_ = batch()
    key = jax.random.key(3)
    shares, b = draws(key, beta, simplex)

    def ours(how, q, d, scale):
        options = LossConfig(mixed=MixedConfig(temperature, beta, simplex))
        return mixed_loss(merged(q, d, scale, rows, key=key, **how), options)

    options = {"rows": rows, "shares": shares, "b": b, "temperature": temperature}
    return (q, d, SCALE), ours, functools.partial(mixed_by_hand, **options)


def one_to_k_case(mask, text_to_text):
    q, d, rows, *_ = batch()
    rng = np.random.default_rng(1)
    texts = unit_rows(rng, LANGUAGES * QUERIES).reshape(LANGUAGES, QUERIES, -1)[:, rows.query_id]
    present = rng.random((LANGUAGES, N)) < 0.6
    present[0] |= ~present.any(0)
    assert set(present.sum(0)) == {1, 2, 3}

    def ours(how, q, d, scale, texts):
        fields = {"texts": texts, "present": present, "mask_duplicates": mask}
        options = LossConfig(one_to_k=OneToKConfig(text_to_text))
        return one_to_k_loss(merged(q, d, scale, rows, **fields, **how), options)

    options = {"present": present, "rows": rows, "mask": mask, "text_to_text": text_to_text}
    return (q, d, SCALE, texts), ours, functools.partial(one_to_k_by_hand, **options)


def unimodal_by_hand(*views, present, ids, temperature):
    """views: (first, second) of each field. NT-Xent, one record after the other."""
    losses = []
    for first, second, there, own in zip(views[::2], views[1::2], present, ids, strict=True):
        first, second, own = first[there], second[there], own[there]
        of_field = []
        for i in range(len(own)):
            others = np.concatenate([x[own != own[i]] for x in (first, second)])
            for a, b in ((first[i], second[i]), (second[i], first[i])):
                z = np.concatenate([[a @ b], others @ a]) / temperature
                of_field.append(logsumexp(z) - z[0])
        losses.append(np.mean(of_field))
    return np.mean(losses)


def unimodal_case():
    """Of two fields, one of either side; records repeat, and some have no such field."""
    _, _, rows, *_ = batch()
    rng = np.random.default_rng(2)
    views = [unit_rows(rng, N) for _ in range(4)]
    present, ids = rng.random((2, N)) < 0.8, (rows.query_id, rows.document_id)
    q, d = np.zeros((2, *views[0].shape), np.float32)

    def ours(how, *views):
        two = zip(views[::2], views[1::2], present, ids, strict=True)
        fields = {str(i): Views(*one) for i, one in enumerate(two)}
        options = LossConfig(unimodal=UnimodalConfig(temperature=0.2))
        return unimodal_loss(merged(q, d, SCALE, rows, views=fields, **how), options)

    options = {"present": present, "ids": ids, "temperature": 0.2}
    return views, ours, functools.partial(unimodal_by_hand, **options)


def filip_case(is_known, mask):
    q, d, rows, known, _ = batch()
    rng, known = np.random.default_rng(5), known if is_known else None
    there = [np.arange(k) < rng.integers(1, k + 1, (N, 1)) for k in (3, 4)]
    tokens = [
        unit_rows(rng, N * 4).reshape(N, 4, -1)[:, : x.shape[1]] * x[..., None] for x in there
    ]
    tokens = [np.float32(x) for x in tokens]

    def ours(how, x, y, scale):
        options = {"known": known, "mask_duplicates": mask, "kernel": "triton"}
        given = {"tokens": {"query": x, "document": y}}
        return filip_loss(merged(q, d, scale, rows, **options, **given, **how), LossConfig())

    table = known and np.float64(known(rows.query_id, rows.document_id))
    options = {"there": there, "rows": rows, "known": table, "mask": mask}
    return (*tokens, SCALE), ours, functools.partial(filip_by_hand, **options)


WEIGHTS = {"rank": 0.3, "intra": 0.4, "max_margin": 1.4}


def random_negatives(side):
    """(embeddings, valid, id): some rows have none, and nobody has the last."""
    *_, tables = batch()
    rng = np.random.default_rng(len(side))
    ids = rng.integers(len(tables[side]) - 1, size=(N, HARD)).astype(np.int32)
    valid = rng.random((N, HARD)) < 0.8
    valid[::6] = valid[:, -1] = False
    return tables[side][ids], valid, ids


def cosines_by_hand(q, d, negatives):
    """{side: cosines of its (n, all that it is contrasted with)}."""
    found = {}
    for side, own, other in (("query", q, d), ("document", d, q)):
        partner = "document" if side == "query" else "query"
        more = [negatives[partner][0].reshape(N * HARD, -1)] if partner in negatives else []
        found[side] = np.float64(own) @ np.float64(np.vstack([other, *more])).T
    return found


def hard_negatives_case(sides, is_known, mask, alpha=0.0):
    q, d, rows, known, _ = batch()
    known = known if is_known else None
    negatives = {side: random_negatives(side) for side in sides}

    def with_embeddings(embeddings):
        return {side: (x, *negatives[side][1:]) for side, x in zip(sides, embeddings, strict=True)}

    def ours(how, q, d, scale, *embeddings):
        given = {side: Negatives(*one) for side, one in with_embeddings(embeddings).items()}
        options = {"negatives": given, "known": known, "mask_duplicates": mask}
        loss = LossConfig(hard_negatives=HardNegativesConfig(**WEIGHTS, hardness=alpha))
        return hard_negatives_loss(merged(q, d, scale, rows, **options, **how), loss)

    table = None
    if known is not None:
        table = np.float64(known(*(np.arange(n, dtype=np.int32) for n in (QUERIES, DOCUMENTS))))
    margins = margins_by_hand(q, d, SCALE, negatives, rows, WEIGHTS["max_margin"])
    if sides == BOTH:  # margins at both ends and between
        assert {0, WEIGHTS["max_margin"]} < set(np.concatenate(list(margins.values())))

    hardness = {side: alpha * x for side, x in cosines_by_hand(q, d, negatives).items()}

    def hand(q, d, scale, *embeddings):
        given = with_embeddings(embeddings)
        more = WEIGHTS["rank"], WEIGHTS["intra"], hardness
        return hard_negatives_by_hand(q, d, scale, given, margins, rows, table, mask, *more)

    embeddings = [x for x, _, _ in negatives.values()]
    return (q, d, SCALE, *embeddings), ours, hand


BOTH = ("query", "document")
CASES = {
    "fused": (fused_case, False),
    "fused masked": (fused_case, True),
    "mixed": (mixed_case, 0.2, 0.5, 0),
    "mixed simplex": (mixed_case, 0.2, 0.5, 3),
    "one_to_k": (one_to_k_case, False, 0.5),
    "one_to_k masked": (one_to_k_case, True, 0.5),
    "unimodal": (unimodal_case,),
    "filip": (filip_case, False, True),
    "filip known": (filip_case, True, True),
    "hard queries": (hard_negatives_case, ("query",), True, False),
    "hard documents": (hard_negatives_case, ("document",), True, True),
    "hard negatives": (hard_negatives_case, BOTH, False, False),
    "hard negatives masked": (hard_negatives_case, BOTH, False, True),
    "hard negatives weighed": (hard_negatives_case, BOTH, True, False, 9.0),
}

ONCE = {"mixed simplex", "filip", "hard negatives weighed"}


@functools.cache
def expected(name):
    """(arguments, ours, value, gradients)."""
    make, *options = CASES[name]
    arguments, ours, hand = make(*options)
    return arguments, ours, *value_and_numeric_gradients(hand, arguments)


@pytest.mark.parametrize(
    ("mesh", "form"),
    [((1, 1), "gather"), ((8, 1), "gather"), ((4, 2), "ring")],
    indirect=["mesh"],
    ids=["1x1 gather", "8x1 gather", "4x2 ring"],
)
@pytest.mark.parametrize("name", sorted(CASES.keys() - ONCE))
def test_objectives_of_merged_embeddings_follow_their_formulas(mesh, name, form):
    follows_its_formula(mesh, name, form)


@pytest.mark.parametrize(
    "name",
    ["mixed simplex", "hard negatives weighed", pytest.param("filip", marks=pytest.mark.slow)],
)
def test_others_follow_theirs(name):
    follows_its_formula(make_cpu_mesh(4, 2), name, "ring")


def follows_its_formula(mesh, name, form):
    arguments, ours, value, gradients = expected(name)
    loss = functools.partial(ours, {"mesh": mesh, "form": form})
    by = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))))
    actual, actual_gradients = by(*arguments)
    np.testing.assert_allclose(actual, value, rtol=1e-5)
    assert_close(list(actual_gradients), gradients, 1e-5)


@pytest.fixture
def one_device():
    return {"mesh": make_cpu_mesh(1, 1)}


@pytest.mark.parametrize("mask", [False, True])
def test_one_text_for_each_document_gives_the_contrastive_loss(one_device, mask):
    rng = np.random.default_rng(4)
    rows = mixed_rows(rng, N)

    def ours(q, d, scale, rows):
        how = {"texts": [q], "present": [rows.valid], "mask_duplicates": mask}
        given = merged(jnp.zeros_like(q), d, scale, rows, **how, **one_device)
        return one_to_k_loss(given, LossConfig(one_to_k=OneToKConfig(0.0)))

    arguments = unit_rows(rng, N), unit_rows(rng, N), SCALE, rows
    wanted = compiled(gcl_loss_reference, mask_duplicates=mask)(*arguments)
    assert_close(compiled(ours)(*arguments), wanted, 1e-5)


@pytest.mark.parametrize("sides", [(), BOTH], ids=["not given", "all missing"])
@pytest.mark.parametrize("is_known", [False, True])
def test_without_hard_negatives_the_contrastive_loss_is_left(one_device, sides, is_known):
    q, d, rows, known, _ = batch()
    how = {"known": known if is_known else None, "mask_duplicates": True}

    def missing(side):
        x, valid, ids = random_negatives(side)
        return Negatives(x, np.zeros_like(valid), ids)

    def ours(q, d, scale, rows):
        given = {"negatives": {side: missing(side) for side in sides}}
        loss = LossConfig(hard_negatives=HardNegativesConfig(1, 1, 9))
        return hard_negatives_loss(merged(q, d, scale, rows, **given, **how, **one_device), loss)

    wanted = compiled(gcl_loss_reference, **how)(q, d, SCALE, rows)
    assert_close(compiled(ours)(q, d, SCALE, rows), wanted, 1e-5)


def test_fused_loss_of_perfect_and_orthogonal_pairs(one_device):
    """All three kinds agree: two of a pair's own, one the target, and three of each other pair."""
    x = np.eye(4, dtype=np.float32)
    loss = fused_loss(merged(x, x, np.float32(3), make_rows(4), **one_device), LossConfig())
    np.testing.assert_allclose(loss, np.log(2 + 9 * np.exp(-3)), rtol=1e-6)


def test_mixed_loss_of_one_perfect_pair(one_device):
    x = unit_rows(np.random.default_rng(0), 1)
    key = jax.random.key(0)
    options = LossConfig(mixed=MixedConfig(1, 1))
    loss = jax.jit(
        lambda x: mixed_loss(merged(x, x, 1.0, make_rows(1), key=key, **one_device), options)
    )
    np.testing.assert_allclose(loss(x), np.log(2), rtol=1e-6)


def test_mixed_loss_is_drawn_by_its_key(one_device):
    q, d, rows, *_ = batch()
    of_key = jax.jit(
        lambda key: mixed_loss(merged(q, d, SCALE, rows, key=key, **one_device), LossConfig())
    )
    first, again, other = (float(of_key(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again
    assert abs(first - other) > 1e-4
