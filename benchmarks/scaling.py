"""How the training step scales on pods that are not here: `python benchmarks/scaling.py`.

Compiles it for slices of TPUs ([tpu] extra), for H100s ([cuda] extra) and for CPU devices, each in
a process of its own; a row without its compiler says so. Checks what it sends against formulas and
that a chip holds no more in a larger slice; projects how much of the time remains for computing;
reads what the compiler did badly. Exits with 1 if a check fails. What --out has is not compiled
again, rows that failed are.
"""

import argparse
import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import tqdm

HERE = Path(__file__).parent
MIB, GIB = 2**20, 2**30
UTILISATION, TOLERANCE = 0.4, 0.05
LADDERS = (
    ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:8x8x8"),
    ("v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """local: pairs of each chip. thorough: with all of the compiler's effort."""

    model: str
    topology: str
    local: int
    fsdp: int
    form: str = "gather"
    thorough: bool = False

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in dataclasses.astuple(self))

    @property
    def ladder(self) -> tuple:
        """What slices of one kind have in common."""
        kind = self.topology.partition(":")[0]
        return kind, self.model, self.local, self.fsdp, self.form


def cases() -> list[Case]:
    """The demo's towers up to 512 chips in both forms of the loss, ViT-B-32 on some slices, GPUs
    and, for machines without any compiler, CPU devices."""
    ladders = [
        Case("demo", slice_, 128, 4, form)
        for ladder in LADDERS
        for slice_ in ladder
        for form in ("gather", "ring")
    ]
    large = [Case("ViT-B-32", ladder[i], 256, 4) for ladder in LADDERS for i in (1, 3)]
    thorough = [
        Case("ViT-B-32", "v5e:4x4", 256, 4, thorough=True),
        Case("demo", "v5e:4x4", 128, 4, thorough=True),
    ]
    # Not 256: 2,048 x 512 is a matrix of the text tower too, and would not be told from the batch.
    gpus = [Case("ViT-B-32", "h100:1", 320, 1), Case("ViT-B-32", "h100:8", 320, 8)]
    cpus = [Case("demo", f"cpu:{n}", 40, 4, form) for n in (8, 16) for form in ("gather", "ring")]
    return [*cpus, *ladders[:8], *thorough, *gpus, *large, *ladders[8:]]


def config(case: Case, chips: int, dtype: str):
    """A text as the query, an image as the document. The demo's text tower and a transformer of its
    size for the images embed into 512 dimensions, so that what the loss sends besides embeddings is
    little."""
    from gcl_jax.config import (
        DataConfig,
        LossConfig,
        MeshConfig,
        OptimConfig,
        TrainConfig,
        VisionConfig,
    )
    from gcl_jax.models.presets import preset

    if case.model == "demo":
        path = HERE.parent / "configs" / "emoji_tiny.py"
        model = runpy.run_path(str(path))["get_config"]().model
        model.embed_dim = 512
        model.vision = VisionConfig(
            image_size=48, patch_size=16, width=128, layers=3, act="quick_gelu"
        )
    else:
        model = preset(case.model)
    model.dtype, model.remat = dtype, "full"
    queries, documents = {"query": 1.0}, {"image": 1.0}
    return TrainConfig(
        model=model,
        data=DataConfig(store="none", query_fields=queries, document_fields=documents),
        loss=LossConfig(targets="diagonal", form=case.form, dtype=dtype),
        optim=OptimConfig(batch_size=case.local * chips),
        mesh=MeshConfig(fsdp=case.fsdp),
    )


def formulas(cfg, chips: int) -> dict[str, float]:
    """Bytes that a chip should send in a step, whatever a program does.

    Of the loss of B pairs of D dimensions: documents in the loss's type, their gradients in
    float32; the gather sends documents once, all but a chip's own, the ring twice, all of them. In
    bfloat16 that is 6 B D and 8 B D. Of parameters that are split: a layer's once for the forward
    and once for the backward pass, others once; matrices in the model's type. The table of tokens
    stays where it is: what is looked up in it moves.
    """
    import jax

    from gcl_jax.models.clip import abstract_model
    from gcl_jax.sharding import param_spec

    item = {"bfloat16": 2, "float32": 4}
    documents = cfg.optim.batch_size * cfg.model.embed_dim
    others = (chips - 1) / chips
    of_document = item[cfg.loss.dtype]
    loss = {"gather": (of_document + 4) * others, "ring": 2 * of_document + 4}[cfg.loss.form]
    fsdp = cfg.mesh.fsdp
    parameters = 0.0
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(cfg.model)[1])
    for path, x in leaves:
        name = jax.tree_util.keystr(path)
        if "token_embedding" not in name and any(param_spec(path, x.shape, fsdp)):
            uses = 2 if "blocks" in name else 1
            parameters += uses * item[cfg.model.dtype] * math.prod(x.shape) * (fsdp - 1) / fsdp
    return {"loss": documents * loss, "parameters": parameters}


def compiled(case: Case) -> dict:
    """All figures of one case."""
    from gcl_jax.plan import planner
    from gcl_jax.plan.topology import QUICK, open_topology

    topology = open_topology(case.topology)
    if topology.platform == "tpu" and not case.thorough:
        topology = topology._replace(compiler_options=topology.compiler_options | QUICK)
    chips = len(topology.devices)
    # CPUs neither multiply nor send bfloat16.
    dtype = "float32" if topology.platform == "cpu" else "bfloat16"
    cfg, data = planner.resolve(config(case, chips, dtype))
    found = planner.figures(cfg, planner.compile_plan(cfg, data, topology), topology, UTILISATION)
    chip = topology.chip._asdict() if topology.chip else None
    copies = cfg.optim.batch_size * cfg.model.embed_dim * (8 if dtype == "float32" else 6)
    return found | {
        "chips": chips,
        "chip": chip,
        "formulas": formulas(cfg, chips),
        "copies": copies if case.form == "gather" else 0,
    }


def in_own_process(case: Case) -> dict:
    """Its figures, or why there are none. What the TPU compiler takes of memory, it keeps; in haste
    it crashes on some programs, which it compiles again at leisure."""
    for thorough in (False, True):
        if thorough >= case.thorough:
            given = dataclasses.replace(case, thorough=thorough)
            command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(given))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return json.loads(done.stdout.splitlines()[-1]) | {"thorough": thorough}
            if done.returncode > 0:
                break
    reason = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
    return {"failed": reason[-1].removeprefix("gcl_jax.errors.ConfigError: ")}


def sent(found: dict, part: str) -> float:
    return sum(c["sent"] for c in found["collectives"] if c["part"] == part)


def off(found: dict, part: str) -> float | None:
    """By which share more was sent than the formula says; None if there is nothing to send."""
    expected = found["formulas"][part]
    return sent(found, part) / expected - 1 if expected and found["chips"] > 1 else None


def missed(rows: dict[Case, dict]) -> list[str]:
    """The checks that failed, in words."""
    said = []
    ladders: dict[tuple, list[tuple[int, float]]] = {}
    for case, found in rows.items():
        if "failed" in found:
            continue
        for part in ("loss", "parameters"):
            share = off(found, part)
            if share is not None and abs(share) > TOLERANCE:
                said.append(f"{case.name}: {part} sends {share:+.1%} of the formula")
        held = found["peak"] - found["copies"]
        ladders.setdefault((*case.ladder, found["thorough"]), []).append((found["chips"], held))
    for ladder, slices in ladders.items():
        name = " ".join(str(value) for value in ladder)
        least = math.inf
        for chips, held in sorted(slices):
            if held > (1 + TOLERANCE) * least:
                said.append(
                    f"{name}: a chip holds {held / MIB:.1f} MiB in a slice of {chips}, "
                    f"{least / MIB:.1f} in a smaller one"
                )
            least = min(least, held)
    return said


def efficiencies(found: dict) -> tuple[float, float] | None:
    """Share of a step that is left for computing, if no communication hides behind it, and if only
    that is exposed which the compiler left so; None of a single chip and of CPUs."""
    if "projection" not in found:
        return None
    times = found["projection"]
    computing = times["towers"] + times["loss"]
    exposed = found["exposed"] / found["chip"]["link"] if found["exposed"] else 0.0
    return computing / (computing + times["communication"]), computing / (computing + exposed)


HEAD = (
    "| model, loss | slice | chips | batch | TFLOP model / compiled | GiB moved | GiB held "
    "| MiB sent: loss | parameters | other | projected |\n" + "|---" * 11 + "|"
)


def row(case: Case, found: dict) -> str:
    name = f"{case.model}, {case.form}"
    if "failed" in found:
        return f"| {name} | {case.topology} | {found['failed']} | | | | | | | | |"
    if found["thorough"]:
        name += ", thorough"
    work = found["work"]
    of = {part: off(found, part) for part in ("loss", "parameters")}
    cells = [
        f"{sent(found, part) / MIB:,.1f}" + (f" ({of[part]:+.1%})" if of[part] is not None else "")
        for part in of
    ]
    rest = found["sent"] - sum(sent(found, part) for part in of)
    model = found["tower_flops"] + found["loss_flops"]
    share = efficiencies(found)
    return (
        f"| {name} | {case.topology} | {found['chips']} | {found['batch']:,} "
        f"| {model / 1e12:.3g} / {work['flops'] / 1e12:.3g} | {work['memory'] / GIB:.3g} "
        f"| {found['peak'] / GIB:.3g} | {' | '.join(cells)} | {rest / MIB:,.1f} "
        f"| {f'{share[0]:.1%}' if share else '-'} |"
    )


def badly_done(case: Case, found: dict) -> str:
    """What the compiler did that computes nothing."""
    work = found["work"]
    copies, casts = work["copies"], work["casts"]
    lines = [
        f"{case.model} on {case.topology}, {case.form}:",
        f"  padding: {work['padding'] / GIB:.3g} of {work['memory'] / GIB:.3g} GiB moved "
        f"({work['padding'] / work['memory']:.0%}); {work['padded'] / work['flops'] - 1:.1%} more "
        "FLOPs in whole vectors of 128",
        f"  copies and transposes: {copies['times']:,}, {copies['bytes'] / GIB:.3g} GiB; casts "
        f"fused with nothing: {casts['times']:,}, {casts['bytes'] / GIB:.3g} GiB",
        f"  exposed collectives: {found['exposed'] / MIB:,.1f} of {found['sent'] / MIB:,.1f} MiB",
    ]
    lines += [
        f"    {c['kind']}, {c['part']}: {c['exposed'] / MIB:,.1f} of {c['sent'] / MIB:,.1f} MiB"
        for c in found["collectives"]
        if c["exposed"] > 0.01 * found["sent"]
    ]
    lines += [
        f"    {one['kind']} {one['shape']} x {one['moved']['times']}: "
        f"{one['moved']['bytes'] / MIB:,.0f} MiB, {one['name'] or 'the compiler'}"
        for one in work["culprits"][:4]
    ]
    if (chip := found["chip"]) is not None:
        products, memory = work["flops"] / chip["flops"], work["memory"] / chip["hbm"]
        bound = found["tower_flops"] / chip["flops"] / max(products, memory)
        line = (
            f"  at best: {products * 1e3:.3g} ms of products at the peak, {memory * 1e3:.3g} ms of "
            f"memory at its full speed, so {bound:.0%} of the peak in the model's own FLOPs"
        )
        if share := efficiencies(found):
            line += f"; {share[1]:.1%} of a step computes if what is exposed costs time"
        lines.append(line)
    return "\n".join(lines)


ASSUMPTIONS = f"""
Figures are of one chip and one step. Compiled, by the target's own compiler: FLOPs of matrix
products, bytes moved to and from memory (every instruction reads its operands and writes its
result once, in the tiles that they lie in), bytes held, bytes sent; in brackets, how far these are
from the formulas of `formulas`. Projected: the share of a step left for computing if no
communication hides behind it, the towers' and the loss's FLOPs at {UTILISATION:.0%} of the peak,
bytes at the full speed of all links; without latencies, data, and what else the network carries.
Rows are compiled with the TPU compiler's least effort but for those called thorough; only the
latter tell what it does badly. CPU rows are in float32, where documents send 4 + 4 and 4 + 4 + 4
bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="rows whose name has this, such as v5e or demo")
    parser.add_argument("--out", type=Path, default=HERE / "scaling.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        os.environ["JAX_PLATFORMS"] = "cpu"
        print(json.dumps(compiled(Case(**json.loads(args.case)))))
        return
    chosen = [case for case in cases() if args.only in case.name]
    if not chosen:
        parser.error(f"--only={args.only}: no row has that in its name, such as {cases()[0].name}")
    known = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    with tqdm.tqdm(chosen, unit="row", dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            if "failed" in known.get(case.name, {"failed": ""}):
                known[case.name] = in_own_process(case)
                args.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    rows = {case: known[case.name] for case in chosen}
    print("\n".join([HEAD, *(row(case, found) for case, found in rows.items()), ASSUMPTIONS]))
    for case, found in rows.items():
        if "failed" not in found and (found["thorough"] or case.topology.startswith("h100")):
            print(f"\n{badly_done(case, found)}")
    said = missed(rows)
    print("\n" + "\n".join([f"MISSED: {line}" for line in said] or ["All checks hold."]))
    sys.exit(1 if said else 0)


if __name__ == "__main__":
    main()
