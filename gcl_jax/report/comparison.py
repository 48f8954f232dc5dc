"""Several evaluated runs side by side: the content of a comparison page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcl_jax.errors import DataError, UserError
from gcl_jax.evaluate.results import compare
from gcl_jax.report.charts import compared_charts, interval_chart
from gcl_jax.report.evaluated import SPLIT_NOTES, EvaluatedRun, essentials, open_index, read_run
from gcl_jax.report.examples import EXTREME_PER_SPLIT, Chosen, answer_all, highest, make_section
from gcl_jax.stores import one_store


def settings_that_differ(runs: Sequence[EvaluatedRun]) -> dict[str, list[str]]:
    """{key of the configuration: its value in every run}, as JSON."""

    def flat(value: Any, key: str) -> dict[str, str]:
        if not isinstance(value, dict) or not value:
            return {key: json.dumps(value, ensure_ascii=False)}
        parts = (flat(v, f"{key}.{name}" if key else name) for name, v in value.items())
        return {name: text for part in parts for name, text in part.items()}

    flats = [flat(json.loads((r.workdir / "config.json").read_text()), "") for r in runs]
    keys = dict.fromkeys(key for one in flats for key in one)
    table = {key: [one.get(key, "–") for one in flats] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def check_same_judgements(runs: Sequence[EvaluatedRun]) -> None:
    """Raises `DataError` unless all were evaluated by the same ground truth."""
    for run in runs[1:]:
        for split, evaluation in run.evaluations.items():
            ours, theirs = (e.get("ground_truth") for e in (runs[0].evaluations[split], evaluation))
            if ours != theirs:
                raise DataError(
                    f"split {split}: {runs[0].workdir} was evaluated by the ground truth {ours!r}, "
                    f"{run.workdir} by {theirs!r}; evaluate both alike"
                )


def several_runs(workdirs: Sequence[Path]) -> dict[str, Any]:
    """What comparison.html shows. Raises as `write_report`."""
    store = one_store(workdirs)
    names = [workdir.resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = list(map(str, workdirs))
    if len(set(names)) < len(names):
        raise UserError("a --workdir is given twice")
    splits: Sequence[str] = ()
    runs: list[EvaluatedRun] = []
    for name, workdir in zip(names, workdirs, strict=True):
        runs.append(read_run(name, workdir, store, splits))
        splits = list(runs[0].samples)
    first, *others = runs
    check_same_judgements(runs)
    differences = {}
    chosen: dict[tuple[str, bool], Chosen] = {}
    for other in others:
        by_split = compare(first.workdir, other.workdir)
        differences[other.name] = {split: by_split[split] for split in splits}
        gains = {
            split: other.samples[split].of(sample.judgements.queries) - sample.ndcg
            for split, sample in first.samples.items()
        }
        for better, sign in ((True, 1), (False, -1)):
            chosen[other.name, better] = {
                split: places[(sign * gain)[places] > 0]
                for split, gain in gains.items()
                for places in [highest(sign * gain, EXTREME_PER_SPLIT)]
            }
    intervals = {
        name: {
            split: (d.low, d.difference, d.high)
            for split, d in ((split, metrics["NDCG@10"]) for split, metrics in by_split.items())
        }
        for name, by_split in differences.items()
    }
    found, facts = {}, []
    for run in runs:
        mine = [c for (name, _), c in chosen.items() if run is first or name == run.name]
        index, parameters = open_index(run)
        found[run.name] = answer_all(run.name, run.cfg, store, index, first.samples, mine)
        facts.append(essentials(run, store, parameters))
    sections = [
        make_section(
            f"Largest {'gains' if better else 'losses'} of {name}",
            f"Queries of each split whose nDCG@10 is furthest {'above' if better else 'below'} "
            f"that of {first.name}.",
            choice,
            store,
            first.samples,
            [found[first.name], found[name]],
        )
        for (name, better), choice in chosen.items()
    ]
    return {
        "names": names,
        "essentials": {fact: [one[fact] for one in facts] for fact in facts[0]},
        "settings": settings_that_differ(runs),
        "differences": differences,
        "metrics": list(next(iter(differences.values()))[splits[0]]),
        "splits": splits,
        "split_notes": SPLIT_NOTES,
        "interval_chart": interval_chart("NDCG@10", intervals),
        "charts": compared_charts({run.name: run.curves for run in runs}, splits),
        "sections": [section for section in sections if section.examples],
    }
