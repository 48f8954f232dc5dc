"""What clicks say of relevance: the position-based model, P(click) = examination of the position
times attraction of the product for the query (Craswell et al., WSDM 2008), fitted to counts.

A pair here is a query and a product. Examination is relative to the first position there is. It is
fitted within the pairs that were seen at several positions, given each one's clicks, so that it
does not matter that better products stand higher: as in intervention harvesting (Agarwal et al.,
WSDM 2019), which needs no experiment, by the likelihood of Poisson counts with a free rate a pair
(Hausman, Hall and Griliches 1984). That is right also where a pair has few impressions; there the
expectation maximisation of the model (Wang et al., WSDM 2018), with as many free rates, takes too
many positions for examined (`tests/test_clicks.py` compares the two).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import optimize, sparse, special

from gcl_jax.errors import DataError

LAST_POSITION = 200  # later ones count as this one
SMOOTHNESS = 0.5  # standard deviation, before clicks say more, of log examination to the next one
SPAN = 100  # the best product's rate over that whose score is 1
SCALES = ("rank", "log")
SHOWN_POSITIONS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, LAST_POSITION)
BAR, MOVES = 40, 10


def fitted_examination(
    pair: np.ndarray, position: np.ndarray, impressions: np.ndarray, clicks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(the positions there are, ascending, float (k,): the examination of each, 1 for the first).
    Where no clicks tell, a position has that of its neighbours.

    Args:
        pair: int (n,), numbers from 0 without gaps. All arguments are rows of a log.
    """
    found, place = np.unique(np.minimum(position, LAST_POSITION), return_inverse=True)
    pairs, size = int(pair.max()) + 1, len(found)
    of_pair, of_place = np.bincount(pair, clicks, pairs), np.bincount(place, clicks, size)
    share = sparse.diags(np.divide(1, of_pair, out=np.zeros(pairs), where=of_pair > 0))
    steps = np.diff(np.eye(size), axis=0)
    stiff = steps.T @ steps / SMOOTHNESS**2
    logs = np.zeros(size)
    for _ in range(100):  # Newton: the penalised likelihood is concave; it takes about 6
        seen = impressions * np.exp(logs[place])
        expected = seen * (of_pair / np.bincount(pair, seen, pairs))[pair]
        at = np.bincount(place, expected, size)
        matrix = sparse.csr_matrix((expected, (pair, place)), (pairs, size))
        curvature = np.diag(at) - (matrix.T @ share @ matrix).toarray() + stiff
        gradient = of_place - at - stiff @ logs
        step = np.append(0.0, np.linalg.solve(curvature[1:, 1:], gradient[1:]))
        step /= max(1.0, abs(step).max() / 2)  # never further than the quadratic can be trusted
        logs += step
        if abs(step).max() < 1e-9:
            break
    return found, np.exp(logs)


def seen_at_several(pair: np.ndarray, position: np.ndarray) -> np.ndarray:
    """bool, per pair: whether the log has it at more than one position."""
    cells = np.unique(np.stack([pair, np.minimum(position, LAST_POSITION)]), axis=1)
    return np.bincount(cells[0], minlength=int(pair.max()) + 1) > 1


def smoothed_rates(
    counts: np.ndarray, examined: np.ndarray, query: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Counts per examined impression of each pair, drawn towards what is expected without them: the
    rate of its query, times a power of how much of it was examined beside the query's others. For a
    ranker that puts the better ones first has spoken, too, and of a pair that it hardly showed that
    is all there is. The power, and for how many examined impressions the expectation counts, are
    those under which the log is likeliest (empirical Bayes: gamma priors, Poisson counts).

    Args:
        counts, examined: float (pairs,); examined impressions are above 0.
        query: int (pairs,), numbers from 0.
    """
    if not counts.any():
        return np.zeros(len(counts)), {"weight": np.inf, "power": 0.0}
    of_query, examined_of_query = np.bincount(query, counts), np.bincount(query, examined)
    everywhere = np.full(len(of_query), counts.sum() / examined.sum())
    rates, _, _ = _posterior(of_query, examined_of_query, everywhere, np.empty((len(of_query), 0)))
    average = examined_of_query / np.bincount(query)
    beside = np.log(examined / average[query])
    features = np.stack([np.ones(len(beside)), beside], axis=1)
    rates, weight, powers = _posterior(counts, examined, rates[query], features)
    return rates, {"weight": weight, "power": float(powers[1])}


def _posterior(
    counts: np.ndarray, examined: np.ndarray, base: np.ndarray, features: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """(mean rates given the counts, k, b) of rates ~ gamma of mean m = base * exp(features @ b) and
    shape k m, k and b by the likelihood of the counts, which is negative binomial."""

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        k, mean = np.exp(parameters[0]), base * np.exp(features @ parameters[1:])
        shape, rate = k * mean, k / (k + examined)
        value = special.gammaln(counts + shape) - special.gammaln(shape)
        value += shape * np.log(rate) + counts * np.log1p(-rate)
        slope = special.digamma(counts + shape) - special.digamma(shape) + np.log(rate)
        at_k = shape * slope + shape * (1 - rate) - counts * rate
        return -value.sum(), -np.append(at_k.sum(), features.T @ (slope * shape))

    bounds = [(-5.0, 12.0)] + [(-5.0, 5.0)] * features.shape[1]
    start = np.append(1.0, np.zeros(features.shape[1]))
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    k, mean = float(np.exp(found[0])), base * np.exp(features @ found[1:])
    return (counts + k * mean) / (examined + k), k, found[1:]


def ranks(values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """int (n,): the place of each value among those of its query, 1 the highest; equals share the
    best of their places."""
    order = np.lexsort((-values, query))
    place = np.arange(len(order))
    new_query = np.append(True, np.diff(query[order]) != 0)
    new_value = new_query | np.append(True, np.diff(values[order]) != 0)
    start = np.maximum.accumulate(np.where(new_query, place, 0))
    result = np.empty(len(order), np.int64)
    result[order] = np.maximum.accumulate(np.where(new_value, place, 0)) - start + 1
    return result


def scores_of(rates: np.ndarray, query: np.ndarray, scale: str) -> np.ndarray:
    """Scores from 1 to 100, 100 the best of each query. "rank": 101 minus the rank, at least 1;
    "log": by the logarithm of the rate, 1 for a `SPAN`th of the best one's, or less."""
    if scale == "rank":
        return np.maximum(101.0 - ranks(rates, query), 1.0)
    best = np.zeros(int(query.max()) + 1)
    np.maximum.at(best, query, rates)
    below = np.log(np.maximum(rates / best[query], 1 / SPAN)) / np.log(SPAN)
    return np.clip(100 + 99 * below, 1, 100)


def rank_correlation(one: np.ndarray, other: np.ndarray, query: np.ndarray) -> float:
    """Spearman's, of ranks within queries, over all pairs together; NaN where all are equal."""
    a, b = (ranks(x, query) - ranks(-x, query) for x in (one, other))  # 0 is the middle
    with np.errstate(invalid="ignore"):
        return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """A row's numbers, (rows,) each: its query and product among `queries` and `products`, its
    file and its number there; `actions` is (rows, columns)."""

    query: np.ndarray
    product: np.ndarray
    position: np.ndarray
    file: np.ndarray
    row: np.ndarray
    impressions: np.ndarray
    actions: np.ndarray
    queries: list[str]
    products: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """The pairs that are kept: the file, the row and the score of each, in the order of the log;
    and what was made of the log, line by line."""

    file: np.ndarray
    row: np.ndarray
    score: np.ndarray
    examination: dict[int, float]
    report: list[str]


def scored(
    log: Log,
    weights: Mapping[str, float],
    known: set[str] | None,
    examination: Mapping[int, float] | None,
    scale: str,
    least: tuple[int, int, int],
) -> Scored:
    """Scores of the log's pairs.

    Args:
        weights: of the log's actions, in their order.
        known: ids of the documents there are; None: of every product.
        least: clicks and impressions of a pair, and clicks of a query.
    """
    worth = np.array(list(weights.values()))
    if not (log.actions @ worth).any():
        raise DataError(f"the log has no {' and no '.join(n for n, w in weights.items() if w)}")
    key = log.query * len(log.products) + log.product
    found, first, pair = np.unique(key, return_index=True, return_inverse=True)
    query, product = np.divmod(found, len(log.products))
    clicks = log.actions[:, 0]
    several = seen_at_several(pair, log.position)
    telling = clicks[several[pair]].sum()
    if examination is None:
        x = fitted_examination(pair, log.position, log.impressions, clicks)
    else:
        x = np.array(sorted(examination)), np.array([examination[i] for i in sorted(examination)])
    seen = np.interp(log.position, *x)
    impressions = np.bincount(pair, log.impressions)
    examined = np.bincount(pair, log.impressions * seen)
    counts = [np.bincount(pair, column) for column in log.actions.T]
    smoothed = [smoothed_rates(count, examined, query) for count in counts]
    rates = worth @ [rate for rate, _ in smoothed]
    raw = worth @ counts / impressions

    there = np.isin(product, [i for i, p in enumerate(log.products) if known is None or p in known])
    if not there.any():
        raise DataError(
            f"no product of the log is among the documents: there {log.products[0]!r}, here "
            f"{next(iter(known or ['nothing']))!r}; --id_column names the id in both"
        )
    of_query = np.bincount(query, counts[0])
    cuts = {
        f"pairs of queries with fewer clicks than {least[2]}": of_query[query] < least[2],
        "pairs of products without a document": ~there,
        f"pairs with fewer clicks than {least[0]}": counts[0] < least[0],
        f"pairs with fewer impressions than {least[1]}": impressions < least[1],
    }
    keep = np.ones(len(found), bool)
    told = []
    for name, cut in cuts.items():
        if gone := int((keep & cut).sum()):
            told.append(f"  left out: {gone} {name}")
        keep &= ~cut
    if not keep.any():
        raise DataError(f"no pair of the log is left; {'; '.join(x.strip() for x in told)}")
    lost = len(of_query) - len(np.unique(query[keep]))
    told += [f"  queries left without pairs: {lost} of {len(of_query)}"] if lost else []
    if known and (rowless := len(known - {log.products[i] for i in np.unique(product)})):
        told.append(f"  documents that the log does not name: {rowless}")

    score = scores_of(rates[keep], query[keep], scale)
    position = np.bincount(pair, log.impressions * log.position) / impressions
    report = [
        f"log: {len(key)} rows, {_n(impressions.sum())} impressions and {_n(clicks.sum())} clicks "
        f"of {len(found)} pairs, {len(of_query)} queries and {len(log.products)} products",
        *_of_examination(x, examination is not None, several.sum(), telling, len(x[0])),
        *(
            f"  {name} x {weights[name]:g}, smoothed: each pair has {about['weight']:.3g} examined "
            "impressions more, at its query's rate times (how much it was examined / the query's "
            f"mean) ^ {about['power']:.2f}"
            for name, (_, about) in zip(weights, smoothed, strict=True)
            if weights[name]
        ),
        *told,
        *_histogram(score, scale),
    ]
    kept = dataclasses.replace(log, query=query[keep], product=product[keep])
    figures = [column[keep] for column in (counts[0], impressions, position)]
    report += _moves(kept, raw[keep], rates[keep], figures)
    order = np.argsort(first[keep])
    rows = first[keep][order]
    curve = {int(i): round(float(value), 4) for i, value in zip(*x, strict=True)}
    return Scored(log.file[rows], log.row[rows], score[order], curve, report)


def _of_examination(
    x: tuple[np.ndarray, np.ndarray], given: bool, several: int, telling: float, size: int
) -> Iterator[str]:
    shown = [i for i in x[0] if i in SHOWN_POSITIONS] if size > 10 else x[0]
    curve = ", ".join(f"{i}: {np.interp(i, *x):.3g}" for i in shown)
    yield f"  examination by position, {'given' if given else 'fitted'}: {curve}"
    if not given:
        yield f"    from {_n(telling)} clicks of the {several} pairs seen at several positions"
    if not given and not telling:
        yield (
            "    warning: no pair that was seen at several positions was clicked, so nothing tells "
            "what positions do: clicks per impression are taken as they are; give --propensities"
        )


def _n(count: float) -> str:
    return f"{count:.12g}"


def _histogram(score: np.ndarray, scale: str) -> Iterator[str]:
    edges = np.linspace(1, 100, 12)
    counts, _ = np.histogram(score, edges)
    yield f"  scores ({scale}) of {len(score)} pairs:"
    for (low, high), count in zip(itertools.pairwise(edges), counts, strict=True):
        if count:
            bar = "#" * round(BAR * count / counts.max())
            yield f"    {f'{low:.0f}..{high:.0f}':>8} {count:>9} {bar}".rstrip()


def _moves(log: Log, raw: np.ndarray, rates: np.ndarray, figures: list) -> Iterator[str]:
    """What the correction changed, of the pairs whose query and product `log` has."""
    correlation = rank_correlation(raw, rates, log.query)
    if math.isnan(correlation):
        return
    yield f"  rank correlation within queries, actions per impression and scores: {correlation:.3f}"
    before, after = (ranks(x, log.query) for x in (raw, rates))
    largest = np.argsort(-abs(before - after), kind="stable")[:MOVES]
    largest = largest[before[largest] != after[largest]]
    if len(largest):
        yield "  the largest changes of rank in a query:"
    for i in largest:
        clicks, impressions, position = (column[i] for column in figures)
        yield (
            f"    {before[i]} to {after[i]}: {log.products[log.product[i]]!r} of "
            f"{log.queries[log.query[i]]!r}, {_n(clicks)} clicks of {_n(impressions)} impressions, "
            f"mean position {position:.1f}"
        )
