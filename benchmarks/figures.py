"""Draws the figures of README.md and docs/ from the JSON files of this folder.

    python benchmarks/figures.py            # fills the pages; --check only says what is outdated

A figure in a sentence is the value of the f-string before it, over the keys of a file and what this
module defines; a table is made by the function of that name:

    it took <!-- metrics: {median["arrays"]["seconds"]:.2f} s -->0.30 s<!-- end -->

    <!-- table: speed -->
    | ... |
    <!-- end -->

A comment must not begin a line of a paragraph: Markdown would take the whole line for HTML.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
MIB, GIB = 2**20, 2**30
SPLITS = {
    "in_domain": "in-domain",
    "novel_query": "novel query",
    "novel_document": "novel document",
    "zero_shot": "zero-shot",
}
ENDS = ("in_domain", "zero_shot")
FIGURE = re.compile(r"<!-- (?!table: )(\w+): ([^\n]+?) -->(.*?)<!-- end -->")
TABLE = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def load(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text("utf-8"))


def filled(text: str) -> str:
    """`text` with each of its figures and tables as the JSON files have them."""

    def figure(found: re.Match) -> str:
        name, template, _ = found.groups()
        value = eval(f"f{template!r}", globals(), load(name))
        return f"<!-- {name}: {template} -->{value}<!-- end -->"

    def table(found: re.Match) -> str:
        name = found[1]
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return TABLE.sub(table, FIGURE.sub(figure, text))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; an empty cell is one blank."""
    line = lambda cells: "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
    header = list(header)
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


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
        what = f"training step, {row['model']}, {row['batch']} pairs, {row['dtype']}"
        rate = f"{ours['pairs_per_second']:.3g} pairs/s{mfu}"
        if not row["ratios"]:
            yield Row(what, rate, "")
        for kind, ratios in row["ratios"].items():
            yield Row(
                what,
                rate,
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
        other = pipeline.get("torch_pairs_per_core_second")
        beside = f"PyTorch DataLoader: {other} pairs/s" if other else ""
        yield Row(
            f"decode, crop, tokenise, batch at {pipeline['image_size']} px, one core",
            f"{pipeline['gcl_jax_pairs_per_core_second']} pairs/s",
            beside,
            pipeline.get("ratio"),
        )
        yield Row(
            f"the same from a store of --image_size={pipeline['reduced_image_size']}",
            f"{pipeline['gcl_jax_reduced_pairs_per_core_second']} pairs/s",
            beside,
            pipeline.get("ratio_reduced"),
        )


def metrics_rows(figures: dict) -> Iterable[Row]:
    about, median = figures["about"], figures["median"]
    for name, shown in {"pytrec_eval": "pytrec_eval", "python_loop": "a loop in Python"}.items():
        yield Row(
            f"score {about['queries']:,} queries x top {about['depth']:,}",
            f"{median['arrays']['seconds']} s",
            f"{shown}: {median[name]['seconds']} s",
            median[name]["seconds"] / median["arrays"]["seconds"],
        )


RIVALS = {"faiss": "FAISS", "torch": "PyTorch"}


def search_rows(figures: dict) -> Iterable[Row]:
    size = f"{figures['queries']:,} queries x {figures['documents']:,} x {figures['dim']}"
    for name, seconds in figures["seconds"].items():
        if name != "gcl_jax":
            yield Row(
                f"exact top {figures['k']:,}, {size}, {figures['dtype']}",
                f"{figures['seconds']['gcl_jax']:.3g} s",
                f"{RIVALS.get(name, 'its matrix products alone')}: {seconds:.3g} s",
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


SPEED = {
    "step": Benchmark(("--models", "demo", "ViT-B-32", "--batch=16", "--warmup=3"), step_rows),
    "loss": Benchmark((), loss_rows),
    "gradient_cache": Benchmark(("--batch_size=128", "--chunks=1,4,16"), gradient_cache_rows),
    "loop": Benchmark(("--steps=75", "--repeats=2"), loop_rows),
    "data": Benchmark(("--pairs=20000", "--documents=2000", "--images", "--pipeline"), data_rows),
    "metrics": Benchmark((), metrics_rows),
    "search": Benchmark(("--repeats=3",), search_rows),
    "startup": Benchmark(("--repeats=3",), startup_rows),
}


def memory_rows(figures: dict) -> Iterable[Row]:
    batch = f"{figures['batch']:,} pairs"
    cells = (batch, "") if figures["kind"] == "ours" else ("", f"open_clip, eager: {batch}")
    yield Row(f"largest batch in bfloat16, of {figures['of']:,} tried", *cells)


def train_rows(figures: dict) -> Iterable[Row]:
    steps = f"{figures['step']} steps"
    yield Row("the demo, first step", f"{figures['first step']:.3g} s", "at most 20 s")
    yield Row(f"the demo, {steps}", f"{figures['train']:.3g} s", "at most 90 s")


def check_rows(figures: dict) -> Iterable[Row]:
    for case, found in figures.items():
        worst = max(found, key=found.get) if "error" not in found else ""
        yield Row(f"check, {case}", f"{worst} off by {found[worst]:.1e}" if worst else "fails", "")


CARD: dict[str, Callable[[dict], Iterable[Row]]] = {
    "check": check_rows,
    "loss": loss_rows,
    "step": step_rows,
    "memory": memory_rows,
    "train": train_rows,
    "search": search_rows,
    "loader": data_rows,
}


def card() -> str:
    """What benchmarks/card.py found on a card, if its figures are here."""
    if not (HERE / "card.json").exists():
        return "No run of `benchmarks/card.py` on a card is kept in the repository yet."
    lines = []
    for name, run in load("card").items():
        stage, _, part = name.partition(", ")
        rows = CARD.get(stage)
        on = f"{run['device']}, jax {run['jax']}, {run['commit']}"
        if run["error"]:
            lines.append([name, run["error"].replace("|", "/"), "", "", on])
        elif rows:
            for row in rows(run["figures"]):
                ratio = f"{row.ratio:.2f}" if row.ratio else ""
                lines.append([f"{part}: {row.what}", row.ours, row.other, ratio, on])
    return markdown(["what", "gcl_jax", "compared with", "ratio", "on"], lines)


def speed() -> str:
    """All benchmarks of speed, as docs/performance.md has them."""
    lines = []
    for name, benchmark in SPEED.items():
        made_by = f"`{' '.join([f'{name}.py', *benchmark.flags])}`"
        for row in benchmark.rows(load(name)):
            ratio = f"{row.ratio:.2f}" if row.ratio else ""
            lines.append([row.what, row.ours, row.other, ratio, made_by])
    header = ["what", "gcl_jax", "compared with", "ratio", "made by `python benchmarks/...`"]
    return markdown(header, lines)


def speed_short() -> str:
    """Each kind of work beside another library, as README.md has it."""
    chosen = {
        "step": ("training step, ViT-B-32",),
        "loss": ("loss and gradients, 8,192",),
        "data": ("decode, crop",),
        "metrics": ("score",),
        "search": ("exact top",),
    }
    shown = [
        [row.what, row.ours, row.other, f"{row.ratio:.2f}"]
        for name, starts in chosen.items()
        for row in SPEED[name].rows(load(name))
        if row.what.startswith(starts) and not row.other.startswith(("a loop", "its matrix"))
    ]
    return markdown(["what", "gcl_jax", "compared with", "ratio"], shown)


def loss() -> str:
    """Time and temporary memory of the loss with its gradients, for each batch size."""
    methods = {"naive": "naive", "ClipLoss": "open_clip `ClipLoss`", "gather": "gather"}
    methods |= {"ring": "ring"}

    def cell(row: dict | None) -> str:
        if row is None:
            return "-"
        seconds = row["seconds"]
        time = f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
        return f"{time}, {row['mib']:,.0f} MiB"

    rows = [
        [f"{int(batch):,}", *(cell(row.get(method)) for method in methods)]
        for batch, row in load("loss")["batches"].items()
    ]
    return markdown(["pairs", *methods.values()], rows)


def serving() -> str:
    """The API under load: one client after another, many at a time, and without batches."""
    kinds = {
        "one_by_one": "{clients}, one request after another",
        "together": "{clients} at a time",
        "unbatched": "{clients} at a time, were there no batches",
    }
    rows = []
    for name, what in kinds.items():
        found = load("serve")["api"][name]
        times = [f"{found[key]:.0f}" for key in ("per_second", "median", "p99")]
        failed = f"{found['errors']} of {found['requests']:,}"
        rows.append([what.format(**found), *times, failed])
    return markdown(["clients", "answers per second", "median, ms", "p99, ms", "errors"], rows)


CLIP_OR_GCL = {
    "CLIP": "CLIP (constant weights)",
    "GCL inverse": "GCL, inverse weights, diagonal (the paper's)",
    "GCL inverse, known": "**GCL, inverse weights, known relevance**",
}


def over_seeds(method: str, split: str, metric: str) -> list[float]:
    return [run[split][metric] for run in load("gcl_vs_clip")["runs"][method]]


def gain(method: str, split: str, metric: str) -> float:
    """Over CLIP, as a share."""
    of, by = over_seeds(method, split, metric), over_seeds("CLIP", split, metric)
    return statistics.mean(of) / statistics.mean(by) - 1


def gcl_vs_clip(metric: str) -> str:
    """GCL beside CLIP on the emoji benchmark: mean, deviation over the seeds, gain over CLIP."""

    def cell(method: str, split: str) -> str:
        values = over_seeds(method, split, metric)
        text = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        return text if method == "CLIP" else f"{text} ({gain(method, split, metric):+.1%})"

    rows = [
        [name, *(f"{baseline[split][metric]:.3f}" for split in SPLITS)]
        for name, baseline in load("gcl_vs_clip")["baselines"].items()
    ]
    for method, name in CLIP_OR_GCL.items():
        rows.append([name, *(cell(method, split) for split in SPLITS)])
    return markdown([METRICS[metric], *SPLITS.values()], rows)


def gcl_vs_clip_short() -> str:
    """nDCG@10 and ERR of known and of new queries and documents."""
    columns = [(metric, split) for metric in ("NDCG@10", "mERR") for split in ENDS]

    def cell(method: str, split: str, metric: str) -> str:
        text = f"{statistics.mean(over_seeds(method, split, metric)):.3f}"
        return text if method == "CLIP" else f"{text} ({gain(method, split, metric):+.0%})"

    rows = [
        [name, *(cell(method, split, metric) for metric, split in columns)]
        for method, name in CLIP_OR_GCL.items()
    ]
    recipe = load("photos")["emoji, 245 steps"]["methods"]["the config as it is"]

    def beside_clip(metric: str, split: str) -> str:
        mean = recipe[metric][split]["mean"]
        clip = statistics.mean(over_seeds("CLIP", split, metric))
        return f"{mean:.3f} ({mean / clip - 1:+.0%})"

    rows.append(["**the demo**", *(beside_clip(*column) for column in columns)])
    header = [f"{METRICS[metric]}, {SPLITS[split]}" for metric, split in columns]
    return markdown(["", *header], rows)


def beside(baseline: str, methods: dict, metric: str) -> list[list[str]]:
    """A row a method; a star where the paired interval of the difference excludes zero."""

    def cell(method: str, x: dict) -> str:
        text = f"{x['mean']:.3f}" + (f" ±{x['deviation']:.3f}" if len(x["seeds"]) > 1 else "")
        if method == baseline:
            return text
        star = "*" if x["low"] > 0 or x["high"] < 0 else ""
        return f"{text} ({x['difference']:+.3f}{star})"

    return [
        [method, *(cell(method, figures[metric][split]) for split in SPLITS)]
        for method, figures in methods.items()
    ]


def objectives(metric: str, name: str) -> str:
    """All objectives beside GCL."""
    rows = beside("GCL", load("objectives")[name]["methods"], metric)
    return markdown([f"{METRICS[metric]}, {name.partition(',')[0]}", *SPLITS.values()], rows)


def objectives_seconds() -> str:
    """Of a training; other work disturbs it, so the least of the seeds."""
    found = load("objectives")["photos"]["training_seconds"]
    least = {method: min(seconds) for method, seconds in found.items()}
    rows = [
        [method, str(seconds), f"{seconds / least['GCL']:.2f}"]
        for method, seconds in sorted(least.items(), key=lambda one: one[1])
    ]
    return markdown(["photographs", "seconds of a training", "to GCL"], rows)


def maxsim() -> str:
    """Single vectors and late interaction, of runs with and without filip."""
    rows = []
    for data, runs in load("maxsim")["runs"].items():
        for kind, found in runs.items():
            trained = "with `filip`" if kind == "filip" else "without"
            for way, shown in (("single", "single vectors"), ("maxsim", "MaxSim")):
                cells = [f"{found['NDCG@10'][split][way]:.3f}" for split in SPLITS]
                rows.append([f"{data}, {trained}, {shown}", *cells])
    return markdown([METRICS["NDCG@10"], *SPLITS.values()], rows)


# Those of `photos` that are compared as wholes; the others change one thing of the recipe.
WHOLE = (
    "ViT, AdamW: CLIP",
    "ViT, AdamW: GCL, diagonal",
    "ViT, AdamW: GCL, known",
    "CLIP",
    "GCL, diagonal",
    "GCL, known",
    "the recipe",
    "the config as it is",
)


def photos(metric: str, name: str = "photos, 240 steps") -> str:
    """CLIP, GCL and the recipe on images that decide."""
    figures = load("photos")[name]
    rows = [
        [name, *(f"{of[split][metric]:.3f}" for split in SPLITS)]
        for name, of in figures["baselines"].items()
    ]
    methods = figures["methods"]
    ordered = sorted(methods, key=lambda name: WHOLE.index(name) if name in WHOLE else -1)
    rows += beside(figures["baseline"], {name: methods[name] for name in ordered}, metric)
    return markdown([METRICS[metric], *SPLITS.values()], rows)


def changes(metric: str, name: str = "photos, one change") -> str:
    """The recipe, and what one change of it does."""
    figures = load("photos")[name]
    rest = dict(figures["beside"]["the recipe"])
    rows = beside("the recipe", {"the recipe": rest.pop("the recipe"), **rest}, metric)
    if speeds := figures.get("pairs_per_second"):
        rows = [[*row, f"{speeds[row[0]]:.0f}"] for row in rows]
    return markdown([METRICS[metric], *SPLITS.values(), *["pairs/s"] * bool(speeds)], rows)


def fields(name: str) -> str:
    """What each field is worth alone, and how far merged is above it."""
    rows = []
    for method in ("the recipe", "the config as it is"):
        for field, found in load("photos")[name]["fields"][method].items():
            cells = [f"{found[split]['alone']:.3f}" for split in SPLITS]
            rows.append([f"{method}: {field} alone", *cells])
            above = [found[split] for split in SPLITS]
            cells = [f"{x['merged_above']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]" for x in above]
            rows.append([f"merged above {field}", *cells])
    return markdown([METRICS["NDCG@10"], *SPLITS.values()], rows)


def dependence(metric: str) -> str:
    """What CLIP, the paper's GCL and the recipe make of data that are changed."""
    rows = []
    for name, figures in load("dependence").items():
        methods = {method: of[metric] for method, of in figures["methods"].items()}
        clip = methods.pop("CLIP")

        def cell(of: dict, split: str, clip: dict = clip) -> str:
            star = "*" if of[split]["low"] > 0 or of[split]["high"] < 0 else ""
            gain = of[split]["difference"] / clip[split]["mean"]
            return f"{of[split]['mean']:.3f} ({gain:+.0%}{star})"

        for split in ENDS:
            first = (
                [name, f"{figures['documents_per_query']:.0f}"] if split == ENDS[0] else ["", ""]
            )
            cells = [cell(of, split) for of in methods.values()]
            rows.append([*first, SPLITS[split], f"{clip[split]['mean']:.3f}", *cells])
    header = ["trained on", "documents a query", METRICS[metric], "CLIP", *methods]
    return markdown(header, rows)


def by_data() -> str:
    """The recipe's gain over CLIP with the same towers and optimizer, by data set."""
    photos, rows = load("photos"), []
    for name, key in (
        ("icons", "icons, 240 steps"),
        ("photographs", "photos, 240 steps"),
        ("emoji, images and titles", "emoji, 245 steps"),
        ("clip art", "clip art, 240 steps"),
    ):
        for metric in ("NDCG@10", "mERR"):
            cells = []
            for split in SPLITS:
                of = photos[key]["beside"]["CLIP"]["the recipe"][metric][split]
                star = "*" if of["low"] > 0 or of["high"] < 0 else ""
                cells.append(f"{of['difference'] / (of['mean'] - of['difference']):+.1%}{star}")
            rows.append([name, METRICS[metric], *cells])
    return markdown(["the recipe over CLIP", "", *SPLITS.values()], rows)


def sent(found: dict, part: str) -> float:
    """Bytes that a chip sends in a step for `part` of it."""
    return sum(one["sent"] for one in found["collectives"] if one["part"] == part)


def planned(table: str) -> Iterable[tuple[dict, dict, list[str], str]]:
    """(case, figures, cells of the model and its devices, commit) of each row of `table`."""
    for value in load("plans").values():
        if value["table"] == table:
            case, found = value["case"], value["found"]
            yield case, found, [case["model"], case["topology"]], value["commit"]


def held(found: dict) -> str:
    return f"{found['peak'] / GIB:.1f} of {found['memory'] / GIB:.0f}" if found["fits"] else "no"


def chips() -> str:
    """Of every kind of chip, the most pairs that a device takes."""
    rows = []
    for _, found, cells, commit in planned("chips"):
        data, fsdp = found["mesh"]
        local, seconds = found["batch"] // (data * fsdp), found["projection"]["overlapped"]
        rows.append(
            [
                *cells,
                f"{data} x {fsdp}",
                f"{local:,}",
                held(found),
                f"{found['tile']:,}",
                f"{found['work']['flops'] / local / 1e12:.3f}",
                f"{found['work']['memory'] / GIB:,.0f}",
                f"{found['sent'] / MIB:,.0f}",
                f"{found['batch'] / seconds / (data * fsdp):,.0f}",
                commit,
            ]
        )
    header = ["model", "devices", "data x fsdp", "pairs of a device", "GiB held", "tile"]
    header += ["TFLOP a pair", "GiB moved", "MiB sent", "pairs/s, projected", "code"]
    return markdown(header, rows)


def pods() -> str:
    """What fits on larger slices, with the batch in as few chunks as do."""
    rows = []
    for case, found, cells, commit in planned("pods"):
        data, fsdp = found["mesh"]
        loss, times = sent(found, "loss"), found["projection"]
        rows.append(
            [
                *cells,
                f"{case['batch']:,}",
                f"{case['batch'] // (data * fsdp):,}",
                f"{data} x {fsdp}",
                str(case["chunks"]),
                held(found),
                f"{loss / MIB:,.0f}",
                f"{(found['sent'] - loss) / MIB:,.0f}",
                f"{times['overlapped']:.2f} to {times['exposed']:.2f}",
                commit,
            ]
        )
    header = ["model", "slice", "batch", "of a device", "data x fsdp", "chunks", "GiB held"]
    return markdown([*header, "loss MiB", "other MiB", "projected s", "code"], rows)


def meshes() -> str:
    """Forms of the loss and meshes on one slice."""
    parts = ("parameters", "gradients", "loss", "activations")
    rows = []
    for case, found, _, commit in planned("meshes"):
        data, fsdp = found["mesh"]
        state = (found["parameters"] + found["optimizer"]) / GIB
        rows.append(
            [
                f"{case['model'].removeprefix('ViT-')}, {data} x {fsdp}, {case['form']}",
                f"{state:.2f}",
                f"{found['peak'] / GIB:.2f}",
                *(f"{sent(found, part) / MIB:,.0f}" for part in parts),
                commit,
            ]
        )
    header = ["batch 4,096 on v5e:4x4", "GiB state", "GiB peak", *parts, "code"]
    return markdown(header, rows)


def scaling() -> str:
    """The training step on slices: bytes held and sent, and how far that is from the formulas."""
    rows = []
    for name, found in load("scaling").items():
        model, slice_, _, _, form, thorough = name.split()
        if slice_.startswith("cpu") or thorough == "True" or not at_an_end(model, slice_):
            continue
        cells = []
        for part in ("loss", "parameters"):
            of, expected = sent(found, part), found["formulas"][part]
            off = f" ({of / expected - 1:+.1%})" if expected and found["chips"] > 1 else ""
            cells.append(f"{of / MIB:,.1f}{off}")
        other = found["sent"] - sent(found, "loss") - sent(found, "parameters")
        share = "-"
        if times := found.get("projection"):
            computing = times["towers"] + times["loss"]
            share = f"{computing / (computing + times['communication']):.0%}"
        rows.append(
            [
                f"{model}, {form}",
                slice_,
                str(found["chips"]),
                f"{found['batch']:,}",
                f"{found['peak'] / MIB:,.0f}",
                *cells,
                f"{other / MIB:,.0f}",
                share,
            ]
        )
    header = ["model, loss", "slice", "chips", "pairs", "MiB held", "MiB sent: loss"]
    return markdown([*header, "split parameters", "other", "projected"], rows)


def at_an_end(model: str, slice_: str) -> bool:
    """Whether docs/performance.md shows the row: of the demo the smallest and the largest slices
    alone."""
    ends = ("2x2", "16x16", "2x2x1", "8x8x8")
    return model != "demo" or slice_.partition(":")[2] in ends


METRICS = {
    "NDCG@10": "nDCG@10",
    "mERR": "ERR",
}
TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "speed_short": speed_short,
    "loss": loss,
    "serving": serving,
    "gcl_vs_clip_ndcg": lambda: gcl_vs_clip("NDCG@10"),
    "gcl_vs_clip_err": lambda: gcl_vs_clip("mERR"),
    "gcl_vs_clip_short": gcl_vs_clip_short,
    "maxsim": maxsim,
    "objectives_emoji_ndcg": lambda: objectives("NDCG@10", "emoji"),
    "objectives_emoji_err": lambda: objectives("mERR", "emoji"),
    "objectives_photos_ndcg": lambda: objectives("NDCG@10", "photos"),
    "objectives_photos_err": lambda: objectives("mERR", "photos"),
    "objectives_photos_seconds": objectives_seconds,
    "objectives_emoji_once": lambda: objectives("NDCG@10", "emoji, one seed"),
    "objectives_photos_once": lambda: objectives("NDCG@10", "photos, one seed"),
    "objectives_before": lambda: objectives("NDCG@10", "emoji, ViT, AdamW"),
    "photos_ndcg": lambda: photos("NDCG@10"),
    "photos_err": lambda: photos("mERR"),
    "photos_changes": lambda: changes("NDCG@10"),
    "photos_long": lambda: photos("NDCG@10", "photos, 700 steps, flips"),
    "photos_icons_ndcg": lambda: photos("NDCG@10", "icons, 240 steps"),
    "photos_icons_err": lambda: photos("mERR", "icons, 240 steps"),
    "photos_clipart_ndcg": lambda: photos("NDCG@10", "clip art, 240 steps"),
    "photos_clipart_err": lambda: photos("mERR", "clip art, 240 steps"),
    "photos_start": lambda: changes("NDCG@10", "icons, start, 120 steps"),
    "dependence_by_data": by_data,
    "dependence_ndcg": lambda: dependence("NDCG@10"),
    "dependence_err": lambda: dependence("mERR"),
    "photos_emoji_changes": lambda: changes("NDCG@10", "emoji, one change"),
    "photos_emoji_ndcg": lambda: photos("NDCG@10", "emoji, 245 steps"),
    "photos_emoji_err": lambda: photos("mERR", "emoji, 245 steps"),
    "photos_emoji_fields": lambda: fields("emoji, 245 steps"),
    "chips": chips,
    "pods": pods,
    "meshes": meshes,
    "scaling": scaling,
    "card": card,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if changed"
    )
    args = parser.parse_args()
    outdated = False
    for page in pages():
        text = page.read_text("utf-8")
        if (new := filled(text)) != text:
            outdated = True
            print(f"{page.relative_to(ROOT)}: {'outdated' if args.check else 'filled'}")
            if not args.check:
                page.write_text(new, "utf-8")
    sys.exit(1 if args.check and outdated else 0)


if __name__ == "__main__":
    main()
