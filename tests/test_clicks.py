"""Logs of clicks to scores: the model recovers what made the clicks, and bad rows are one line."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from gcl_jax.data import __main__ as data_command
from gcl_jax.errors import DataError, UserError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import click_model


def simulated(seed, examination, queries=150, products=15, rankings=5, each=40, attraction=0.6):
    """(pair, position, impressions, clicks) of a log whose ranker puts better products first, and
    the attraction of every pair."""
    rng = np.random.default_rng(seed)
    rows, truth = [], attraction * rng.beta(1, 3, (queries, products))
    for query, found in enumerate(truth):
        for _ in range(rankings):
            order = np.argsort(-np.log(found) - rng.gumbel(size=products))[: len(examination)]
            clicks = rng.binomial(each, examination * found[order])
            places = np.arange(1, len(order) + 1)
            rows.append(np.stack([query * products + order, places, [each] * len(order), clicks]))
    return np.concatenate(rows, axis=1), truth.ravel()


def of_seen(rows):
    """Pairs numbered from 0 without gaps, and which they are."""
    which, pair = np.unique(rows[0], return_inverse=True)
    return pair, which


@pytest.mark.parametrize("seed", range(3))
def test_examination_and_relevance_are_recovered(seed):
    rng = np.random.default_rng(100 + seed)
    examination = np.cumprod(np.append(1, rng.uniform(0.5, 1, 9)))
    rows, truth = simulated(seed, examination)
    pair, which = of_seen(rows)
    positions, found = click_model.fitted_examination(pair, *rows[1:])
    assert positions.tolist() == list(range(1, 11))
    np.testing.assert_allclose(found, examination, rtol=0.15)
    query, clicks = which // 15, np.bincount(pair, rows[3])
    examined = np.bincount(pair, rows[2] * found[rows[1] - 1])
    rates, about = click_model.smoothed_rates(clicks, examined, query)
    wrong, raw = (
        ((x - truth[which]) ** 2).mean()
        for x in (rates, clicks / np.bincount(pair, rows[2]) * truth.mean())
    )
    assert about["power"] > 0  # the ranker knew something
    assert wrong < raw / 2
    assert spearmanr(rates, truth[which])[0] > 0.85


def test_examination_is_that_of_a_few_lines(monkeypatch):
    monkeypatch.setattr(click_model, "SMOOTHNESS", 1e6)
    rows, _ = simulated(0, 1 / np.arange(1, 7))
    pair, _ = of_seen(rows)
    _, position, impressions, clicks = rows
    curve = np.ones(6)
    for _ in range(500):  # rates that explain each pair's clicks, positions that explain theirs
        rate = np.bincount(pair, clicks) / np.bincount(pair, impressions * curve[position - 1])
        curve = np.bincount(position - 1, clicks)
        curve = curve / np.bincount(position - 1, impressions * rate[pair])
    found = click_model.fitted_examination(pair, position, impressions, clicks)[1]
    np.testing.assert_allclose(found, curve / curve[0], rtol=1e-5)


def expectation_maximisation(pair, position, impressions, clicks, steps=300):
    """Wang et al., WSDM 2018, section 3.2, with a free relevance for every pair."""
    examined, relevant = np.full(position.max(), 0.5), np.full(pair.max() + 1, 0.3)
    for _ in range(steps):
        e, r = examined[position - 1], relevant[pair]
        nothing = (impressions - clicks) / np.maximum(1 - e * r, 1e-12)
        examined = np.bincount(position - 1, clicks + nothing * e * (1 - r))
        examined = examined / np.bincount(position - 1, impressions)
        relevant = np.bincount(pair, clicks + nothing * (1 - e) * r) / np.bincount(
            pair, impressions
        )
    return examined / examined[0]


@pytest.mark.parametrize(("queries", "each", "agree"), [(40, 2000, True), (3000, 1, False)])
def test_expectation_maximisation_agrees_where_pairs_have_many_impressions(queries, each, agree):
    truth = 1 / np.arange(1, 7)
    rows, _ = simulated(0, truth, queries=queries, each=each)
    pair, _ = of_seen(rows)
    other = expectation_maximisation(pair, *rows[1:])
    found = click_model.fitted_examination(pair, *rows[1:])[1]
    np.testing.assert_allclose(found, truth, rtol=0.03 if agree else 0.1)
    if agree:
        np.testing.assert_allclose(other, found, rtol=0.01)
    else:
        assert (other[1:] > 1.15 * truth[1:]).all()  # why it is not what we use


def test_positions_without_clicks_have_the_examination_of_their_neighbours():
    pair, position = np.array([0, 0, 1, 1]), np.array([1, 2, 3, 900])
    clicks = np.array([400, 200, 0, 0])
    positions, found = click_model.fitted_examination(pair, position, np.full(4, 1000), clicks)
    assert positions.tolist() == [1, 2, 3, click_model.LAST_POSITION]
    np.testing.assert_allclose(found, [1, 0.5, 0.5, 0.5], rtol=0.05)


def test_a_pair_with_few_impressions_is_drawn_to_its_query():
    rng = np.random.default_rng(0)
    query = np.repeat(np.arange(100), 20)
    truth = np.repeat(rng.uniform(0.05, 0.5, 100), 20) * rng.gamma(4, 0.25, 2000)
    examined = rng.integers(1, 40, 2000).astype(float)
    counts = rng.poisson(truth * examined)
    rates, about = click_model.smoothed_rates(counts.astype(float), examined, query)
    assert abs(about["power"]) < 0.1  # of how much they are examined, nothing is to be learned
    assert ((rates - truth) ** 2).mean() < 0.6 * ((counts / examined - truth) ** 2).mean()
    assert (click_model.smoothed_rates(np.zeros(9), np.ones(9), np.arange(9))[0] == 0).all()


def test_ranks_and_scales():
    query, rates = np.array([0, 1, 0, 0, 0]), np.array([0.2, 0.1, 0.4, 0.2, 0.0001])
    assert click_model.ranks(rates, query).tolist() == [2, 1, 1, 2, 4]
    assert click_model.scores_of(rates, query, "rank").tolist() == [99, 100, 100, 99, 97]
    logs = click_model.scores_of(rates, query, "log")
    np.testing.assert_allclose(logs, [100 - 99 * np.log(2) / np.log(100), 100, 100, logs[0], 1])
    values = np.random.default_rng(0).integers(0, 9, (2, 30))
    ours = click_model.rank_correlation(*values, np.zeros(30, int))
    assert ours == pytest.approx(spearmanr(*values)[0])
    long = click_model.scores_of(-np.arange(300.0), np.zeros(300, int), "rank")
    assert (long.min(), long.max()) == (1, 100)


# From tables to stores

HEADER = ["query", "product_id", "position", "impressions", "clicks"]
LOG = [
    ["red shoes", "a", 1, 100, 30],
    ["red shoes", "b", 2, 100, 25],
    ["Red  Shoes", "b", 1, 50, 24],
    ["red shoes", "a", 2, 50, 8],
    ["blue hat", "c", 1, 10, 4],
    ["blue hat", "a", 2, 10, 0],
    ["a thing", "gone", 1, 10, 4],
]


def write(path, header, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(zip(header, zip(*rows, strict=True), strict=True))), path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(dict(zip(header, row, strict=True))) for row in rows)
        path.write_text("\n".join(lines))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter=";").writerows([header, *rows])
    return path


@pytest.fixture
def shop(tmp_path):
    products = [[x, f"thing {x}"] for x in "abcd"]
    write(tmp_path / "products.csv", ["product_id", "title"], products)

    def make(*more, header=HEADER, rows=LOG, suffix=".csv"):
        log = write(tmp_path / f"log{suffix}", header, rows)
        words = ["--source=clicks", f"--log={log}", "--document_fields=title"]
        words += [f"--documents={tmp_path / 'products.csv'}", *more]
        out = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        return prepare.prepare(prepare.make_parser().parse_args([f"--out={out}", *words]))

    return make


def scores(store):
    pairs = store.pairs("train")
    return {
        (store.queries.ids[q], store.documents.ids[d]): float(score)
        for q, d, score in zip(pairs.query, pairs.document, pairs.score, strict=True)
    }


def test_a_log_becomes_a_store(shop, capsys):
    store = shop("--query_fields=query")
    assert scores(store) == {
        ("red shoes", "b"): 100,
        ("red shoes", "a"): 99,
        ("blue hat", "c"): 100,
    }
    assert len(store.documents) == 4
    told = prepare.summary(store)
    for line in (
        "log: 7 rows, 330 impressions and 95 clicks of 5 pairs, 3 queries and 4 products",
        "from 87 clicks of the 2 pairs seen at several positions",
        "left out: 1 pairs of products without a document",
        "left out: 1 pairs with fewer clicks than 1",
        "queries left without pairs: 1 of 3",
        "documents that the log does not name: 1",
        "scores (rank) of 3 pairs:",
    ):
        assert line in told
    assert "warning" not in told
    assert list(store.info["provenance"]["examination"]) == ["1", "2"]
    data_command.inspect(str(store.directory), None, 2, 0)
    assert "examination by position, fitted: 1: 1, 2: " in capsys.readouterr().out
    page = store.directory.with_name(f"{store.directory.name}.html").read_text("utf-8")
    assert "How it was made" in page


def test_formats_row_kinds_and_names_of_columns_do_not_matter(shop):
    wanted = scores(shop("--scale=log"))
    for suffix in (".parquet", ".jsonl"):
        assert scores(shop("--scale=log", suffix=suffix)) == wanted
    names = ["query", "product_id", "rank", "shown", "hits"]
    flags = ["--position_column=rank", "--impressions_column=shown", "--clicks_column=hits"]
    assert scores(shop("--scale=log", *flags, header=names)) == wanted
    showings = [[*row[:3], i < row[4]] for row in LOG for i in range(row[3])]
    header = [*HEADER[:3], "clicks"]
    found = scores(shop("--scale=log", header=header, rows=showings, suffix=".jsonl"))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_actions_count_by_their_weights(shop):
    bought = [[*row, 0, 0] for row in LOG]
    bought[0][-1] = 20  # of "a", which is clicked less than "b"
    header = [*HEADER, "cart", "purchases"]
    store = shop(header=header, rows=bought)
    assert scores(store)["red shoes", "a"] == 100
    assert "purchases x 4, smoothed: " in prepare.summary(store)
    store = shop("--action_weights=clicks=1", header=header, rows=bought)
    assert scores(store)["red shoes", "b"] == 100
    alone = scores(shop("--action_weights=purchases=1", "--scale=log", header=header, rows=bought))
    assert alone["red shoes", "a"] == 100 > alone["red shoes", "b"]


def test_given_examination(shop, tmp_path):
    table = write(tmp_path / "curve.csv", ["position", "examination"], [[1, 1], [2, 0.25]])
    told = []
    for given in ("1,0.25", str(table), "1"):
        store = shop(f"--propensities={given}", "--scale=log")
        told.append((scores(store), store.info["provenance"]["examination"]))
    assert told[0] == told[1] != told[2]
    assert told[2][1] == {"1": 1.0}


def test_positions_that_never_vary_correct_nothing_and_are_told(shop):
    rows = [row for i, row in enumerate(LOG) if i not in (2, 3)]
    store = shop(rows=rows)
    assert "warning: no pair that was seen at several positions was clicked" in prepare.summary(
        store
    )
    assert set(store.info["provenance"]["examination"].values()) == {1.0}


BAD = {
    "bad position: '0'; positions are whole numbers": (2, 0),
    "bad position: ''": (2, ""),
    "bad position: '1.5'": (2, 1.5),
    "bad position: 'first'": (2, "first"),
    "bad count: clicks '-1'; counts are numbers from 0": (4, -1),
    "bad count: clicks 'nan'": (4, "nan"),
    "bad count: clicks '1,000'": (4, "1,000"),
    "bad count: impressions 'many'": (3, "many"),
    "bad count: impressions 'inf'": (3, "inf"),
    "more clicks than impressions: clicks 101 of 100; ": (4, 101),
    "empty query: nothing in query": (0, " "),
    "empty document id: nothing in product_id": (1, ""),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_one_line(shop, message):
    column, value = BAD[message]
    rows = [list(row) for row in LOG]
    rows[1][column] = value
    with pytest.raises(DataError, match=r"log\.csv, line 3: ") as error:
        shop(rows=rows)
    assert message in str(error.value)
    if message.startswith("no column"):
        flag = more[0].partition("=")[0]
        assert str(error.value).endswith(f"; {flag} names it")
    assert "\n" not in str(error.value)
    store = shop("--on_error=skip", rows=rows)
    assert sum(store.info["provenance"]["skipped"].values()) == 1
    assert scores(store)["red shoes", "b"] == 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--position_column=rank"], "no column 'rank'; there are query, product_id, position"),
        (["--impressions_column=views"], "no column 'views'; there are query, product_id"),
        (["--id_column=title"], "no column 'title'; there are query, product_id"),
        (["--min_clicks=1000"], "no pair of the log is left; left out: "),
        (["--pairs=log.csv"], "--source=clicks takes no 'pairs'; it takes log, "),
        (["--val_share=2"], "--val_share=2.0 is not from 0 to below 1"),
    ],
)
def test_what_cannot_be_is_one_line(shop, more, message):
    with pytest.raises(UserError) as error:
        shop(*more)
    assert message in str(error.value)


WRONG_FLAGS = ["--propensities=1,0", "--propensities=a.csv", "--propensities=x", "--scale=linear"]
WRONG_FLAGS += [f"--action_weights={text}" for text in ("clicks", "a=0", "a=1,a=2", "a=-1")]


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_ends_at_once(flag, capsys):
    with pytest.raises(SystemExit):
        prepare.make_parser().parse_args(["--out=x", flag])
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_a_log_of_other_products_or_without_clicks_is_one_line(shop):
    with pytest.raises(DataError, match="no product of the log is among the documents: there 'z'"):
        shop(rows=[["red", "z", 1, 2, 1]])
    with pytest.raises(DataError, match="the log has no clicks"):
        shop(rows=[["red", "a", 1, 2, 0]])
    with pytest.raises(DataError, match="the log has no row with impressions"):
        shop(rows=[["red", "a", 1, 0, 0]])
