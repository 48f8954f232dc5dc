"""What fits on which chip, and what it sends: `python benchmarks/plans.py`, or `make plans`.

Compiles training steps for chips that are not here, one process after the other, with the TPU's
compiler ([tpu] extra) and NVIDIA's ([cuda] extra); rows whose compiler is missing are passed over,
so that two environments may share the work. `python benchmarks/figures.py` then draws the tables
of docs/pods.md. A row that --out has of the same commit of the package is not compiled again; --out
is written after each.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import tqdm

HERE = Path(__file__).parent
# The devices of the first table: a slice of 16 devices, and a host of GPUs.
DEVICES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4", "v7x:2x2x2")
DEVICES += ("a100:8", "h100:8", "h200:8", "b200:8")
# Pairs of a device of 16 GiB with which the search begins; attention of a GPU keeps less.
FIRST = {"ViT-B-32": 256, "ViT-L-14": 32}
PODS = ("v5e:4x4", "v5e:16x16", "v6e:16x16", "v4:4x4x4", "v5p:8x8x8", "v7x:4x4x4")
UTILISATION = 0.4
# Of one row, before any has been compiled.
SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    topology: str
    batch: int
    fsdp: int = 1
    remat: str = "full"
    chunks: int = 1
    form: str = "gather"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of `table`: `case` as it is, or what `search` makes of it."""

    table: str
    case: Case
    search: str = ""

    @property
    def name(self) -> str:
        case = self.case
        return " ".join(map(str, [case.model, case.topology, case.batch, case.fsdp, case.form]))


def rows() -> list[Row]:
    found = []
    for model in FIRST:
        for topology in DEVICES:
            # TPUs: the compiler crashes in haste on plain data parallelism.
            case = Case(model, topology, 0, 1 if topology.endswith(":8") else 4, "dots")
            found.append(Row("chips", case, "batch"))
    for topology in PODS:
        fsdp = 8 if topology == "v5p:8x8x8" else 16
        for model in FIRST:
            for batch in (32768, 131072):
                if batch == 32768 or topology == "v5e:16x16":
                    found.append(Row("pods", Case(model, topology, batch, fsdp), "chunks"))
    found.append(Row("pods", Case("ViT-H-14", "v6e:16x16", 32768, 16), "chunks"))
    forms = [("gather", 1), ("gather", 4), ("ring", 4), ("gather", 16)]
    return found + [
        Row("meshes", Case("ViT-B-32", "v5e:4x4", 4096, fsdp, form=form)) for form, fsdp in forms
    ]


def config(case: Case):
    """A text as the query, an image as the document; bfloat16 over float32."""
    from gcl_jax.config import DataConfig, LossConfig, MeshConfig, OptimConfig, TrainConfig
    from gcl_jax.models.presets import preset

    model = preset(case.model)
    model.dtype, model.remat = "bfloat16", case.remat
    fields = {"query_fields": {"query": 1.0}, "document_fields": {"image": 1.0}}
    return TrainConfig(
        model=model,
        data=DataConfig(store="none", **fields),
        loss=LossConfig(targets="diagonal", form=case.form),
        optim=OptimConfig(batch_size=case.batch, grad_cache_chunks=case.chunks),
        mesh=MeshConfig(fsdp=case.fsdp),
    )


def opened(name: str, quick: bool):
    from gcl_jax.plan.topology import QUICK, open_topology

    topology = open_topology(name)
    if topology.platform != "tpu" or not quick:
        return topology
    return topology._replace(compiler_options=topology.compiler_options | QUICK)


def compiled(case: Case, topology) -> dict:
    """All figures of one case."""
    from gcl_jax.losses.blockwise import fitting_block_size
    from gcl_jax.plan import planner

    cfg, data = planner.resolve(config(case))
    plan = planner.compile_plan(cfg, data, topology)
    found = planner.figures(cfg, plan, topology, UTILISATION)
    found["work"] = found["work"] and {name: found["work"][name] for name in ("flops", "memory")}
    return found | {"tile": fitting_block_size(topology.devices[0])}


def most_pairs(case: Case, topology) -> tuple[Case, dict]:
    """The batch with the most pairs on each device, of the powers of two. What would need more than
    the memory if all but the state grew with the batch is not tried."""
    devices, best, failed = len(topology.devices), None, False
    local = FIRST[case.model] * 2 ** max(0, round(math.log2(topology.memory / 2**34)))
    local *= 2 if topology.platform == "gpu" else 1
    while True:
        case = dataclasses.replace(case, batch=local * devices)
        found = compiled(case, topology)
        if found["fits"]:
            best = case, found
            state = found["parameters"] + found["optimizer"]
            room = (topology.memory - state) / (found["peak"] - state)
            if failed or room < 2:
                return best
            local *= 2 ** int(math.log2(room))
        else:
            failed, local = True, local // 2
            if not local or (best and local * devices == best[0].batch):
                return best or (case, found)


def fewest_chunks(case: Case, topology) -> tuple[Case, dict]:
    """The batch in the first of 1, 2, 4, ... chunks that fits."""
    cfg = config(case)
    vision, text = cfg.model.vision, cfg.model.text
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    # What `remat` keeps, the inputs of the layers in bfloat16; a layer's own takes as much again.
    kept = 2 * 2 * tokens * vision.width * vision.layers
    kept += 2 * 2 * text.context_length * text.width * text.layers
    local, chunks = case.batch // len(topology.devices), 1
    while local // chunks * kept > topology.memory and chunks < local:
        chunks *= 2
    while True:
        case = dataclasses.replace(case, chunks=chunks)
        found = compiled(case, topology)
        if found["fits"] or chunks >= local:
            return case, found
        chunks *= 2


SEARCHES = {"": lambda case, topology: (case, compiled(case, topology))}
SEARCHES |= {"batch": most_pairs, "chunks": fewest_chunks}


def in_own_process(row: Row) -> dict:
    """Its case and figures, or why there are none. What the TPU compiler takes of memory, it keeps:
    one process for each. In haste it crashes on some programs; these it compiles at leisure."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--row", json.dumps(dataclasses.asdict(row))]
    for quick in (True, False):
        done = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True)
        if done.returncode == 0:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            found = json.loads(done.stdout.splitlines()[-1])
            return {"table": row.table, "quick": quick, "seconds": round(seconds)} | found
        if done.returncode > 0:
            break
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
    return {"failed": said[-1].removeprefix("gcl_jax.errors.ConfigError: ")}


def commit() -> str:
    """The last one that changed the package."""
    git = ["git", "-C", str(HERE.parent)]
    last = [*git, "log", "-1", "--format=%h", "--", "gcl_jax"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gcl_jax"]).returncode
    return subprocess.run(last, capture_output=True, text=True).stdout.strip() + "+" * changed


LIMITS: dict[str, Callable[[Row], str]] = {
    "tables": lambda row: row.table,
    "chips": lambda row: row.case.topology.partition(":")[0],
    "models": lambda row: row.case.model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    choices = {flag: list(dict.fromkeys(map(of, rows()))) for flag, of in LIMITS.items()}
    for flag, known in choices.items():
        parser.add_argument(f"--{flag}", default=",".join(known), help="those alone, by commas")
    parser.add_argument("--out", type=Path, default=HERE / "plans.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        given = json.loads(args.row)
        case = Case(**given["case"])
        case, found = SEARCHES[given["search"]](case, opened(case.topology, args.quick))
        about = {"case": dataclasses.asdict(case), "jax": jax.__version__}
        print(json.dumps(about | {"found": found}))
        return
    for flag, there in choices.items():
        if unknown := set(getattr(args, flag).split(",")) - set(there):
            parser.error(f"--{flag}={','.join(unknown)}: there are {', '.join(there)}")
    known, now = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}, commit()
    chosen = [
        row
        for row in rows()
        if all(of(row) in getattr(args, flag).split(",") for flag, of in LIMITS.items())
        and known.get(row.name, {}).get("commit") != now
    ]
    took = {name: one["seconds"] for name, one in known.items() if "seconds" in one}
    usual = statistics.mean([*took.values()] or [SECONDS])
    minutes = sum(took.get(row.name, usual) for row in chosen) / 60
    print(f"{len(chosen)} of {len(rows())} rows, about {minutes:.0f} minutes of a core")
    with tqdm.tqdm(chosen, unit="row", dynamic_ncols=True) as bar:
        for row in bar:
            bar.set_postfix_str(row.name)
            found = in_own_process(row)
            if "failed" in found:
                bar.write(f"{row.name}: {found['failed']}")
                continue
            known[row.name] = found | {"commit": now}
            args.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
