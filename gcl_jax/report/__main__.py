"""One page about a run: `python -m gcl_jax.report --workdir=runs/demo` writes WORKDIR/report.html.

It shows the evaluation (WORKDIR/eval), the training curves (WORKDIR/metrics.jsonl) and what the
model finds for a few test queries. With several --workdir it compares the other runs with the first
and writes FIRST/comparison.html. The file stands alone: no script, nothing loaded from elsewhere.
"""

from gcl_jax.errors import ArgumentParser, reported_in_one_line, spelled
from gcl_jax.paths import local_path
from gcl_jax.report.pages import write_report


def main() -> None:
    parser = ArgumentParser(
        prog="python -m gcl_jax.report",
        description="Write a page about a trained and evaluated model, WORKDIR/report.html, or "
        "about several: FIRST/comparison.html.",
    )
    parser.add_argument(
        "--workdir",
        type=local_path,
        required=True,
        action="append",
        help="directory of a training run; repeat it to compare other runs with the first",
    )
    args = parser.parse_args()
    with reported_in_one_line():
        print(spelled(write_report(args.workdir)))


if __name__ == "__main__":
    main()
