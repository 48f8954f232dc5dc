"""One prepared run for a machine with an accelerator: is it right, fast and small there?

    python benchmarks/card.py                      # every stage, half an hour
    python benchmarks/card.py --stages=check:60,loss:50,step:130,memory:60,train:80,search:35
    python benchmarks/card.py --small              # minutes on a CPU: does every stage still work?

A stage is one or several parts, each a process of its own; the stage's seconds are shared by them.
What a part prints and measures is shown and written to card.json (--small: card_small.json) as it
comes. A part that hangs is ended, one that dies is told of, and the next goes on. The same command
again continues: parts that are there for the same commit, device and size are left out, unless
--again. `python benchmarks/figures.py` draws what was measured on an accelerator into the pages.

The rival is open_clip, in three forms: eager, its model compiled, and its whole step compiled, as
its version 4 does; install its main branch to compare with that. Where it is missing, that is said,
and ours runs alone. (Its length buckets need images of various lengths, which these are not.)
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
DEMO = "configs/emoji_tiny.py"
# Of the embeddings and gradients of the towers, relative to float32 on a CPU; TF32 is float32 here.
BOUNDS = {"float32": 2e-3, "bfloat16": 3e-2}


@dataclasses.dataclass
class Stage:
    """seconds: for all parts together. parts: {name: arguments}, those of this program's own
    `--part`, or of another one in this folder; `small` likewise."""

    seconds: int
    parts: dict[str, str]
    small: dict[str, str]


TINY = "--models demo --batch=8 --steps=1 --rounds=1 --warmup=3"
STAGES = {
    "check": Stage(
        120,
        {"towers": "towers ViT-B-32", "loss": "loss 3000 512", "search": "search 50000 256"},
        {"towers": "towers demo", "loss": "loss 50 16", "search": "search 500 16"},
    ),
    "loss": Stage(
        120,
        {
            dtype: f"loss.py --dtype={dtype} --batches={batches} --limit_mib=48000 --gib=64"
            for dtype, batches in {"bfloat16": "8192,32768,65536", "float32": "8192,32768"}.items()
        },
        {"float32": "loss.py --batches=64 --dim=16 --repeats=1 --gib=0.01"},
    ),
    "step": Stage(
        420,
        {
            model: f"step.py --models {model} --batch={batch} --dtype=bfloat16 --whole"
            for model, batch in {"ViT-B-32": 512, "ViT-B-16": 512, "ViT-L-14": 128}.items()
        },
        {"demo": f"step.py {TINY}"},
    ),
    "memory": Stage(
        300,
        {
            f"{model} {kind}": f"memory {model} {kind} 64 65536"
            for model in ("ViT-B-32", "ViT-B-16", "ViT-L-14")
            for kind in ("ours", "eager")
        },
        {f"demo {kind}": f"memory demo {kind} 8 16" for kind in ("ours", "eager")},
    ),
    "train": Stage(240, {"demo": "train 0"}, {"demo": "train 2"}),
    "search": Stage(
        180,
        {
            f"top {k}": f"search.py --documents=2000000 --queries=2048 --k={k} --dtype=bfloat16"
            for k in (100, 1000)
        },
        {"top 10": "search.py --documents=2000 --queries=20 --k=10 --repeats=1"},
    ),
    "loader": Stage(
        120,
        {"images": "data.py --pairs=20000 --documents=2000 --images --pipeline"},
        {"images": "data.py --pairs=200 --documents=20 --images --pipeline --turns=1"},
    ),
}


def relative(found: Any, expected: Any) -> float:
    import numpy as np

    found, expected = (np.asarray(x, np.float64).ravel() for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def towers(save: Callable[[dict], None], name: str) -> None:
    """Embeddings and gradients in each precision and attention, against float32 on the CPU."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import step
    from flax import nnx

    from gcl_jax.config import ModelConfig
    from gcl_jax.models.clip import CLIP, abstract_model

    cfg = step.configuration(name, step.make_parser().parse_args(["--batch=8"]))
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    images, tokens = step.random_batch(cfg)
    with jax.default_device(cpu):
        params = nnx.split(CLIP(cfg.model, rngs=nnx.Rngs(0)))[1]

    def passes(model: ModelConfig, device) -> list[np.ndarray]:
        graph = abstract_model(model)[0]

        def loss(params, images, tokens):
            merged = nnx.merge(graph, params)
            image, text = merged.encode_image(images), merged.encode_text(tokens)
            return jnp.sum(image * jnp.roll(text, 1, 0)), (image, text)

        given = jax.device_put((params, images, tokens), device)
        (_, embeddings), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(*given)
        flat = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(gradients)]
        return [*map(np.asarray, embeddings), np.concatenate(flat)]

    cfg.model = dataclasses.replace(cfg.model, dtype="float32", attention="xla")
    expected = passes(cfg.model, cpu)
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    usual = fields["attention"].default
    figures: dict[str, Any] = {}
    wrong = []
    choices = fields["attention"].metadata["option"].choices
    for dtype, bound in BOUNDS.items():
        for attention in choices if dtype == "bfloat16" else [usual]:
            case = f"{dtype}, {attention}"
            model = dataclasses.replace(cfg.model, dtype=dtype, attention=attention)
            try:
                found = passes(model, device)
                differ = [relative(x, y) for x, y in zip(found, expected, strict=True)]
                figures[case] = dict(zip(("image", "text", "gradients"), differ, strict=True))
                if not max(differ) <= bound:
                    wrong.append(f"{case}: {max(differ):.1e} is above {bound:.0e}")
            except Exception as error:  # Whatever a device's library says; the others go on.
                figures[case] = {"error": first_line(error)}
                wrong += [f"{case} fails"] if attention == usual else []
            print(case, figures[case], flush=True)
            save(figures)
    if wrong:
        raise SystemExit("; ".join(wrong))


def loss(save: Callable[[dict], None], pairs: str, dim: str) -> None:
    """The loss and its gradients, with random weights, against numpy in float64."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType

    from gcl_jax.losses.contrastive import gcl_loss
    from gcl_jax.losses.pairs import PairRows
    from gcl_jax.sharding import BATCH_AXES

    n, scale, rng = int(pairs), 50.0, np.random.default_rng(0)
    q, x = rng.standard_normal((2, n, int(dim)))
    q, x = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, x))
    w = rng.uniform(0, 2, n)
    mesh = jax.make_mesh((1, 1, 1), BATCH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    both = jax.jit(jax.value_and_grad(functools.partial(gcl_loss, mesh=mesh), argnums=(0, 1)))
    ids = np.arange(n, dtype=np.int32)
    rows = PairRows(np.float32(w), np.ones(n, bool), ids, ids)
    figures = {}
    for dtype, bound in {"float32": 1e-4, "bfloat16": 2e-2}.items():
        given = [jnp.asarray(v, dtype) for v in (q, x)]
        a, b = (np.asarray(v, np.float64) for v in given)  # as rounded
        z = scale * a @ b.T
        log_rows, log_columns = (z - logsumexp(z, axis) for axis in (1, 0))
        value = -(w * (np.diag(log_rows) + np.diag(log_columns))).sum() / (2 * n)
        dz = w[:, None] * np.exp(log_rows) + w * np.exp(log_columns) - 2 * np.diag(w)
        found, (dq, dx) = both(*given, jnp.float32(scale), rows)
        differ = [
            abs(float(found) / float(value) - 1),
            relative(dq, scale * dz @ b / (2 * n)),
            relative(dx, scale * dz.T @ a / (2 * n)),
        ]
        figures[dtype] = dict(zip(("loss", "queries", "documents"), differ, strict=True))
        print(dtype, figures[dtype], flush=True)
        save(figures)
        if not max(differ) <= bound:
            raise SystemExit(f"{dtype}: {max(differ):.1e} is above {bound:.0e}")


def logsumexp(z, axis: int):
    import numpy as np

    top = z.max(axis, keepdims=True)
    return top + np.log(np.exp(z - top).sum(axis, keepdims=True))


def search(save: Callable[[dict], None], documents: str, dim: str) -> None:
    """The top 100 of 300 queries near documents, against a sort by numpy in float64."""
    import numpy as np
    from search import unit_vectors

    from gcl_jax.search.index import Index

    corpus = unit_vectors(int(documents), int(dim), seed=0)
    queries = corpus[:300] + 0.05 * unit_vectors(300, int(dim), seed=1)
    scores = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    of = lambda rows: np.take_along_axis(scores, rows, 1)
    figures = {}
    for dtype in ("float32", "bfloat16"):
        found_scores, found = Index(corpus, dtype=dtype).search(queries, 100)
        figures[dtype] = {
            "unequal rows": float((found != expected).mean()),
            "scores": float(np.abs(of(found) - of(expected)).max()),
            "as scored": float(np.abs(found_scores - of(found)).max()),
        }
        print(dtype, figures[dtype], flush=True)
        save(figures)
    if not figures["float32"]["scores"] < 1e-5:
        raise SystemExit("float32 search does not find the best")


def memory(save: Callable[[dict], None], name: str, kind: str, first: str, last: str) -> None:
    """The largest batch (`first` doubled, up to `last`) with which a training step in bfloat16
    runs: "ours", as it is by default, or "eager", open_clip's. Each has the card for itself, for
    neither library gives back what it once held."""
    import gc

    import step

    figures: dict[str, Any] = {"kind": kind, "batch": 0, "of": int(last)}
    batch = int(first)
    while batch <= int(last) and (kind == "ours" or step.open_clip):
        flags = [f"--batch={batch}", "--dtype=bfloat16"]
        cfg = step.configuration(name, step.make_parser().parse_args(flags))
        try:
            trainer = step.make_trainers(cfg, [kind])[kind]
            for _ in range(2):
                trainer.read(trainer.step())
            figures |= {"batch": batch, "peak_bytes": trainer.peak_bytes()}
        except Exception as error:  # JAX and PyTorch each have their own for a full card.
            figures["ended"] = f"{batch}: {first_line(error)}"
            break
        finally:
            trainer = None
            gc.collect()
            save(figures)
            print(figures, flush=True)
        batch *= 2
    save(figures)


def train(save: Callable[[dict], None], steps: str) -> None:
    """The demo as its reader runs it, nothing compiled before: seconds until the first step, of
    training, of the evaluation; and until the first step of a second start. `steps` cuts it."""
    import startup

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        startup_env = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        os.environ |= startup_env
        workdir = folder / "demo"
        cut = [f"--config.optim.steps={steps}", "--config.eval.every=0"] if int(steps) else []
        flags = [f"--config={DEMO}", f"--workdir={workdir}", "--config.log_every=1", *cut]
        logged, begun = workdir / "metrics.jsonl", time.perf_counter()
        process = subprocess.Popen(startup.command("train", *flags), cwd=ROOT)
        while process.poll() is None:
            if "first step" not in figures and logged.exists() and logged.read_text().strip():
                figures["first step"] = time.perf_counter() - begun
                save(figures)
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"training ended with {process.returncode}")
        figures["train"] = time.perf_counter() - begun
        last = json.loads(logged.read_text().splitlines()[-1])
        figures |= {key: last[key] for key in ("step", "loss", "pairs_per_second")}
        save(figures)
        if not cut:
            figures["first step, second start"] = startup.first_step(folder, "again", DEMO)
            save(figures)
        begun = time.perf_counter()
        evaluate = startup.command("evaluate", f"--workdir={workdir}", "--max_queries=50")
        subprocess.run(evaluate if cut else evaluate[:-1], cwd=ROOT, check=True)
        figures["evaluate"] = time.perf_counter() - begun
        save(figures)


PARTS: dict[str, Callable[..., None]] = {
    part.__name__: part for part in (towers, loss, search, memory, train)
}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def commit() -> str:
    """Of the code that is measured; without git, a digest of its sources."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        sources = sorted(path for path in (ROOT / "gcl_jax").rglob("*.py"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def about() -> dict[str, str]:
    """The device and the versions, as a process of its own finds them: this one takes no card."""
    code = """import json, importlib.metadata as m, jax
found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
for name in ("torch", "open_clip_torch"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: found[name] = "not installed"
print(json.dumps(found))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"jax does not start: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(arguments: str, limit: float, note: Callable[[dict], None]) -> str:
    """Empty if the part ended well, or what went wrong; `note` gets its figures as they come."""
    program, *rest = arguments.split()
    own = program in PARTS
    command = [sys.executable, str(HERE / ("card.py" if own else program))]
    command += ["--part", program, *rest] if own else rest
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | {"PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "figures.json", Path(folder) / "log"
        begun, shown, text = time.monotonic(), 0, ""
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, f"--out={out}"],
                **{"stdout": file, "stderr": file, "env": env, "start_new_session": True},
            )
        try:
            while True:
                over = process.poll() is not None
                text = log.read_text(errors="replace")
                print(text[shown:], end="", flush=True)
                shown = len(text)
                if out.exists() and (written := read_json(out)):
                    note(written)
                if over or time.monotonic() - begun > limit:
                    break
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not over:
        return f"ended after {limit:.0f} s"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return f"exit code {process.returncode}: {last[:300]}" if process.returncode else ""


def read_json(path: Path) -> dict:
    """Empty for a file that is being written."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


def parse_stages(text: str) -> dict[str, float]:
    """{stage: seconds} of "check:120,loss"."""
    chosen = {}
    for item in text.split(","):
        name, _, seconds = item.partition(":")
        try:
            usual = STAGES[name].seconds
            chosen[name] = float(seconds or usual)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{item!r} is not STAGE or STAGE:SECONDS; stages are {', '.join(STAGES)}"
            ) from None
    return chosen


def run(chosen: dict[str, float], out: Path, small: bool, again: bool) -> list[str]:
    """What went wrong, a line each."""
    measured, failed = read_json(out) if out.exists() else {}, []
    key = about() | {"commit": commit(), "small": small}
    print(", ".join(f"{name} {value}" for name, value in key.items()))
    if key["open_clip_torch"] == "not installed":
        print("open_clip is not installed: ours runs alone")
    for stage, seconds in chosen.items():
        end = time.monotonic() + seconds
        parts = STAGES[stage].small if small else STAGES[stage].parts
        for part, arguments in parts.items():
            name = f"{stage}, {part}"
            before = measured.get(name, {})
            same = {k: before.get(k) for k in key} == key
            if same and not before["error"] and not again:
                print(f"== {name}: there already")
                continue
            print(f"== {name}: {arguments} (at most {max(0, end - time.monotonic()):.0f} s)")
            row: dict[str, Any] = {**key, "error": "interrupted", "seconds": 0, "figures": {}}

            def note(figures: dict, row=row, name=name) -> None:
                row["figures"] = figures
                save_json(out, measured | {name: row})

            begun = time.monotonic()
            left = end - begun
            error = run_part(arguments, left, note) if left > 0 else "no time left for it"
            row |= {"error": error, "seconds": round(time.monotonic() - begun, 1)}
            if error:
                failed.append(f"{name}: {error}")
                print(f"-- {name}: {error}")
            # What an earlier commit measured is worth more than that there was no time.
            if left > 0 or not before:
                measured[name] = row
                save_json(out, measured)
    return failed


def save_json(path: Path, content: dict) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default={name: float(stage.seconds) for name, stage in STAGES.items()},
        metavar="STAGE[:SECONDS],...",
        help=", ".join(f"{name}:{stage.seconds}" for name, stage in STAGES.items()),
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out or HERE / ("card_small.json" if args.small else "card.json")
    if args.part:
        name, *rest = args.part
        PARTS[name](lambda figures: save_json(out, figures), *rest)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part ends, too
    if failed := run(args.stages, out, args.small, args.again):
        raise SystemExit("\n".join(["", "not measured:", *failed]))


if __name__ == "__main__":
    main()
