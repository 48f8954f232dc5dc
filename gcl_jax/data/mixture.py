"""Several stores in one run, `data.stores`: as one store, and how their pairs take turns.

The records of one store stand behind those of another, so that a row number is of one store alone:
documents of two are never the same, and what is known of relevance does not cross. An id is
STORE/ID, a split STORE/SPLIT; STORE is the name of its folder. The splits that are trained on
together are one with a name of its own, "STORE/SPLIT + STORE/SPLIT".
"""

import bisect
import copy
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import HELD_OUT, VERSION, Pairs, RankedStore, Records
from gcl_jax.errors import ConfigError

TOGETHER = " + "
VALIDATION = re.compile(r"(val|valid|validation|dev)(?![a-z])", re.IGNORECASE)
CYCLE = 100  # batches at most, of which each store has its share exactly


class MixedRecords(Records):
    """The records of several stores, those of the first one first. A record lacks the fields that
    only others have."""

    def __init__(self, parts: Mapping[str, Records]):
        """Raises `ConfigError` if a field is an image in one store and a text in another."""
        self._names, self._parts = list(parts), list(parts.values())
        self.fields = {}
        for part in parts.values():
            for field, kind in part.fields.items():
                if self.fields.setdefault(field, kind) != kind:
                    raise ConfigError(
                        f"config.data.stores: field {field!r} is an image in one of "
                        f"{', '.join(parts)} and a text in another; give it two names when you "
                        "prepare them"
                    )
        self.image_size = min((x.image_size for x in self._parts if x.image_size), default=0)
        self.starts = np.cumsum([0, *(len(part.id_column) for part in self._parts)]).tolist()

    def __getstate__(self) -> dict:
        made = ("id_column", "ids")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: SupportsIndex) -> dict[str, str | bytes]:
        row = int(index)
        part = bisect.bisect_right(self.starts, row) - 1
        record = self._parts[part][row - self.starts[part]]
        nothing = {name: "" if kind == "text" else b"" for name, kind in self.fields.items()}
        return nothing | record | {"id": f"{self._names[part]}/{record['id']!s}"}

    def texts(self, fields: Sequence[str], rows: Iterable[int]) -> dict[str, list[str]]:
        asked = np.fromiter(rows, np.int64)
        found = {field: [""] * len(asked) for field in fields}
        for part, start, end in zip(self._parts, self.starts, self.starts[1:], strict=False):
            here = np.flatnonzero((asked >= start) & (asked < end))
            own = [field for field in fields if field in part.fields]
            read = part.texts(own, (asked[here] - start).tolist()) if own and here.size else {}
            for field, texts in read.items():
                for place, text in zip(here, texts, strict=True):
                    found[field][place] = text
        return found

    @functools.cached_property
    def id_column(self):
        import pyarrow as pa
        import pyarrow.compute as pc

        chunks = []
        for name, part in zip(self._names, self._parts, strict=True):
            first, between = (pa.scalar(word, part.id_column.type) for word in (name, "/"))
            chunks += pc.binary_join_element_wise(first, part.id_column, between).chunks
        return pa.chunked_array(chunks)


class Mixture(RankedStore):
    """Several stores as one; made by `gcl_jax.prepare.stores.open_stores`."""

    def __init__(self, stores: Mapping[str, RankedStore]):
        """`stores`: by what `data.stores` calls them, in that order.

        Raises:
            ConfigError: two have the same name, or a field of another kind.
        """
        self.stores = {store.name: store for store in stores.values()}
        if len(self.stores) < len(stores):
            raise ConfigError(
                f"config.data.stores: {', '.join(stores)}: the same folder twice, or the same "
                "name, which tells their splits apart; leave one out, or rename it"
            )
        self.directory = Path(TOGETHER.join(str(x.directory) for x in self.stores.values()))
        records = {
            side: MixedRecords({name: x.records[side] for name, x in self.stores.items()})
            for side in ("query", "document")
        }
        self.queries, self.documents = records["query"], records["document"]
        first = (records["query"].starts, records["document"].starts)
        self._first = dict(zip(self.stores, zip(*first, strict=True), strict=False))
        sources = {x.info["provenance"]["source"] for x in self.stores.values()}
        self.info = {
            "version": VERSION,
            "query_fields": self.queries.fields,
            "document_fields": self.documents.fields,
            "splits": {
                f"{name}/{split}": about
                for name, store in self.stores.items()
                for split, about in store.info["splits"].items()
            },
            "provenance": {
                "source": sources.pop() if len(sources) == 1 else "",
                "missing": {side: self._missing(side, x.fields) for side, x in records.items()},
            },
        }
        self._pairs: dict[str, Pairs] = {}

    def _missing(self, side: str, fields: Iterable[str]) -> dict[str, int]:
        """How many records of a side lack each field."""
        counts = dict.fromkeys(fields, 0)
        for store in self.stores.values():
            missing = store.info["provenance"]["missing"][side]
            for field in counts:
                counts[field] += missing.get(field, len(store.records[side].id_column))
        return counts

    @property
    def name(self) -> str:
        return TOGETHER.join(self.stores)

    @functools.cached_property
    def digest(self) -> str:
        digests = [store.digest for store in self.stores.values()]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest() if all(digests) else ""

    def pairs(self, split: str) -> Pairs:
        """The pairs of one split, of several together, of all that a store has, or of the splits of
        one name: in memory, those of a store after those of another."""
        if split not in self._pairs:
            found = []
            for one in self._each(split):
                name, _, own = one.partition("/")
                found.append(self._moved(name, self.stores[name].pairs(own)))
            self._pairs[split] = _concatenated(found)
        return self._pairs[split]

    def ground_truth(self, split: str, name: str) -> Pairs | None:
        self._check_split(split)
        store, _, own = split.partition("/")
        found = self.stores[store].ground_truth(own, name)
        return None if found is None else self._moved(store, found)

    def corpus(self, split: str) -> np.ndarray:
        """Also of the name of a store: all its documents."""
        if split in self.stores:
            return self._first[split][1] + np.arange(len(self.stores[split].documents.id_column))
        found = []
        for one in self._each(split):
            name, _, own = one.partition("/")
            found.append(self._first[name][1] + self.stores[name].corpus(own))
        return np.unique(np.concatenate(found))

    def _each(self, split: str, key: str = "") -> list[str]:
        found: list[str] = []
        for one in split.split(TOGETHER):
            has = {name: store.splits for name, store in self.stores.items()}
            own = [f"{one}/{name}" for name in has.get(one, ())]
            found += own or [f"{name}/{one}" for name in has if one in has[name]] or [one]
        for one in found:
            super()._check_split(one, key)
        return found

    def _check_split(self, split: str, key: str = "") -> None:
        self._each(split, key)

    def _moved(self, name: str, pairs: Pairs) -> Pairs:
        """Those of a store by the row numbers of all."""
        query, document = (
            (rows + first).astype(np.int32)
            for rows, first in zip((pairs.query, pairs.document), self._first[name], strict=True)
        )
        return Pairs(query, document, pairs.score, pairs.teacher_score)

    def resolve(self, cfg: TrainConfig) -> TrainConfig:
        """As of a store. `data.train_split` becomes one of every store, and a split that is named
        without a store, in `eval.splits` too, that of every store that has one; a store's name is
        all its splits."""
        cfg = copy.deepcopy(cfg)
        cfg.data.store, cfg.data.stores = "", dict(sorted(cfg.data.stores.items()))
        asked = cfg.data.train_split
        unasked = {name: store.resolve(TrainConfig()) for name, store in self.stores.items()}
        usual = [f"{name}/{one.data.train_split}" for name, one in unasked.items()]
        named = self._spelled(asked.split(TOGETHER)) if asked else usual
        order = [split.partition("/")[0] for split in named]
        if sorted(order) != sorted(self.stores):
            raise ConfigError(
                f"config.data.train_split={asked!r}: name a split of each store, such as "
                f"{TOGETHER.join(usual)!r}"
            )
        of_store = dict(zip(order, named, strict=True))
        cfg.data.train_split = TOGETHER.join(of_store[name] for name in self.stores)
        cfg.eval.splits = tuple(self._spelled(cfg.eval.splits))
        cfg = super().resolve(cfg)
        for side, weights in cfg.data.weights.items():
            used = [field for field, weight in weights.items() if weight > 0]
            for name, store in self.stores.items():
                if not set(used) & set(has := store.kinds[side]):
                    raise ConfigError(
                        f"config.data.{side}_fields: {', '.join(used)}: store {name} has none of "
                        f"them, only {', '.join(has)}; add one"
                    )
        return cfg

    def _spelled(self, splits: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(one for split in splits for one in self._each(split)))


def _concatenated(pairs: Sequence[Pairs]) -> Pairs:
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(x, name) for x in pairs])
        for name in ("query", "document", "score")
    }
    if any(x.teacher_score is not None for x in pairs):
        nothing = lambda x: np.full(len(x), np.nan, np.float32)
        scores = [nothing(x) if x.teacher_score is None else x.teacher_score for x in pairs]
        columns["teacher_score"] = np.concatenate(scores)
    starts = np.cumsum([0, *map(len, pairs)])[:-1]
    return Pairs(**columns, starts=tuple(starts.tolist()))


def of_stores(pairs: Pairs) -> list[slice]:
    """Which are those of each store."""
    return list(map(slice, pairs.starts, (*pairs.starts[1:], len(pairs))))


def fewest(pairs: Pairs) -> int:
    """How many there are of the smallest store."""
    return min(one.stop - one.start for one in of_stores(pairs))


def is_held_out(split: str) -> bool:
    """Whether nobody trains on `split`, or on one of several together, unasked."""
    return any(HELD_OUT.match(one.rpartition("/")[2]) for one in split.split(TOGETHER))


def validation_splits(cfg: TrainConfig) -> list[str]:
    """Those of `eval.splits` that validate by their names, and are not trained on."""
    trained = cfg.data.train_split.split(TOGETHER)
    named = [split for split in cfg.eval.splits if VALIDATION.match(split.rpartition("/")[2])]
    return [split for split in named if split not in trained]


def parts(cfg: TrainConfig, pairs: Pairs) -> list[tuple[TrainConfig, Pairs]]:
    """The `pairs` of each store, and a configuration to sample them by: its split, and as batch
    size how many pairs a batch takes of it, if it takes any. `cfg` is resolved for its stores.

    Raises:
        ConfigError: the weight of a store is so small that it never has its turn.
    """
    if len(pairs.starts) == 1:
        return [(cfg, pairs)]
    splits = cfg.data.train_split.split(TOGETHER)
    rows = [cfg.optim.batch_size] * len(splits)
    if cfg.data.batch_of == "all_stores":
        rows = turns(cfg).tolist()
    found = []
    for count, split, of_store in zip(rows, splits, of_stores(pairs), strict=True):
        own = copy.deepcopy(cfg)
        own.optim.batch_size, own.data.train_split = count, split
        query, document, score = (x[of_store] for x in (pairs.query, pairs.document, pairs.score))
        found.append((own, Pairs(query, document, score)))
    return found


def in_words(cfg: TrainConfig, pairs: Pairs, steps: int) -> list[str]:
    """A line for each of several stores: how much of a run of so many `steps` it is."""
    found, given = parts(cfg, pairs), turns(cfg) if len(pairs.starts) > 1 else np.ones(1)
    return [
        f"  {own.data.train_split}: {share:.1%} of all that is read, "
        f"{share * steps * cfg.optim.batch_size / len(x):.3g} times its {len(x)} pairs"
        for (own, x), share in zip(found, given / given.sum(), strict=True)
        if len(found) > 1
    ]


def turns(cfg: TrainConfig) -> Int[np.ndarray, " stores"]:
    """By weight, how many rows of a batch each store of `data.stores` has; or if a batch is of one
    store, how many batches of each cycle, which is as long as fits the weights best.

    Raises:
        ConfigError: a store has none.
    """
    weights = np.array(list(cfg.data.stores.values()), np.float64)
    share, total = weights / weights.sum(), cfg.optim.batch_size

    def counts(total: int) -> np.ndarray:
        whole = np.floor(share * total + 1e-9).astype(int)
        rest = np.argsort(whole - share * total, kind="stable")[: total - whole.sum()]
        whole[rest] += 1
        return whole

    def error(total: int) -> float:
        return round(float(np.abs(counts(total) / total - share).max()), 9)

    what = f"{total} rows of a batch"
    if cfg.data.batch_of == "one_store":
        total, what = min(range(len(share), CYCLE + 1), key=error), f"{CYCLE} batches"
    found = counts(total)
    if not found.all():
        least = list(cfg.data.stores)[int(np.argmin(found))]
        raise ConfigError(
            f"config.data.stores.{least}={weights.min():g} is too small a share: of {what} "
            "it has none; raise it"
        )
    return found


class Selection:
    """Which element of which store's endless stream of pairs stands at each place of all together,
    as (store, number): what `grain.MapDataset.select_from_datasets` takes. An epoch is `length`.

    They take turns in cycles: in each, store s comes turns[s] times, in a random order seeded by
    (seed, cycle), and gives its next `run` elements each time. So batches of `run`, or a cycle
    long, have of every store whole batches of its own stream.
    """

    def __init__(self, turns: Int[np.ndarray, " stores"], run: int, length: int, seed: int):
        self._turns, self._run, self._length, self._seed = turns, run, length, seed

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def _order(self):
        """Of a cycle: whose turn it is at each place, and how many that store has had before."""

        def order(cycle: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng((self._seed, len(self._turns), cycle))
            store = rng.permutation(np.repeat(np.arange(len(self._turns)), self._turns))
            before = np.empty_like(store)
            for one, count in enumerate(self._turns):
                before[store == one] = np.arange(count)
            return store, before

        return functools.lru_cache(maxsize=8)(order)

    def __getstate__(self) -> dict:
        """Without the cache, which a worker process makes anew."""
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn, row = divmod(index, self._run)
        cycle, place = divmod(turn, int(self._turns.sum()))
        stores, before = self._order(cycle)
        store = int(stores[place])
        number = cycle * int(self._turns[store]) + int(before[place])
        return store, number * self._run + row
