"""Every benchmark of speed in one go, and their table in docs/performance.md.

    pip install -e ".[parity]" faiss-cpu
    python benchmarks/all.py                              # about 40 minutes on 2 cores, 12 GB
    python benchmarks/all.py --only search startup
    python benchmarks/all.py --only                       # the table alone, from the JSON files

Each runs by itself, one after another, and writes NAME.json beside its script; what fails is said
and leaves its rows as they were.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/performance.md"
BEGIN, END = "<!-- made by benchmarks/all.py -->", "<!-- end -->"


class Row(NamedTuple):
    """A line of the table: what is compared, our figure, the other's (or the limit), the ratio (how
    many times better ours is, if that can be said)."""

    what: str
    ours: str
    other: str
    ratio: float | None = None


class Benchmark(NamedTuple):
    """flags: of its script, `--out` apart. rows: from its figures."""

    flags: tuple[str, ...]
    rows: Callable[[dict], Iterable[Row]]


def step_rows(figures: dict) -> Iterable[Row]:
    for row in figures["rows"]:
        ours = row["kinds"]["ours"]
        mfu = f", MFU {ours['mfu']:.0%}" if ours["mfu"] else ""
        for kind, ratios in row["ratios"].items():
            yield Row(
                f"training step, {row['model']}, {row['batch']} pairs, {row['dtype']}",
                f"{ours['pairs_per_second']:.3g} pairs/s{mfu}",
                f"open_clip, {kind}: {row['kinds'][kind]['pairs_per_second']:.3g} pairs/s",
                statistics.median(ratios),
            )


def loss_rows(figures: dict) -> Iterable[Row]:
    for batch, rows in figures["batches"].items():
        ours, other = rows["gather"], rows.get("ClipLoss")
        yield Row(
            f"loss and gradients, {int(batch):,} pairs x {figures['about']['dim']}",
            f"{ours['seconds']:.3g} s, {ours['mib']:.0f} MiB",
            f"open_clip: {other['seconds']:.3g} s, {other['mib']:.0f} MiB" if other else "no room",
            other["seconds"] / ours["seconds"] if other else None,
        )


def gradient_cache_rows(figures: dict) -> Iterable[Row]:
    whole = figures["chunks"]["1"]
    for chunks, row in figures["chunks"].items():
        if chunks != "1":
            yield Row(
                f"gradient caching, {figures['about']['batch_size']} pairs in {chunks} chunks",
                f"{row['seconds']:.3g} s, {row['mib']:.0f} MiB",
                f"uncached: {whole['seconds']:.3g} s, {whole['mib']:.0f} MiB",
                1 / row["ratio"],
            )


def loop_rows(figures: dict) -> Iterable[Row]:
    ratio = figures["median_ratio"]
    share = f"{ratio - 1:.1%} of a step"
    yield Row("the loop: checkpoints, logs, checks (demo)", share, "at most 3%", None)


def data_rows(figures: dict) -> Iterable[Row]:
    yield Row(
        f"prepare {figures['pairs']:,} pairs, {figures['documents']:,} images",
        f"{figures['pairs_per_second']:,} pairs/s",
        "",
    )
    if pipeline := figures.get("pipeline"):
        yield Row(
            f"decode, crop, tokenise, batch at {pipeline['image_size']} px, one core",
            f"{pipeline['gcl_jax_pairs_per_core_second']} pairs/s",
            f"PyTorch DataLoader: {pipeline['torch_pairs_per_core_second']} pairs/s",
            pipeline["ratio"],
        )


def metrics_rows(figures: dict) -> Iterable[Row]:
    about, median = figures["about"], figures["median"]
    for name in ("pytrec_eval", "python_loop"):
        yield Row(
            f"score {about['queries']:,} queries x top {about['depth']:,}",
            f"{median['arrays']['seconds']} s",
            f"{name.replace('_', ' ')}: {median[name]['seconds']} s",
            median[name]["seconds"] / median["arrays"]["seconds"],
        )


def search_rows(figures: dict) -> Iterable[Row]:
    size = f"{figures['queries']:,} queries x {figures['documents']:,} x {figures['dim']}"
    for name, seconds in figures["seconds"].items():
        if name != "gcl_jax":
            yield Row(
                f"exact top {figures['k']:,}, {size}, {figures['dtype']}",
                f"{figures['seconds']['gcl_jax']:.3g} s",
                f"{name}: {seconds:.3g} s",
                seconds / figures["seconds"]["gcl_jax"],
            )


def startup_rows(figures: dict) -> Iterable[Row]:
    slowest = max(figures["help"], key=figures["help"].get)
    worst = figures["help"][slowest]
    yield Row(f"--help, the slowest ({slowest})", f"{worst:.2g} s", "at most 2 s")
    slowest = max(figures["mistake"], key=figures["mistake"].get)
    worst = figures["mistake"][slowest]
    yield Row(f"a mistake, the slowest ({slowest})", f"{worst:.2g} s", "at most 2 s")
    first = figures["first_step"]
    yield Row("first step of the demo, nothing compiled", f"{first['cold']:.3g} s", "at most 60 s")
    again = f"nothing compiled: {first['cold']:.3g} s"
    ratio = first["cold"] / first["second"]
    yield Row("first step of the demo, second start", f"{first['second']:.3g} s", again, ratio)


BENCHMARKS = {
    "step": Benchmark(("--models", "demo", "ViT-B-32", "--batch=16", "--warmup=3"), step_rows),
    "loss": Benchmark((), loss_rows),
    "gradient_cache": Benchmark(("--batch_size=128", "--chunks=1,4,16"), gradient_cache_rows),
    "loop": Benchmark(("--steps=75", "--repeats=2"), loop_rows),
    "data": Benchmark(("--pairs=20000", "--documents=2000", "--images", "--pipeline"), data_rows),
    "metrics": Benchmark((), metrics_rows),
    "search": Benchmark(("--repeats=3",), search_rows),
    "startup": Benchmark(("--repeats=3",), startup_rows),
}


def run(name: str, more: list[str]) -> bool:
    """Whether it went well; the figures of a failed run stay what they were."""
    out, made = HERE / f"{name}.json", HERE / f"{name}.json.new"
    flags = [*BENCHMARKS[name].flags, *more, f"--out={made}"]
    print(f"== python benchmarks/{name}.py {' '.join(flags[:-1])}", flush=True)
    try:
        failed = subprocess.run([sys.executable, HERE / f"{name}.py", *flags]).returncode
        if not failed:
            made.replace(out)
        return not failed
    finally:
        made.unlink(missing_ok=True)


def table() -> str:
    lines = [
        "| what | gcl_jax | compared with | ratio | made by `python benchmarks/...` |",
        "|---|---|---|---|---|",
    ]
    for name, benchmark in BENCHMARKS.items():
        out = HERE / f"{name}.json"
        if out.exists():
            made_by = " ".join([f"{name}.py", *benchmark.flags])
            for row in benchmark.rows(json.loads(out.read_text())):
                ratio = f"{row.ratio:.2f}" if row.ratio else ""
                line = f"| {row.what} | {row.ours} | {row.other} | {ratio} | `{made_by}` |"
                lines.append(line.replace("  |", " |"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--flags", nargs="*", default=[], help="more flags, for each of them")
    args = parser.parse_args()
    failed = [name for name in args.only if not run(name, args.flags)]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
