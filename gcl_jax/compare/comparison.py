"""The rows of a comparison, made one after another, and shown side by side."""

import copy
import dataclasses
import gc
import json
import re
import statistics
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from gcl_jax import config, distributed
from gcl_jax.compare.tables import SHOWN, as_markdown, extremes, per_query, summarise
from gcl_jax.config import DataConfig, LossConfig, TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import ConfigError, DataError, UserError, did_you_mean
from gcl_jax.evaluate import results
from gcl_jax.evaluate.judgements import ground_truth_of, load_judgements
from gcl_jax.evaluate.results import SplitResult
from gcl_jax.paths import replacing, write_json
from gcl_jax.runs import NEWEST, is_run
from gcl_jax.search import hybrid
from gcl_jax.validation import check_workdir, validate

ROWS = {
    "bm25": "BM25",
    "random": "random",
    "before": "before training",
    "clip": "CLIP (constant weights)",
    "gcl": "GCL, inverse weights, diagonal (the paper's)",
    "gcl_sqrt": "GCL, inverse square root, diagonal",
    "gcl_known": "GCL, inverse weights, known relevance",
    "config": "the config's own recipe",
}
# What is trained with the contrastive sum alone, by loss.score_to_weight and loss.targets.
LOSSES = {
    "clip": ("constant", "diagonal"),
    "gcl": ("inverse", "diagonal"),
    "gcl_sqrt": ("inverse_sqrt", "diagonal"),
    "gcl_known": ("inverse", "known"),
}
TRAINED = (*LOSSES, "config")
# Of the config's loss, what these have, too.
KEPT = (
    *("merged", "field_pairs", "side_pairs", "pair_weights", "mask_duplicates", "matryoshka_dims"),
    *("form", "dtype", "kernel"),
)
NEGATIVES = [x.name for x in dataclasses.fields(DataConfig) if re.search("negat|refresh", x.name)]
PARTS = re.compile(r"(model|data|loss|optim|eval)\.|init_from$")  # of a config: they make results
FREE = {"data.store", "data.num_workers", "data.cached_records"}  # the digest tells the store


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Made by `checked`. `queries`: how many that win and lose most are shown of each row."""

    cfg: TrainConfig
    store: RankedStore
    out: Path
    methods: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    queries: int

    @classmethod
    def checked(
        cls,
        cfg: TrainConfig,
        store: RankedStore,
        out: Path,
        methods: Sequence[str] | None = None,
        baseline: str | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        queries: int = 5,
    ) -> "Comparison":
        """What can be compared of `methods`, by default of all `ROWS` but gcl_sqrt, and the
        config's own recipe only if it is none of the others; `cfg` need not be resolved.

        Raises:
            UserError: a row that there is not, or that cannot be made.
            ConfigError: a configuration that cannot work; `out` is a run, or holds a comparison by
                other settings.
            DataError: the store has no split to evaluate, or other fields.
        """
        for name in (*(methods or ()), *([baseline] if baseline else ())):
            if name not in ROWS:
                raise UserError(
                    f"{name!r} is no row; there are {', '.join(ROWS)}{did_you_mean(name, ROWS)}"
                )
        if methods is not None and not methods:
            raise UserError("--methods names no row")
        cfg = copy.deepcopy(cfg)
        validate(cfg)
        resolved, split = store.resolve(cfg), cfg.data.train_split
        split = split or resolved.data.train_split
        cfg.data.digest = resolved.data.digest
        if not cfg.eval.splits:
            cfg.eval.splits = tuple(s for s in store.splits if s != split or s == "in_domain")
        if not cfg.eval.splits:
            raise DataError(
                f"store {store.directory} has no split to evaluate beside {split!r}, which is "
                "trained on: prepare it with --val_share=0.1 or --split=paper, or name that one: "
                f"--config.eval.splits={split}"
            )
        for one in cfg.eval.splits:
            ground_truth_of(cfg, store, one)
        if not (cfg.checkpoint.best or cfg.eval.patience):  # nobody asks for these evaluations
            cfg.eval.every = 0
        kept = list(methods or _usual(cfg))
        try:
            if "bm25" in kept:
                hybrid.check(store, resolved.data.query_fields, "BM25")
        except UserError as error:
            if methods:
                raise
            kept.remove("bm25")
            distributed.announce(f"no row BM25: {error}")
        baseline = baseline or ("clip" if "clip" in kept else kept[0])
        if baseline not in kept:
            raise UserError(f"--baseline={baseline} is none of the rows: {', '.join(kept)}")
        found = cls(cfg, store, out, tuple(kept), baseline, tuple(seeds), queries)
        for method in kept:
            validate(found.trained(method, 0))
        check_workdir(out)
        found._check_same()
        return found

    def trained(self, method: str, seed: int) -> TrainConfig:
        """The configuration of one training; all that is not of `TRAINED` has the config's."""
        cfg = copy.deepcopy(self.cfg)
        cfg.seed = seed
        if method in LOSSES:
            cfg.loss = contrastive(cfg.loss, method)
            for name in NEGATIVES:  # which it has no use for
                setattr(cfg.data, name, getattr(DataConfig(), name))
        return cfg

    def folder(self, method: str, seed: int | None) -> Path:
        return self.out / (method if seed is None else f"{method}-seed{seed}")

    def jobs(self) -> Iterator[tuple[str, int | None]]:
        """Every row and seed, what is trained first: only that can turn out not to work."""
        for seed in self.seeds:
            yield from ((method, seed) for method in self.methods if method in TRAINED)
        for method in self.methods:
            if method == "before":
                # Pretrained weights are the same for every seed.
                seeds = self.seeds[:1] if self.cfg.init_from else self.seeds
                yield from ((method, seed) for seed in seeds)
            elif method not in TRAINED:
                yield method, None

    def is_done(self, method: str, seed: int | None) -> bool:
        folder = self.folder(method, seed) / "eval"
        return all((folder / f"{split}.json").is_file() for split in self.cfg.eval.splits)

    def run(self) -> str:
        """Makes all rows that are not there, and returns compare.md, which is written anew after
        every one. Raises what a training raises."""
        jobs, seconds = list(self.jobs()), list[float]()
        left = [job for job in jobs if not self.is_done(*job)]
        settings = {"config": dataclasses.asdict(self.cfg)}
        write_json(self.out / "compare.json", settings | self._old())
        for number, (method, seed) in enumerate(left, 1):
            after, time_left = sum(name in TRAINED for name, _ in left[number:]), ""
            if seconds and after + (method in TRAINED):
                about = statistics.mean(seconds) * (after + 1)
                time_left = f"; about {tqdm.tqdm.format_interval(about)} until all are trained"
            place = f"[{len(jobs) - len(left) + number}/{len(jobs)}]"
            of_seed = "" if seed is None else f", seed {seed}"
            distributed.announce(f"{place} {self.label(method)}{of_seed}{time_left}")
            started = time.perf_counter()
            self._make(method, seed, after)
            if method in TRAINED:
                seconds.append(time.perf_counter() - started)
            self._write()
        return self._write()

    def label(self, method: str) -> str:
        scratch = method == "before" and not self.cfg.init_from
        return f"{ROWS[method]} (random parameters)" if scratch else ROWS[method]

    def _make(self, method: str, seed: int | None, after: int) -> None:
        """The results of a row, in its folder; so many trainings come `after` it."""
        import jax

        from gcl_jax.evaluate import ranked
        from gcl_jax.train.loop import train
        from gcl_jax.train.monitor import trainings_after

        trainings_after.set(after)
        folder, cfg = self.folder(method, seed), self.trained(method, seed or 0)
        if method in TRAINED:
            train(cfg, folder)
            best = "best" if cfg.checkpoint.best else NEWEST
            ranked.evaluate_workdir(folder, checkpoint=best)
        else:
            cfg = self.store.resolve(cfg)
            found = before_training(cfg, self.store) if method == "before" else None
            for split, result in (found or without_model(cfg, self.store, method)).items():
                (folder / "eval").mkdir(parents=True, exist_ok=True)
                report = results.as_report(split, 0, result)
                report["ground_truth"] = ground_truth_of(cfg, self.store, split)
                results.write(folder / "eval" / split, report, result)
        gc.collect()
        jax.clear_caches()  # the programs of this training serve no other

    def _old(self) -> dict[str, Any]:
        """compare.json of an earlier call; nothing if there is none."""
        path = self.out / "compare.json"
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text("utf-8"))
            return {"config": found["config"]} | found
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged: remove it, and this command goes on") from None

    def _check_same(self) -> None:
        if is_run(self.out):
            raise ConfigError(f"{self.out} is a training run; choose another --out")
        if not (old := self._old()):
            return
        before = config.of_values(old["config"])
        keys = [x.key for x in config.described() if PARTS.match(x.key) and x.key not in FREE]
        ours, theirs = (
            {key: json.dumps(config.value(cfg, key)) for key in keys} for cfg in (self.cfg, before)
        )
        differ = [key for key in keys if ours[key] != theirs[key]]
        if "data.digest" in differ:
            raise ConfigError(
                f"{self.out} holds a comparison on another store, or on {self.store.directory} "
                "before it was prepared again; choose another --out"
            )
        if differ:
            listed = ", ".join(f"config.{key}={ours[key]}" for key in differ[:3])
            instead = ", ".join(theirs[key] for key in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise ConfigError(
                f"{listed}{more}: the comparison in {self.out} has {instead}; choose another --out"
            )

    def _write(self) -> str:
        """Writes what there is, beside the baseline, to compare.json and compare.md."""
        runs: dict[str, dict[Hashable, Path]] = {}
        for method, seed in sorted(self.jobs(), key=lambda job: self.methods.index(job[0])):
            if self.is_done(method, seed):
                runs.setdefault(method, {})[seed] = self.folder(method, seed)
        if self.baseline not in runs:
            return ""
        found = per_query(runs, self.cfg.eval.splits, list(SHOWN))
        fields = self.store.resolve(self.cfg).data.query_fields
        queries = extremes(found, self.baseline, self.queries)
        rows = {id: row for row, id in enumerate(self.store.queries.ids)}
        for one in (one for sides in queries.values() for side in sides.values() for one in side):
            record = self.store.queries[rows[one["query_id"]]]
            text = hybrid.text_of(self.store.queries, {field: record[field] for field in fields})
            one["query"] = text or one["query_id"]
        figures = self._old() | {
            "store": str(self.store.directory),
            "seeds": self.seeds,
            "baseline": self.baseline,
            "test_queries": {split: len(ids) for split, (ids, _) in found.items()},
            "labels": {method: self.label(method) for method in runs},
            "rows": summarise(found, self.baseline, list(SHOWN)),
            "queries": queries,
        }
        write_json(self.out / "compare.json", figures)
        text = as_markdown(figures)
        with replacing(self.out / "compare.md") as unfinished:
            unfinished.write_text(f"{text}\n", "utf-8")
        return text


def contrastive(loss: LossConfig, method: str) -> LossConfig:
    """That of a row of `LOSSES`, with what `loss` says of fields and of the computation."""
    to_weight, targets = LOSSES[method]
    kept = {name: getattr(loss, name) for name in KEPT}
    return LossConfig(score_to_weight=to_weight, targets=targets, **kept)


def _usual(cfg: TrainConfig) -> list[str]:
    """The rows that are made unasked."""

    def told(loss: LossConfig) -> dict[str, Any]:
        asked = {name: weight for name, weight in loss.objectives.items() if weight}
        return dataclasses.asdict(loss) | {"objectives": asked}

    usual = [name for name in ROWS if name != "gcl_sqrt"]
    if told(cfg.loss) in [told(contrastive(cfg.loss, name)) for name in usual if name in LOSSES]:
        usual.remove("config")
    return usual


def before_training(cfg: TrainConfig, store: RankedStore) -> dict[str, SplitResult]:
    """{split: results} of the parameters that a training of `cfg`, resolved for `store`, starts
    from."""
    import jax
    import optax

    from gcl_jax import sharding
    from gcl_jax.checkpoints.state import init_state
    from gcl_jax.config import MeshConfig
    from gcl_jax.embed.embedder import Embedder
    from gcl_jax.evaluate.ranked import evaluate_splits
    from gcl_jax.train.setup import load_init_from

    mesh = sharding.make_mesh(MeshConfig(), jax.device_count())
    start = load_init_from(cfg, mesh) if cfg.init_from else {}
    params = init_state(cfg, optax.identity(), mesh, start).params
    return evaluate_splits(cfg, store, Embedder(cfg, params, mesh), cfg.eval.max_queries)


def without_model(cfg: TrainConfig, store: RankedStore, method: str) -> dict[str, SplitResult]:
    """{split: results} of "bm25" or "random" under the protocol of `gcl_jax.evaluate`; `cfg` is
    resolved for `store`."""
    from gcl_jax.evaluate import ranked

    ranks, rng, found = ranked.id_ranks(store.documents), np.random.default_rng(0), {}
    for split in cfg.eval.splits:
        judgements = load_judgements(cfg, store, split, cfg.eval.max_queries)
        corpus = store.corpus(split)
        if method == "bm25":
            words, texts = ranked.words_of(cfg, store, judgements.queries, corpus)
            hits = words.search(texts, cfg.eval.top_k)
        else:
            drawn = [rng.random(len(corpus), np.float32) for _ in judgements.queries]
            hits = hybrid.best_of(drawn, cfg.eval.top_k)
        values = ranked.judged_metrics(judgements, *hits, ranks[corpus])
        ids = [store.queries.ids[row] for row in judgements.queries]
        found[split] = SplitResult(ids, {"merged": values}, {}, {})
    return found
