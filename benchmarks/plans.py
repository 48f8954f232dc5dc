"""Which CLIP fits where, and what it sends: `python benchmarks/plans.py`.

Compiles training steps for TPU slices that are not here (needs the [tpu] extra), one process after
the other; `python benchmarks/figures.py` then draws the tables of docs/pods.md. What
benchmarks/plans.json has is not compiled again; delete it to start anew.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import tqdm

HERE = Path(__file__).parent
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:8x8x8", "v6e:16x16")
BATCHES = (32768, 131072)
UTILISATION = 0.4


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    topology: str
    batch: int
    fsdp: int = 1
    remat: str = "full"
    chunks: int = 1
    form: str = "gather"

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in dataclasses.astuple(self))


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
        loss=LossConfig(form=case.form),
        optim=OptimConfig(batch_size=case.batch, grad_cache_chunks=case.chunks),
        mesh=MeshConfig(fsdp=case.fsdp),
    )


def opened(name: str, quick: bool):
    from gcl_jax.plan.topology import QUICK, open_topology

    topology = open_topology(name)
    return topology._replace(compiler_options=topology.compiler_options | (QUICK if quick else {}))


def compiled(case: Case, topology) -> dict:
    """All figures of one case."""
    from gcl_jax.plan import planner

    cfg, data = planner.resolve(config(case))
    return planner.figures(cfg, planner.compile_plan(cfg, data, topology), topology, UTILISATION)


def first_that_fits(case: Case, topology) -> tuple[Case, dict]:
    """`case` with the parameters split over 16 chips (8 of an 8 x 8 x 8 slice) and the batch in 1,
    2, 4, ... chunks."""
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
        fsdp = 8 if topology.name == "v5p:8x8x8" else 16
        case = dataclasses.replace(case, fsdp=fsdp, chunks=chunks)
        found = compiled(case, topology)
        if found["fits"] or chunks >= local:
            return case, found
        chunks *= 2


def in_own_process(case: Case, search: bool) -> dict:
    """{"case", "found", "quick"}. What the TPU compiler takes of memory, it keeps: one process for
    each. In haste it crashes on some programs; these it compiles again, at leisure."""
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    command += ["--search"] * search
    for quick in (True, False):
        done = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1]) | {"quick": quick}
        if done.returncode > 0:
            break
    raise CompilerFailed(f"{case.name}: {done.stderr.strip().splitlines()[-1]}")


class CompilerFailed(Exception):
    """Not for lack of memory, which is a result."""


class Results:
    """Figures by case, kept in a file after each."""

    def __init__(self, path: Path, bar):
        self.path, self.bar = path, bar
        self.known = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, case: Case, search: bool = False) -> None:
        name = f"{case.model} {case.topology} {case.batch}" if search else case.name
        if name not in self.known:
            self.bar.set_postfix_str(name)
            self.known[name] = in_own_process(case, search)
            self.path.write_text(json.dumps(self.known, indent=1) + "\n")


def compared() -> list[Case]:
    """Forms of the loss and meshes, on one slice."""
    base = Case("ViT-B-32", "v5e:4x4", 4096)
    change = dataclasses.replace
    return [
        base,
        change(base, form="ring"),
        change(base, fsdp=4),
        change(base, fsdp=4, form="ring"),
        change(base, fsdp=16),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--out", type=Path, default=HERE / "plans.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        os.environ["JAX_PLATFORMS"] = "cpu"
        case = Case(**json.loads(args.case))
        topology = opened(case.topology, args.quick)
        if args.search:
            case, found = first_that_fits(case, topology)
        else:
            found = compiled(case, topology)
        print(json.dumps({"case": dataclasses.asdict(case), "found": found}))
        return
    models, topologies = args.models.split(","), args.topologies.split(",")
    cells = [(m, t, b) for t in topologies for m in models for b in BATCHES]
    total = len(cells) + len(compared())
    with tqdm.tqdm(total=total, unit="row", dynamic_ncols=True) as bar:
        find = Results(args.out, bar)
        for case in compared():
            with passed_over(bar):
                find(case)
        for cell in cells:
            with passed_over(bar):
                find(Case(*cell), search=True)


@contextlib.contextmanager
def passed_over(bar):
    """One row, which the next run tries again if the compiler fails."""
    try:
        yield
    except CompilerFailed as error:
        bar.write(str(error))
    bar.update()


if __name__ == "__main__":
    main()
