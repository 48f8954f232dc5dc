"""Every objective against its formula in float64, on every mesh and in both forms."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from scipy.special import log_expit, logsumexp
from test_contrastive import assert_close, make_rows, numeric_gradient, unit_rows
from test_targets import scored_batch

from gcl_jax import registry
from gcl_jax.config import LossConfig, ObjectivesConfig, TrainConfig
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.losses.contrastive import bixse_losses, gcl_loss_reference, sigmoid_losses
from gcl_jax.losses.listwise import (
    circle_losses,
    listmle_losses,
    listnet_losses,
    rince_losses,
)
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.multi_field import loss_flops, multi_field_loss
from gcl_jax.losses.objectives import check_config, check_data, check_inputs, objective
from gcl_jax.losses.pairs import KnownWeights, Softmax
from gcl_jax.losses.pairwise import distill_losses, lambdaloss_losses, roar_losses
from gcl_jax.registry import OBJECTIVES

N = 16
SCALE, BIAS = 15.0, -4.0


# References: z (n, n) logits, t (n, n) weights, labelled and valid (n, n), all for valid rows.


def sigmoid_by_hand(z, t, labelled):
    return -np.sum(np.where(labelled, t * log_expit(z), log_expit(-z))) / len(z)


def bixse_by_hand(z, t, _labelled):
    return -np.sum(t * log_expit(z) + (1 - t) * log_expit(-z)) / len(z)


def both_ways(of_list, *matrices):
    """The mean of `of_list(logits, ..., weights)` over the lists, by rows and by columns."""
    means = []
    for side in (matrices, [x.T for x in matrices]):
        lists = [of_list(*one) for one in zip(*side, strict=True) if one[-1].any()]
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


def circle_by_hand(s, t, _labelled, now, levels, margin, scale):
    """Of cosines; the factors are those of the cosines as they are `now`."""

    def of_list(s, now, t):
        level, m, losses = levels_of(t, levels), margin / levels, []
        for k in range(1, levels + 1):
            pulled, pushed = level >= k, (level < k) & (s > -2)  # masked ones are below
            high, low = k / levels, (k - 1) / levels
            up = scale * np.maximum(high + m - now, 0) * (high - m - s)
            down = scale * np.maximum(now - low + m, 0) * (s - low - m)
            if pulled.any() and pushed.any():
                total = np.logaddexp.reduce
                losses.append(np.logaddexp(0, total(up[pulled]) + total(down[pushed])))
        return np.mean(losses)

    return both_ways(of_list, s, now, t)


def best_known(t, ids, list_size):
    """Places of a query's documents: each once, the best first, ties by id."""
    known = [j for j in np.flatnonzero(t) if ids[j] not in ids[:j]]
    return sorted(known, key=lambda j: (-t[j], ids[j]))[:list_size]


def roar_by_hand(z, t, labelled, ids, list_size):
    losses = []
    for row, weights, is_labelled in zip(z, t, labelled, strict=True):
        known = best_known(weights, ids, list_size)
        z, t = np.concatenate([row[known], row[~is_labelled]]), weights[known]
        p = np.exp(z - logsumexp(z))[: len(known)]
        log_odds = np.log(p / (1 - p))
        for i, j in itertools.permutations(range(len(known)), 2):
            if t[j] == max(t[t < t[i]], default=None):
                losses.append(-log_expit(log_odds[i] - log_odds[j]))
    return np.mean(losses)


def lambdaloss_by_hand(z, t, _labelled, ids, list_size, mu):
    """As in allRank and sentence-transformers, with gains 2^y - 1 and labels y = log2(1 + T)."""
    losses = []
    for row, weights in zip(z, t, strict=True):
        known = best_known(weights, ids, list_size)
        z, y = row[known], np.log2(1 + weights[known])
        order = np.argsort(-z, kind="stable")
        z, y, d = z[order], y[order], np.log2(2 + np.arange(len(z)))
        g = (2**y - 1) / np.sum(np.sort(2**y - 1)[::-1] / d)
        of_list = [
            (mu * (1 / d[abs(i - j) - 1] - 1 / d[abs(i - j)]) + abs(1 / d[i] - 1 / d[j]))
            * (g[i] - g[j])
            * -log_expit(z[i] - z[j])
            / np.log(2)
            for i, j in itertools.permutations(range(len(z)), 2)
            if y[i] > y[j]
        ]
        losses += [sum(of_list)] if of_list else []
    return np.mean(losses)


def distill_by_hand(z, t, _labelled, ids, list_size, loss, temperature):
    losses = []
    for row, scores in zip(z, t, strict=True):
        known = best_known(scores, ids, list_size)
        z, t = row[known], scores[known] / temperature
        p, q = np.exp(t - logsumexp(t)), np.exp(z - logsumexp(z))
        off = [
            ((z[i] - z[j]) - (t[i] - t[j])) ** 2
            for i, j in itertools.permutations(range(len(z)), 2)
        ]
        if len(known) > 1:
            losses.append(np.sum(p * np.log(p / q)) if loss == "kl" else np.mean(off))
    return np.mean(losses)


DISTILL = {"list_size": 4, "temperature": 0.7}
OF_LOGITS = {
    "sigmoid": (sigmoid_losses, sigmoid_by_hand, {}),
    "bixse": (bixse_losses, bixse_by_hand, {}),
    "listnet": (listnet_losses, listnet_by_hand, {"temperature": 0.0}),
    "listnet exp": (listnet_losses, listnet_by_hand, {"temperature": 0.3}),
    "listmle": (listmle_losses, listmle_by_hand, {"levels": 5}),
    "rince": (rince_losses, rince_by_hand, {"levels": 4, "spread": 2.5}),
    "roar": (roar_losses, roar_by_hand, {"list_size": 4}),
    "lambdaloss": (lambdaloss_losses, lambdaloss_by_hand, {"list_size": 4, "mu": 3.0}),
    "distill": (distill_losses, distill_by_hand, DISTILL | {"loss": "kl"}),
    "distill margins": (distill_losses, distill_by_hand, DISTILL | {"loss": "margin_mse"}),
    "circle": (circle_losses, circle_by_hand, {"levels": 3, "margin": 0.4, "scale": 20.0}),
}


def graded_batch(rng, n, constant=False):
    """Ties, repeated queries and documents, invalid rows; weights in [0.1, 1]."""
    (q, d, _, rows), known = scored_batch(rng, n)
    table = known.weight / jnp.max(known.weight)
    table = jnp.ones_like(table) if constant else jnp.ceil(table * 10) / 10
    teacher = jnp.float32(np.random.default_rng(1).uniform(-1, 5, len(table)).clip(0))
    known = type(known)(known.start, known.document, table, known.search_steps, teacher)
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
def graded_case(name, mask, is_known):
    """(arguments, rows, known, expected value, expected gradients)."""
    q, d, rows, known = graded_batch(np.random.default_rng(0), N)
    known = known if is_known else None
    arguments = q, d, np.float32(SCALE), np.float32(BIAS)
    _, reference, options = OF_LOGITS[name]
    if "list_size" in options:
        options = options | {"ids": rows.document_id[rows.valid]}
    table = dataclasses.replace(known, weight=known.teacher) if "distill" in name else known
    hand = by_hand(functools.partial(reference, **options), rows, table, mask)
    if name == "circle":  # of cosines, in part as they are now
        now = by_hand(lambda s, *_: s, rows, known, mask)(*map(np.float64, (q, d, 1, 0)))
        of_cosines = functools.partial(reference, now=now, **options)
        hand = lambda q, d, *_: by_hand(of_cosines, rows, known, mask)(q, d, 1.0, 0.0)
    return arguments, rows, known, *value_and_numeric_gradients(hand, arguments)


def one_term(q, d, scale, rows, mesh, **options):
    return Logits({"": q}, {"": d}, scale, [Term("", "", rows)], mesh=mesh, block_size=5, **options)


def of_logits_cases():
    """The newest in one case only, if the slow ones are left out."""
    few = "circle", "roar", "lambdaloss", "distill", "distill margins"
    forms = ((1, 1), "gather"), ((8, 1), "gather"), ((4, 2), "ring")
    for name, mask, (mesh, form) in itertools.product(OF_LOGITS, (False, True), forms):
        seldom = name in few and (mask, mesh) != (True, (4, 2))
        marks = [pytest.mark.slow] * seldom
        yield pytest.param(mesh, name, form, mask, marks=marks, id=f"{mask}-{name}-{mesh} {form}")


@pytest.mark.parametrize(
    ("mesh", "name", "form", "mask"), list(of_logits_cases()), indirect=["mesh"]
)
def test_objectives_of_logits_follow_their_formulas(mesh, name, form, mask):
    loss, _, options = OF_LOGITS[name]
    settings = LossConfig()
    for key, value in options.items():
        of = settings if hasattr(settings, key) else getattr(settings, name.partition(" ")[0])
        setattr(of, key, value)
    for is_known in (True, False) if not options else (True,):
        arguments, rows, known, expected, by = graded_case(name, mask, is_known)

        def ours(q, d, scale, bias, rows=rows, known=known):
            how = {"bias": bias, "known": known, "mask_duplicates": mask, "form": form}
            return loss(one_term(q, d, scale, rows, mesh, **how), settings)[0]

        value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(*arguments)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert_close(gradients[:3], by[:3], 1e-5)
        # A bias cancels in every softmax: what is left is the rounding of a sum over all logits.
        np.testing.assert_allclose(gradients[3], by[3], rtol=1e-5, atol=1e-6)


def value_and_gradients(loss, rows, known, *arguments):
    """By queries, documents, scale and bias, on one device."""
    mesh = make_cpu_mesh(1, 1)

    def of_arrays(q, d, scale, bias):
        return loss(one_term(q, d, scale, rows, mesh, bias=bias, known=known), LossConfig())[0]

    return jax.jit(jax.value_and_grad(of_arrays, argnums=(0, 1, 2, 3)))(*arguments)


@pytest.mark.usefixtures("open_clip")
def test_sigmoid_of_constant_weights_is_open_clips_loss():
    import torch
    from open_clip.loss import SigLipLoss

    rng = np.random.default_rng(1)
    arrays = unit_rows(rng, N, 8), unit_rows(rng, N, 8), np.float32(SCALE), np.float32(BIAS)
    ours = value_and_gradients(sigmoid_losses, make_rows(N), None, *arrays)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    loss = SigLipLoss()(*tensors)
    loss.backward()
    assert_close(ours, (loss.detach().numpy(), tuple(t.grad.numpy() for t in tensors)), 1e-5)


@pytest.mark.parametrize("is_known", [False, True])
def test_bixse_of_constant_weights_is_the_sigmoid_loss(is_known):
    q, d, rows, known = graded_batch(np.random.default_rng(0), N, constant=True)
    given = rows, known if is_known else None, q, d, np.float32(SCALE), np.float32(BIAS)
    ours, wanted = (value_and_gradients(loss, *given) for loss in (bixse_losses, sigmoid_losses))
    assert_close(ours, wanted, 1e-5)


@pytest.mark.parametrize("name", ["listnet", "listmle", "rince"])
def test_one_document_for_each_query_makes_listwise_losses_the_contrastive_one(name):
    """A list of one has one level, the best: its weight takes no part."""
    rng = np.random.default_rng(2)
    valid, ids = rng.random(N) < 0.8, np.arange(N, dtype=np.int32)
    q, d, scale = unit_rows(rng, N), unit_rows(rng, N), np.float32(SCALE)
    weight = np.ones(N) if name == "rince" else rng.uniform(0.1, 1, N)
    known = KnownWeights.of_pairs(ids, ids, np.float32(weight))
    ours, by = value_and_gradients(
        lambda logits, _: OBJECTIVES[name].function(logits, LossConfig()),
        make_rows(N, weight, valid),
        known,
        *(q, d, scale, np.float32(0)),
    )
    contrast = jax.value_and_grad(gcl_loss_reference, argnums=(0, 1, 2))
    assert_close((ours, by[:3]), contrast(q, d, scale, make_rows(N, valid=valid)), 1e-5)


def config_of(*names):
    return TrainConfig(loss=LossConfig(objectives=ObjectivesConfig(**dict.fromkeys(names, 0.5))))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sigmoid", "config.model.init_logit_bias must be set for loss.objectives.sigmoid"),
        ("bixse", "config.model.init_logit_bias must be set for loss.objectives.bixse"),
        ("listnet", "config.loss.targets must be 'known' for loss.objectives.listnet"),
        ("listmle", "config.loss.targets must be 'known' for loss.objectives.listmle"),
        ("rince", "config.loss.targets must be 'known' for loss.objectives.rince"),
        ("roar", "config.loss.targets must be 'known' for loss.objectives.roar"),
        ("lambdaloss", "config.loss.targets must be 'known' for loss.objectives.lambdaloss"),
        ("distill", "config.loss.targets must be 'known' for loss.objectives.distill"),
        ("circle", "config.loss.targets must be 'known' for loss.objectives.circle"),
    ],
)
def test_what_an_objective_needs_is_named(name, message):
    cfg = config_of(name)
    cfg.loss.targets = "diagonal"
    with pytest.raises(ConfigError, match=message) as error:
        check_config(cfg)
    assert "\n" not in str(error.value)
    cfg.model.init_logit_bias, cfg.loss.targets = -10.0, "known"
    check_config(cfg)


@pytest.mark.parametrize(
    "name", ["bixse", "listnet", "listmle", "rince", "circle", "roar", "lambdaloss"]
)
def test_grades_that_are_all_the_same_are_refused(name):
    check_data(config_of(name), np.float32([0.5, 1]))
    with pytest.raises(DataError, match=f"config.loss.objectives.{name} .*all 3 pairs") as error:
        check_data(config_of(name), np.float32([0.5, 0.5, 0.5]))
    assert "\n" not in str(error.value)


def test_objectives_without_grades_take_any_weights():
    check_data(config_of("gcl", "sigmoid", "fused", "mixed"), np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("one_to_k", "query_fields", {"english": 0.5, "german": 0.5}),
        ("hard_negatives", "negatives", "store"),
        ("hard_negatives", "text_negatives", "swap"),
    ],
)
def test_data_that_an_objective_lacks_are_named(name, key, value):
    cfg, weights = config_of(name), np.ones(3, np.float32)
    cfg.data.query_fields = {"query": 1.0}
    message = f"config.loss.objectives.{name} .*config.data.{key}"
    with pytest.raises(DataError, match=message) as error:
        check_data(cfg, weights)
    assert "\n" not in str(error.value)
    setattr(cfg.data, key, value)
    check_data(cfg, weights)


@pytest.mark.parametrize(
    ("gcl", "fields"), [(1.0, {"title": 1.0}), (0.0, {"image": 0.5, "title": 0.5})]
)
def test_terms_inside_a_side_need_two_fields_and_an_objective(gcl, fields):
    cfg, weights = config_of("fused"), np.ones(3, np.float32)
    cfg.data.query_fields, cfg.data.document_fields = {"query": 1.0}, fields
    cfg.loss.objectives.gcl, cfg.loss.side_pairs = gcl, 0.5
    lacking = "pair single fields, .* not of fused" if len(fields) > 1 else "none .*: title.; "
    with pytest.raises(DataError, match=rf"config.loss.side_pairs=0.5 is of .*{lacking}") as error:
        check_data(cfg, weights)
    assert str(error.value).endswith("; leave it at 0")
    cfg.loss.objectives.gcl, cfg.data.document_fields = 1.0, {"image": 0.5, "title": 0.5}
    check_data(cfg, weights)


def test_hardness_needs_no_negatives_but_those_of_the_batch():
    cfg, weights = config_of("hard_negatives"), np.ones(3, np.float32)
    cfg.loss.hard_negatives.hardness = 5.0
    check_data(cfg, weights)


def test_negatives_that_no_objective_looks_at_are_refused():
    cfg = config_of("gcl")
    cfg.data.text_negatives = "swap"
    for check in (check_inputs, lambda cfg: check_data(cfg, np.ones(3, np.float32))):
        with pytest.raises(DataError, match=r"embedded for nothing .*objectives\.hard_negatives=1"):
            check(cfg)


def test_folders_that_are_not_there_are_told_before_data_are_opened(tmp_path):
    cfg = config_of("hard_negatives", "distill")
    for negatives, hint in (("refreshed", "; did you mean 'refresh'\\?"), (str(tmp_path), "")):
        cfg.data.negatives, cfg.loss.distill_from = negatives, "taught"
        key = "data.negatives='refreshed'" if hint else "loss.distill_from='taught'"
        with pytest.raises(DataError, match=rf"^config\.{key}: no such folder{hint}$"):
            check_inputs(cfg)


# An objective of one's own: margins between the pairs and what competes with them.


def margin_losses(logits, loss):
    """Weighted cross-entropy in which a pair must lead by `margin`, and by more the closer it is;
    competitors, tempered by `scale`, each have a handicap of their weight."""
    options = loss.options["margin"]

    def reductions(tile, _axis):
        lead = options["margin"] + 0.1 * tile.logits
        offset = jnp.where(tile.own, -lead, tile.columns.weight)
        return [Softmax(tile.members, tile.targets, options["scale"], offset)]

    return [
        (rows.cross_entropy.sum() + columns.cross_entropy.sum()) / (2 * term.rows.valid.sum())
        for term, ((rows,), (columns,)) in zip(logits.terms, logits.sums(reductions), strict=True)
    ]


def margin_reference(q, d, scale, bias, rows, margin, temper):
    """The same, dense."""
    z = scale * q @ d.T + bias
    own = jnp.eye(len(z), dtype=bool)
    z = temper * z + jnp.where(own, -(margin + 0.1 * z), rows.weight)
    z = jnp.where(rows.valid[:, None] & rows.valid, z, -1e9)
    log_likelihood = jax.nn.log_softmax(z, 1) + jax.nn.log_softmax(z, 0)
    total = jnp.where(rows.valid, rows.weight * jnp.diag(log_likelihood), 0).sum()
    return -total / (2 * rows.valid.sum())


@pytest.mark.parametrize(
    ("mesh", "form"),
    [((1, 1), "gather"), ((8, 1), "gather"), ((4, 2), "ring")],
    indirect=["mesh"],
    ids=["1x1", "8x1 gather", "4x2 ring"],
)
def test_offsets_make_margins(mesh, form):
    q, d, rows, _ = graded_batch(np.random.default_rng(4), N)
    arguments = q, d, np.float32(SCALE), np.float32(BIAS)
    settings = LossConfig(options={"margin": {"margin": 2.0, "scale": 0.5}})

    def ours(q, d, scale, bias):
        logits = one_term(q, d, scale, rows, mesh, bias=bias, form=form)
        return margin_losses(logits, settings)[0]

    hand = functools.partial(margin_reference, rows=rows, margin=2.0, temper=0.5)
    actual, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(*arguments) for f in (ours, hand)
    )
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_close(actual[1], expected[1], 1e-5)


def test_an_objective_is_added_by_one_registration(monkeypatch):
    monkeypatch.setattr(OBJECTIVES, "_homes", dict(OBJECTIVES._homes))
    monkeypatch.setattr(registry, "extensions", {})
    decorated = objective("margin", needs_bias=True)(margin_losses)
    assert decorated is margin_losses
    cfg = TrainConfig()
    cfg.loss.objectives = ObjectivesConfig(gcl=0.0, margin=0.5)
    cfg.loss.options = {"margin": {"margin": 1.0, "scale": 1.0}}
    with pytest.raises(ConfigError, match=r"init_logit_bias must be set .*objectives\.margin"):
        check_config(cfg)
    cfg.data.query_fields, cfg.data.document_fields = {"query": 1.0}, {"title": 1.0}
    assert loss_flops(cfg) == 8 * cfg.optim.batch_size**2 * cfg.model.embed_dim
    q, d, rows, _ = graded_batch(np.random.default_rng(4), N)
    batch = {
        "query_present": {"query": rows.valid},
        "document_present": {"title": rows.valid},
        "weight": rows.weight,
        "query_id": rows.query_id,
        "document_id": rows.document_id,
    }
    total, terms = jax.jit(
        functools.partial(multi_field_loss, loss=cfg.loss, data=cfg.data, mesh=make_cpu_mesh(2, 2))
    )({"query": {"query": q}, "document": {"title": d}}, batch, SCALE, BIAS)
    assert set(terms) == {"margin/merged"}
    expected = margin_reference(q, d, SCALE, BIAS, rows, 1.0, 1.0)
    np.testing.assert_allclose(terms["margin/merged"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, expected / 2, rtol=1e-5)
