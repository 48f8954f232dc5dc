"""Every objective against its formula in float64, on every mesh and in both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, logsumexp
from test_contrastive import assert_close, make_rows, numeric_gradient
from test_targets import scored_batch

from gcl_jax.losses.listwise import listmle_losses, listnet_losses, rince_losses
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.sigmoid import bixse_losses, sigmoid_losses

N = 16
SCALE, BIAS = 15.0, -4.0


# References: z (n, n) logits, t (n, n) weights, labelled and valid (n, n), all for valid rows.


def sigmoid_by_hand(z, t, labelled):
    return -np.sum(np.where(labelled, t * log_expit(z), log_expit(-z))) / len(z)


def bixse_by_hand(z, t, _labelled):
    return -np.sum(t * log_expit(z) + (1 - t) * log_expit(-z)) / len(z)


def both_ways(of_list, z, t):
    """The mean of `of_list(logits, weights)` over the lists, by rows and by columns."""
    means = []
    for logits, weights in ((z, t), (z.T, t.T)):
        lists = [of_list(*one) for one in zip(logits, weights, strict=True) if one[1].any()]
        means.append(np.mean(lists))
    return np.mean(means)


def listnet_by_hand(z, t, _labelled, temperature):
    def of_list(z, t):
        p = np.where(t > 0, np.exp(t / temperature), 0) if temperature else t
        return -np.sum(p / p.sum() * (z - logsumexp(z)))

    return both_ways(of_list, z, t)


def levels_of(t, levels):
    return np.minimum(np.ceil(t * levels - 1e-4), levels)


def listmle_by_hand(z, t, _labelled, levels):
    def of_list(z, t):
        level = levels_of(t, levels)
        return np.mean([logsumexp(z[level <= level[i]]) - z[i] for i in np.flatnonzero(level)])

    return both_ways(of_list, z, t)


def rince_by_hand(z, t, _labelled, levels, spread):
    def of_list(z, t):
        level = levels_of(t, levels)
        losses = []
        for k in set(level[level > 0]):
            warm = z / np.interp(k, [1, levels], [spread, 1])
            positives = logsumexp(warm[level == k])
            losses.append(logsumexp(warm[level <= k]) - positives)
        return np.mean(losses)

    return both_ways(of_list, z, t)


OF_LOGITS = {
    "sigmoid": (sigmoid_losses, sigmoid_by_hand, {}),
    "bixse": (bixse_losses, bixse_by_hand, {}),
    "listnet": (listnet_losses, listnet_by_hand, {"temperature": 0.0}),
    "listnet exp": (listnet_losses, listnet_by_hand, {"temperature": 0.3}),
    "listmle": (listmle_losses, listmle_by_hand, {"levels": 5}),
    "rince": (rince_losses, rince_by_hand, {"levels": 4, "spread": 2.5}),
}


def graded_batch(rng, n, constant=False):
    """Ties, repeated queries and documents, invalid rows; weights in [0.1, 1]."""
    (q, d, _, rows), known = scored_batch(rng, n)
    table = known.weight / jnp.max(known.weight)
    table = jnp.ones_like(table) if constant else jnp.ceil(table * 10) / 10
    known = type(known)(known.start, known.document, table, known.search_steps)
    weight = np.ones(n) if constant else np.ceil(rng.uniform(0.05, 1, n) * 10) / 10
    return q, d, make_rows(n, weight, rows.valid, rows.query_id, rows.document_id), known


def by_hand(reference, rows, known, mask):
    """(q, d, scale, bias) -> the reference on the valid rows and columns; masked logits are far
    below all others."""
    t = np.diag(np.float64(rows.weight))
    if known is not None:
        t = np.float64(known(rows.query_id, rows.document_id))
    labelled = np.eye(len(t), dtype=bool) | (t > 0)
    same = rows.query_id[:, None] == rows.query_id
    same |= rows.document_id[:, None] == rows.document_id
    cut = np.ix_(*[np.flatnonzero(rows.valid)] * 2)
    masked = (same & ~labelled)[cut] & mask

    def loss(q, d, scale, bias):
        z = np.where(masked, -1e9, (scale * q @ d.T + bias)[cut])
        return reference(z, t[cut], labelled[cut])

    return loss


def value_and_numeric_gradients(f, arguments):
    exact = [np.float64(x) for x in arguments]

    def along(i):
        return numeric_gradient(lambda x: f(*exact[:i], x, *exact[i + 1 :]), exact[i])

    return f(*exact), [along(i) for i in range(len(exact))]


@functools.cache
def graded_case(name, mask, is_known, constant=False):
    """(arguments, rows, known, expected value, expected gradients)."""
    q, d, rows, known = graded_batch(np.random.default_rng(0), N, constant)
    known = known if is_known else None
    arguments = q, d, np.float32(SCALE), np.float32(BIAS)
    _, reference, options = OF_LOGITS[name]
    hand = by_hand(functools.partial(reference, **options), rows, known, mask)
    return arguments, rows, known, *value_and_numeric_gradients(hand, arguments)


def one_term(q, d, scale, rows, mesh, **options):
    return Logits({"": q}, {"": d}, scale, [Term("", "", rows)], mesh=mesh, block_size=5, **options)


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize("name", OF_LOGITS)
@pytest.mark.parametrize("mask", [False, True])
def test_objectives_of_logits_follow_their_formulas(mesh, name, form, mask):
    loss, _, options = OF_LOGITS[name]
    for is_known in (True, False) if not options else (True,):
        arguments, rows, known, expected, by = graded_case(name, mask, is_known)

        def ours(q, d, scale, bias, rows=rows, known=known):
            how = {"bias": bias, "known": known, "mask_duplicates": mask, "form": form}
            return loss(one_term(q, d, scale, rows, mesh, **how), **options)[0]

        value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(*arguments)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert_close(gradients[:3], by[:3], 1e-5)
        # A bias cancels in every softmax: what is left is the rounding of a sum over all logits.
        np.testing.assert_allclose(gradients[3], by[3], rtol=1e-5, atol=1e-6)
