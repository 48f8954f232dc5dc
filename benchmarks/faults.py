"""Does a run survive? Training runs that are killed, stopped, damaged and put on a full disk:

    python benchmarks/faults.py --kills=50

1. SIGKILL, in random moments: of the start, of a step, within a save, within the deletion of an
   old checkpoint. Every restart must continue from the newest complete checkpoint.
2. SIGTERM: the run must save the step that it ends at.
3. The newest checkpoint truncated, bits of it flipped, files of it deleted: the restart must warn
   and continue from the one before.
4. A full disk (a small tmpfs; left out where mounting is not allowed): one line, and after more
   space has come the run continues from the checkpoint before.

Each run is restarted until it ends; its whole state must then be that of a run that nothing
happened to, bit for bit, and metrics.jsonl must have the same losses, each step once. Ends with 1
if any of this fails.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = Path(__file__).with_suffix(".json")

# The bundled benchmark with the smallest of towers, and all that draws or averages.
CONFIG = {
    "model.embed_dim": 16,
    "model.vision.image_size": 16,
    "model.vision.width": 32,
    "model.vision.layers": 2,
    "model.vision.head_width": 16,
    "model.vision.patch_dropout": 0.5,
    "model.text.width": 32,
    "loss.targets": "diagonal",
    "optim.batch_size": 16,
    "optim.ema_decay": 0.99,
    "optim.epochs": 0,
    "log_every": 1,
    "eval.every": 0,
    "checkpoint.keep": 2,
}
WHERE = {"step": 3, "save": 5, "deletion": 1, "start": 1}  # relative frequencies
PATIENCE_SECONDS = 600


class Failure(Exception):
    """What must not happen, did."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failure(message)


class Run:
    """One process that trains in `workdir`, its stderr in a file beside it."""

    def __init__(self, workdir: Path, args: argparse.Namespace):
        self.workdir, self.folder = workdir, workdir / "checkpoints"
        values = CONFIG | {"optim.steps": args.steps, "checkpoint.every": args.every}
        command = [sys.executable, "-m", "gcl_jax.train", "--config=configs/emoji_tiny.py"]
        command += [f"--config.{key}={value}" for key, value in values.items()]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(args.scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        }
        self._errors = workdir.with_name(f"{workdir.name}.stderr")
        self.before = newest(workdir)
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, stderr=errors
            )

    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def started(self) -> bool:
        """Whether it has said where it starts from."""
        return bool(re.search("continuing|starting from", self.errors()))

    def wait_for(self, happened: Callable[[], object], poll: float = 0.02) -> bool:
        """Until it has; False if the process ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            require(time.monotonic() < deadline, f"the run in {self.workdir} hangs")
            if self.process.poll() is not None:
                return False
            time.sleep(poll)
        return True

    def end(self, code: int = 0) -> None:
        self.process.wait(PATIENCE_SECONDS)
        found = self.process.returncode
        require(found == code, f"exit code {found}, not {code}: {self.errors()[-2000:]}")

    def check_start(self, expected: int) -> None:
        """It says that it continues from `expected`, or starts if that is 0."""
        said = re.search(r"continuing \S+ from step (\d+) of|starting from", self.errors())
        require(said is not None, f"does not say where it starts: {self.errors()[-2000:]}")
        step = int(said[1] or 0) if said else -1
        require(step == expected, f"starts from step {step}, not {expected}")


def newest(workdir: Path) -> int:
    """The newest complete checkpoint, as orbax marks them; 0 if there is none."""
    marks = (workdir / "checkpoints").glob("*/commit_success.txt")
    return max((int(m.parent.name) for m in marks if m.parent.name.isdecimal()), default=0)


def last_step(workdir: Path) -> int:
    """The last step in metrics.jsonl, whose last line may be cut short."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def final(workdir: Path, steps: int) -> tuple[dict, dict, list]:
    """All that must be equal at the end: arrays, position in the data, losses."""
    import jax
    import numpy as np

    from gcl_jax.checkpoints.saved import Saved

    saved = Saved(workdir / "checkpoints" / str(steps))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        for name, x in saved.arrays.items()
    }
    arrays = {name: np.asarray(x).tobytes() for name, x in saved.read(targets).items()}
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return arrays, saved.data, [(row["step"], row["loss"]) for row in rows]


def require_equal(workdir: Path, reference: Path, steps: int) -> None:
    for what, a, b in zip(
        ("arrays", "position", "losses"),
        final(workdir, steps),
        final(reference, steps),
        strict=True,
    ):
        require(a == b, f"{what} of {workdir} differ from those of the uninterrupted run")


def kill(run: Run, where: str, rng: random.Random) -> bool:
    """Kills `run` there; False if it ended before."""
    if where == "start":
        time.sleep(rng.uniform(0, 8))
    else:
        # A restart drops the lines of the steps after its checkpoint.
        stepping = lambda: last_step(run.workdir) > run.before
        if not (run.wait_for(run.started) and run.wait_for(stepping)):
            return False
        if where == "step":
            time.sleep(rng.uniform(0, 6))
        else:
            sign = "*.orbax-checkpoint-tmp*" if where == "save" else "deleted/*"
            if not run.wait_for(lambda: any(run.folder.glob(sign)), poll=0.001):
                return False
            time.sleep(rng.uniform(0, 0.05 if where == "save" else 0.005))
    run.process.kill()
    return run.process.wait() == -signal.SIGKILL


def kills(args: argparse.Namespace, reference: Path, rng: random.Random) -> list[dict]:
    """One row per kill."""
    from gcl_jax.logs import progress

    rows: list[dict] = []
    bar = progress(args.kills, unit="kill", description="SIGKILL")
    for number in range(args.kills + 1):
        workdir = args.scratch / f"killed_{number}"
        while len(rows) < args.kills:
            where = rng.choices(list(WHERE), list(WHERE.values()))[0]
            run = Run(workdir, args)
            killed = kill(run, where, rng)
            if started := run.started():
                run.check_start(run.before)
            if not killed:
                run.end()
                break
            step, complete = last_step(workdir), newest(workdir)
            unfinished = bool(list(run.folder.glob("*.orbax-checkpoint-tmp*")))
            deleting = bool(list(run.folder.glob("deleted/*")))
            require(complete >= run.before, f"checkpoint {run.before} is gone")
            rows.append(
                {
                    "aimed_at": where,
                    "within": "save" if unfinished else "deletion" if deleting else where,
                    "continued_from": run.before if started else None,
                    "step": step,
                    "newest": complete,
                    "lost": max(0, step - complete),
                }
            )
            bar.update()
        else:
            run = Run(workdir, args)
            run.end()
            run.check_start(run.before)
        require_equal(workdir, reference, args.steps)
        if len(rows) == args.kills:
            return rows
    return rows


def terminated(args: argparse.Namespace, reference: Path, rng: random.Random) -> dict:
    workdir = args.scratch / "terminated"
    run = Run(workdir, args)
    require(run.wait_for(lambda: last_step(workdir) > rng.uniform(1, args.every)), "ended early")
    run.process.send_signal(signal.SIGTERM)
    run.end(128 + signal.SIGTERM)
    step, saved = last_step(workdir), newest(workdir)
    require(step == saved, f"SIGTERM at step {step} left checkpoint {saved}")
    again = Run(workdir, args)
    again.end()
    again.check_start(saved)
    require_equal(workdir, reference, args.steps)
    return {"step": step, "saved": saved}


def _data_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("state/**/d/*") if path.is_file()]


def truncate(folder: Path) -> None:
    for path in _data_files(folder):
        os.truncate(path, path.stat().st_size // 2)


def flip_bits(folder: Path) -> None:
    """One in the middle of each file of arrays: not all that is in them is ever read."""
    for path in _data_files(folder):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def delete(folder: Path) -> None:
    for path in _data_files(folder):
        path.unlink()


def damaged(args: argparse.Namespace, reference: Path, harm: Callable[[Path], None]) -> dict:
    """The finished run, whose newest checkpoint is harmed, trains its last steps again."""
    workdir = args.scratch / harm.__name__
    shutil.copytree(reference, workdir)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    harm(workdir / "checkpoints" / str(steps[-1]))
    run = Run(workdir, args)
    run.end()
    warnings = [line for line in run.errors().splitlines() if line.startswith("warning: ")]
    require(len(warnings) == 1, f"{harm.__name__}: no warning, or several: {warnings}")
    run.check_start(steps[-2])
    require_equal(workdir, reference, args.steps)
    return {"continued_from": steps[-2], "warning": warnings[0].replace(str(args.scratch), "")}


def full_disk(args: argparse.Namespace, reference: Path) -> dict | None:
    """None where nothing may be mounted."""
    disk = args.scratch / "disk"
    disk.mkdir()
    one = sum(p.stat().st_size for p in reference.glob(f"checkpoints/{args.steps}/**/*"))
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    if subprocess.run([*mount, f"size={int(1.6 * one)}"], capture_output=True).returncode:
        return None
    try:
        run = Run(disk / "run", args)
        run.end(74)
        last = run.errors().splitlines()[-1]
        require("No space left on device" in last, f"a full disk is not reported: {last}")
        saved = newest(disk / "run")
        require(saved > 0, "no checkpoint is left on the full disk")
        subprocess.run([*mount[:3], "tmpfs", str(disk), "-o", "remount,size=1g"], check=True)
        again = Run(disk / "run", args)
        again.end()
        again.check_start(saved)
        require_equal(disk / "run", reference, args.steps)
        return {"error": last.replace(str(args.scratch), ""), "continued_from": saved}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def table(rows: list[dict], every: int) -> str:
    lines = [f"{'killed within':<16}{'kills':>6}{'lost steps, mean':>18}{'most':>6}"]
    for where, count in collections.Counter(row["within"] for row in rows).items():
        lost = [row["lost"] for row in rows if row["within"] == where]
        lines.append(f"{where:<16}{count:>6}{sum(lost) / count:>18.1f}{max(lost):>6}")
    return "\n".join([*lines, f"a checkpoint every {every} steps"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="of one run")
    parser.add_argument("--every", type=int, default=40, help="steps from save to save")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    args = parser.parse_args()
    rng, start = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gcl_jax_faults_") as scratch:
        args.scratch = Path(scratch)
        reference = args.scratch / "whole"
        Run(reference, args).end()
        rows = kills(args, reference, rng)
        print(table(rows, args.every), flush=True)
        report: dict = {
            "about": {"kills": args.kills, "seed": args.seed, "every": args.every},
            "sigkill": rows,
            "sigterm": terminated(args, reference, rng),
        }
        print("SIGTERM", report["sigterm"], flush=True)
        for harm in (truncate, flip_bits, delete):
            report[harm.__name__] = damaged(args, reference, harm)
            print(harm.__name__, report[harm.__name__], flush=True)
        report["full_disk"] = full_disk(args, reference)
        print("full disk", report["full_disk"] or "left out: no tmpfs can be mounted here")
    report["about"]["seconds"] = round(time.monotonic() - start)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"all runs ended with the bits of the uninterrupted one; wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"failed: {failure}")
