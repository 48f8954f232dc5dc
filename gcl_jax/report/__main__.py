"""One page about a run: `python -m gcl_jax.report --workdir=runs/demo` writes WORKDIR/report.html.

It shows the evaluation (WORKDIR/eval), the training curves (WORKDIR/metrics.jsonl) and what the
model finds for a few test queries. With several --workdir it compares the other runs with the first
and writes FIRST/comparison.html. The file stands alone: no script, nothing loaded from elsewhere.
"""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from gcl_jax.errors import reported_in_one_line
from gcl_jax.report.charts import training_charts
from gcl_jax.report.comparison import several_runs
from gcl_jax.report.evaluated import SPLIT_NOTES, essentials, open_index, read_run
from gcl_jax.report.examples import EXTREME_PER_SPLIT, answer_all, highest, make_section, spread
from gcl_jax.stores import one_store

TYPICAL_PER_SPLIT = 3


def one_run(workdir: Path) -> dict[str, Any]:
    """What report.html shows. Raises as `write_report`."""
    # What may be missing is told before jax and the model are loaded.
    store = one_store([workdir])
    run = read_run(workdir.resolve().name, workdir, store, ())
    samples = run.samples
    chosen = {
        (
            "What it finds",
            "Test queries at equal distances in the evaluation's sample, not picked by hand.",
        ): {s: spread(TYPICAL_PER_SPLIT, len(x.ndcg)) for s, x in samples.items()},
        ("Best queries", "Those of the highest nDCG@10 in each split."): {
            s: highest(x.ndcg, EXTREME_PER_SPLIT) for s, x in samples.items()
        },
        ("Worst queries", "Those of the lowest nDCG@10 in each split."): {
            s: highest(-x.ndcg, EXTREME_PER_SPLIT) for s, x in samples.items()
        },
    }
    index, parameters = open_index(run)
    found = answer_all(run.name, run.cfg, store, index, samples, list(chosen.values()))
    return {
        "name": run.name,
        "essentials": essentials(run, store, parameters),
        "config_json": (workdir / "config.json").read_text(),
        "evaluations": list(run.evaluations.values()),
        "split_notes": SPLIT_NOTES,
        "charts": training_charts(run.curves, list(samples)),
        "sections": [make_section(*h, c, store, samples, [found]) for h, c in chosen.items()],
    }


def write_report(workdirs: Sequence[Path]) -> Path:
    """Writes WORKDIR/report.html of one run, or FIRST/comparison.html of several, and returns the
    path.

    Raises:
        ConfigError, DataError: a directory is no run, was not evaluated, or its store is gone.
        UserError: runs over different stores, or the same run twice.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gcl_jax.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    if len(workdirs) == 1:
        template, content = "report.html", one_run(workdirs[0])
    else:
        template, content = "comparison.html", several_runs(workdirs)
    date = f"{datetime.date.today():%d %B %Y}".lstrip("0")
    page = environment.get_template(template).render(date=date, **content)
    (path := workdirs[0] / template).write_text(page, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.report",
        description="Write a page about a trained and evaluated model, WORKDIR/report.html, or "
        "about several: FIRST/comparison.html.",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        required=True,
        action="append",
        help="directory of a training run; repeat it to compare other runs with the first",
    )
    args = parser.parse_args()
    with reported_in_one_line():
        print(write_report(args.workdir))


if __name__ == "__main__":
    main()
