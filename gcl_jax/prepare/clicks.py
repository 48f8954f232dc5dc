"""Logs of clicks: rows of (query, product, position, impressions, clicks, other actions), one a
showing or added up, become graded scores, and these the store that a table of scores makes.

The logs are read twice: first their counts, from which `click_model` makes the scores; then, as a
table of pairs, the first row of every pair that is kept, with its score.
"""

import array
import contextlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax import logs
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.paths import local_path
from gcl_jax.prepare.click_model import SCALES, Log, Scored, scored
from gcl_jax.prepare.records import cells_of, id_cell
from gcl_jax.prepare.rows import (
    TABLES,
    Format,
    Formats,
    Row,
    Rows,
    Table,
    count_rows,
    read_rows,
    table_files,
)
from gcl_jax.prepare.source import BadRows, Columns, Place, Reason, RowError
from gcl_jax.prepare.tables import TablesSource, checked_share, cleaned
from gcl_jax.registry import SOURCES

SCORE = "score of clicks"  # a column that no log has
IMPRESSIONS, CLICKS = "impressions", "clicks"  # columns, if not said otherwise
ACTIONS = {"cart": 2.0, "purchases": 4.0}  # what they are worth, beside a click


def action_weights(text: str) -> dict[str, float]:
    """{column: weight} of "clicks=1,cart=2"; raises `ConfigError`."""
    weights = {}
    for item in text.split(","):
        column, _, number = item.rpartition("=")
        try:
            weights[column.strip()] = weight = float(number)
        except ValueError:
            weight = math.nan
        if not column.strip() or not 0 <= weight < math.inf:
            raise ConfigError(f"{item!r} is not COLUMN=WEIGHT, the weight 0 or more")
    if len(weights) < text.count(",") + 1 or not any(weights.values()):
        raise ConfigError(f"{text!r}: name every column once, and give one a weight above 0")
    return weights


def given_examination(text: str) -> dict[int, float]:
    """{position: examination} of "1,0.6,0.4", or of a table with columns position and examination;
    raises `UserError`."""
    if Path(text).suffix.lower() in TABLES:
        found = {}
        for number, row in read_rows(local_path(text), ["position", "examination"]):
            place = Place(Path(text), number)
            try:
                if isinstance(row, RowError):
                    raise row
                found[_position(row["position"])] = _count(row["examination"], "examination")
            except RowError as error:
                raise DataError(f"{place}: {error}") from None
    else:
        try:
            found = {i: float(x) for i, x in enumerate(text.split(","), 1)}
        except ValueError:
            found = {}
    if not found or not all(0 < value < math.inf for value in found.values()):
        raise ConfigError(
            f"{text!r} is neither numbers above 0, 1,0.6,0.4 of the first positions, nor a table "
            "of position and examination"
        )
    return found


FLAGS: dict[str, dict[str, Any]] = {
    "log": {
        "type": local_path,
        "nargs": "+",
        "metavar": "FILE",
        "help": "files with a row for every showing of a product, or for several with their counts",
    },
    "position_column": {
        "metavar": "COLUMN",
        "help": "where in the results it was shown, the first is 1 (default: position)",
    },
    "impressions_column": {
        "metavar": "COLUMN",
        "help": "how often (default: impressions; a log without it has one a row)",
    },
    "clicks_column": {
        "metavar": "COLUMN",
        "help": "how many of them were clicked, which fits the click model (default: clicks)",
    },
    "action_weights": {
        "type": action_weights,
        "metavar": "COLUMN=WEIGHT,...",
        "help": "columns that count actions, and what one is worth (default: "
        "clicks=1,cart=2,purchases=4, as far as the log has them)",
    },
    "propensities": {
        "type": given_examination,
        "metavar": "NUMBERS|FILE",
        "help": "how likely each position is examined: 1,0.6,0.4 or a table of position and "
        "examination; later ones are as the last, so 1 corrects nothing (default: fitted)",
    },
    "scale": {
        "choices": SCALES,
        "help": "scores by rank in the query (default), or by the logarithm of the rates",
    },
    "min_clicks": {
        "type": int,
        "metavar": "N",
        "help": "leave pairs with fewer out (default 1)",
    },
    "min_impressions": {
        "type": int,
        "metavar": "N",
        "help": "leave pairs with fewer out (default 1)",
    },
    "min_query_clicks": {
        "type": int,
        "metavar": "N",
        "help": "leave queries with fewer out (default 1)",
    },
}


def _count(value: object, column: str) -> float:
    """A cell as a number from 0. Raises `RowError`."""
    try:
        if isinstance(value, str | bytes) and "_" in str(value):  # float("1_0") is 10
            raise ValueError
        count = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        count = math.nan
    if not 0 <= count < math.inf:
        raise RowError(Reason.BAD_COUNT, f"{column} {value!r}")
    return count


def _position(value: object) -> int:
    try:
        number = math.nan if isinstance(value, bool) else _count(value, "position")
    except RowError:
        number = math.nan
    if not 1 <= number < 2**31 or number != int(number):
        raise RowError(Reason.BAD_POSITION, f"{value!r}")
    return int(number)


def read_log(
    files: Sequence[Path],
    columns: Columns,
    position: str,
    impressions: str | None,
    actions: Sequence[str],
    bad_rows: BadRows,
) -> Log:
    """Raises `DataError`: a file or column is not there; or, with the strict policy, a row is bad.

    Args:
        impressions: None: every row is one.
        actions: the first must not be more than the impressions.
    """
    fields = columns.query_fields
    counted = [*([impressions] if impressions else []), *actions]
    wanted = [columns.document_id, *fields, position, *counted]
    wanted += [columns.query_id] if columns.query_id else []
    queries: dict[object, int] = {}
    products: dict[str, int] = {}
    names: list[str] = []
    whole, number = array.array("q"), array.array("d")  # of a row 5 and 1 + its actions

    def read(file: int, place: int, row: Row) -> None:
        values = cells_of(row, fields)
        key = id_cell(row[columns.query_id]) if columns.query_id else cleaned(values)
        if not any(values) or not key:
            raise RowError(Reason.EMPTY_QUERY, f"nothing in {', '.join(fields)}")
        if not (product := id_cell(row[columns.document_id])):
            raise RowError(Reason.EMPTY_DOCUMENT_ID, f"nothing in {columns.document_id}")
        at = _position(row[position])
        counts = [_count(row[column], column) for column in counted]
        shown = counts.pop(0) if impressions else 1.0
        if counts[0] > shown:
            detail = f"{actions[0]} {counts[0]:g} of {shown:g}"
            raise RowError(Reason.MORE_CLICKS, detail)
        if shown:
            asked = queries.setdefault(key, len(queries))
            if asked == len(names):
                names.append(" ".join(str(x) for x in values if isinstance(x, str)))
            sold = products.setdefault(product, len(products))
            whole.extend((asked, sold, at, file, place))
            number.extend((shown, *counts))

    total = sum(count_rows(path) for path in files)
    with logs.progress(total, unit="rows", description="log") as bar:
        for file, path in enumerate(files):
            last = 0
            for place, row in read_rows(path, wanted):
                bar.update(place - last)
                last = place
                with bad_rows.at(Place(path, place)):
                    if isinstance(row, RowError):
                        raise row
                    read(file, place, row)
        bar.update(total - bar.n)
    if not whole:
        raise DataError(f"{files[0]}: the log has no row with impressions{bad_rows.told()}")
    query, product, at, of_file, line = np.asarray(whole).reshape(-1, 5).T
    counts = np.asarray(number).reshape(len(query), -1)
    return Log(
        query, product, at, of_file, line, counts[:, 0], counts[:, 1:], names, list(products)
    )


def with_scores(files: Sequence[Path], made: Scored) -> Formats:
    """How the files of a log, among others, are read as tables of pairs: of each the rows that
    `made` has, with a column `SCORE`."""
    rows_of = {
        path: list(zip(made.row[of].tolist(), made.score[of].tolist(), strict=True))
        for path, of in ((path, made.file == i) for i, path in enumerate(files))
    }

    def wrapped(table: Format) -> Format:
        def rows(path: Path, columns: list[str]) -> Rows:
            found = table.rows(path, [column for column in columns if column != SCORE])
            if path not in rows_of:
                yield from found
                return
            wanted = iter(rows_of[path])
            following = next(wanted, (0, 0.0))
            for number, row in found:
                if number == following[0] and isinstance(row, dict):
                    yield number, row | {SCORE: following[1]}
                    following = next(wanted, (0, 0.0))

        return table._replace(rows=rows)

    return {suffix: wrapped(table) for suffix, table in TABLES.items()}


def _has(files: Sequence[Path], column: str) -> bool:
    """Whether the first file, if it can be read, has the column."""
    try:
        next(read_rows(files[0], [column]), None)
    except DataError:
        return False
    return True


def _ids(files: Sequence[Path], column: str) -> set[str]:
    """Those that can be read; the others are reported when their rows are."""
    found = set()
    for _, row in itertools.chain.from_iterable(read_rows(file, [column]) for file in files):
        with contextlib.suppress(RowError):
            found |= {id_cell(row[column])} if isinstance(row, dict) else set()
    return found


@SOURCES.register("clicks")
def clicks_source(
    log: list[Path],
    document_fields: dict[str, str],
    bad_rows: BadRows,
    documents: Sequence[Path] = (),
    query_fields: dict[str, str] | None = None,
    query_id_column: str | None = None,
    id_column: str = "product_id",
    position_column: str = "position",
    impressions_column: str | None = None,
    clicks_column: str = CLICKS,
    action_weights: dict[str, float] | None = None,
    propensities: dict[int, float] | None = None,
    scale: str = "rank",
    min_clicks: int = 1,
    min_impressions: int = 1,
    min_query_clicks: int = 1,
    split: str | None = None,
    val_share: float | None = None,
    seed: int = 0,
    image_root: Path | None = None,
) -> TablesSource:
    """Logs of clicks, and tables of the products."""
    share = checked_share(val_share, split, None)
    files = list(dict.fromkeys(file for path in log for file in table_files(path)))
    sold = [file for path in documents for file in table_files(path)]
    fields = query_fields or {"query": "text"}
    columns = Columns(fields, document_fields, id_column, SCORE, query_id_column)
    if impressions_column is None and _has(files, IMPRESSIONS):
        impressions_column = IMPRESSIONS
    if action_weights is None:
        action_weights = {clicks_column: 1.0}
        action_weights |= {name: worth for name, worth in ACTIONS.items() if _has(files, name)}
    weights = {clicks_column: 0.0} | action_weights
    known = _ids(sold, id_column) if sold else None
    data = read_log(files, columns, position_column, impressions_column, list(weights), bad_rows)
    least = min_clicks, min_impressions, min_query_clicks
    made = scored(data, weights, known, propensities, scale, least)
    about: dict[str, object] = {
        "source": "clicks",
        "weights": weights,
        "examination": made.examination,
        "report": made.report,
    }
    return TablesSource(
        [Table(file) for file in files],
        columns,
        bad_rows,
        documents=[Table(file) for file in sold],
        image_root=image_root,
        split=split or "train",
        val_share=share,
        seed=seed,
        formats=with_scores(files, made),
        about=about,
    )
