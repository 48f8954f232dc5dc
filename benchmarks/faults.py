"""Does a run survive? Training runs that are killed, stopped, damaged and put on a full disk:

    python benchmarks/faults.py --kills=50
    python benchmarks/faults.py --storage=bucket --processes=1,2 --kills=20 --steps=200 --every=20
    python benchmarks/faults.py --storage=mount --kills=20 --steps=200 --every=20

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

With --storage=bucket the runs are in a bucket of gcp-storage-emulator, and their processes, whose
number is drawn for every start, share nothing else; with --storage=mount no folder can be renamed
that is not empty, as gcsfuse says of many buckets. There only 1. is tried, and in place of 4. a
full disk of the copies. Runs of different numbers of processes must be equal within 1e-4.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


# On PYTHONPATH: what gcsfuse says of a folder that is not empty.
NO_RENAMES = """
import os, sys
def refuse(event, args):
    if event == "os.rename" and os.path.isdir(args[0]) and os.listdir(args[0]):
        raise OSError(24, "Too many open files", args[0])
sys.addaudithook(refuse)
"""
MARK = "commit_success.txt"


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """The address of a folder in a bucket that this process and its children see."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.buckets"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        address = server.stdout.readline().decode().strip() if server.stdout else ""
        os.environ |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        os.environ |= {"NO_GCE_CHECK": "true", "FSSPEC_GCS_TOKEN": "anon"}
        try:
            yield "gs://bucket/runs"
        finally:
            server.kill()


class Run:
    """One training in `workdir`, an address or a folder, and the stderr of its first process."""

    def __init__(self, workdir: str | Path, args: argparse.Namespace, processes: int = 1):
        self.workdir, self.name = str(workdir), str(workdir).rpartition("/")[2]
        values = CONFIG | {"optim.steps": args.steps, "checkpoint.every": args.every}
        command = [sys.executable, "-m", "gcl_jax.train", "--config=configs/emoji_tiny.py"]
        command += [f"--config.{key}={value}" for key, value in values.items()]
        path = [str(ROOT)]
        if args.storage == "mount":
            path.insert(0, str(args.scratch / "no_renames"))
        environment = os.environ | {
            "PYTHONPATH": ":".join(path),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(args.scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        }
        with socket.create_server(("localhost", 0)) as server:
            flags = [f"--coordinator=localhost:{server.getsockname()[1]}"]
        if processes == 1:
            flags = []
        self._errors = args.scratch / f"{self.name}.stderr"
        self.before = newest(self.workdir)
        self.metrics = growing(self.workdir, args) / "metrics.jsonl"
        self.processes = []
        for rank in range(processes):
            if args.storage == "bucket":
                environment["GCL_JAX_CACHE"] = str(args.scratch / f"host{rank}")
            own = [f"--num_processes={processes}", f"--process_id={rank}"] if flags else []
            with (self._errors if not rank else Path(os.devnull)).open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [*command, f"--workdir={workdir}", *flags, *own],
                        cwd=ROOT,
                        env=environment,
                        stderr=errors,
                    )
                )
        self.process = self.processes[0]

    def kill(self) -> bool:
        """All its processes; False if it has ended."""
        for process in self.processes:
            process.kill()
        return -signal.SIGKILL in [process.wait() for process in self.processes]

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


def parts(workdir: str | Path) -> dict[int, bool]:
    """{step: whether it is complete, as orbax marks them}, of all that lies in the folder."""
    if str(workdir).startswith("gs://"):
        from gcl_jax.paths import filesystem

        root = f"{workdir}/checkpoints".partition("://")[2]
        found = [name.removeprefix(f"{root}/") for name in filesystem("gs://").find(root)]
    else:
        folder = Path(workdir, "checkpoints")
        found = [str(path.relative_to(folder)) for path in folder.glob("*/*")]
    marked = {name.partition("/")[0] for name in found if re.fullmatch(rf"\d+/{MARK}", name)}
    steps = {name.partition("/")[0] for name in found}
    return {int(step): step in marked for step in steps if step.isdecimal()}


def newest(workdir: str | Path) -> int:
    """The newest complete checkpoint; 0 if there is none."""
    return max((step for step, complete in parts(workdir).items() if complete), default=0)


def within(workdir: str | Path) -> str:
    """Of what a part is there: of a "save" or of a "deletion"; empty if all are complete."""
    steps = parts(workdir)
    last = max((step for step, complete in steps.items() if complete), default=0)
    begun = [step for step, complete in steps.items() if not complete]
    return ("save" if max(begun) > last else "deletion") if begun else ""


def growing(workdir: str | Path, args: argparse.Namespace) -> Path:
    """Where the first process writes metrics.jsonl."""
    if str(workdir).startswith("gs://"):
        place = str(workdir).replace("://", "/")
        return args.scratch / "host0" / "unfinished" / f"{place}.incomplete"
    return Path(workdir)


def last_step(path: Path) -> int:
    """The last step in a metrics.jsonl, whose last line may be cut short."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def final(workdir: str | Path, steps: int) -> tuple[dict, dict, list]:
    """All that must be equal at the end: arrays, position in the data, losses."""
    import jax
    import numpy as np

    from gcl_jax.checkpoints.saved import Saved
    from gcl_jax.paths import local_path, remote

    folder = local_path(workdir)
    saved = Saved(remote(folder / "checkpoints") / str(steps))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        for name, x in saved.arrays.items()
    }
    arrays = {name: np.asarray(x) for name, x in saved.read(targets).items()}
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return arrays, saved.data, [(row["step"], row["loss"]) for row in rows]


def require_equal(
    workdir: str | Path, reference: str | Path, steps: int, rtol: float = 0.0
) -> None:
    import numpy as np

    ours, theirs = final(workdir, steps), final(reference, steps)
    require(ours[1] == theirs[1], f"the position of {workdir} differs")
    require([x for x, _ in ours[2]] == [x for x, _ in theirs[2]], f"steps logged in {workdir}")
    for name, x in theirs[0].items():
        equal = np.allclose(ours[0][name], x, rtol, rtol) if rtol else ours[0][name].tobytes()
        equal = equal if rtol else equal == x.tobytes()
        require(bool(equal), f"{name} of {workdir} differs from that of the uninterrupted run")
    equal = np.allclose([x for _, x in ours[2]], [x for _, x in theirs[2]], rtol, rtol)
    require(bool(equal), f"losses of {workdir} differ from those of the uninterrupted run")


def kill(run: Run, where: str, rng: random.Random) -> bool:
    """Kills `run` there; False if it ended before."""
    if where == "start":
        time.sleep(rng.uniform(0, 8))
    else:
        # A restart drops the lines of the steps after its checkpoint.
        stepping = lambda: last_step(run.metrics) > run.before
        if not (run.wait_for(run.started) and run.wait_for(stepping)):
            return False
        if where == "step":
            time.sleep(rng.uniform(0, 6))
        else:
            poll = 0.02 if run.workdir.startswith("gs://") else 0.001  # of which each is a request
            if not run.wait_for(lambda: within(run.workdir) == where, poll):
                return False
            time.sleep(rng.uniform(0, 0.05 if where == "save" else 0.005))
    return run.kill()


def kills(args: argparse.Namespace, reference: str | Path, rng: random.Random) -> list[dict]:
    """One row per kill."""
    from gcl_jax.logs import progress

    rows: list[dict] = []
    rtol = 1e-4 if len(args.processes) > 1 else 0.0
    bar = progress(args.kills, unit="kill", description="SIGKILL")
    for number in range(args.kills + 1):
        workdir = f"{args.root}/killed_{number}"
        while len(rows) < args.kills:
            where = rng.choices(list(WHERE), list(WHERE.values()))[0]
            run = Run(workdir, args, rng.choice(args.processes))
            killed = kill(run, where, rng)
            if started := run.started():
                run.check_start(run.before)
            if not killed:
                run.end()
                break
            step, complete = last_step(run.metrics), newest(workdir)
            require(complete >= run.before, f"checkpoint {run.before} is gone")
            rows.append(
                {
                    "processes": len(run.processes),
                    "aimed_at": where,
                    "within": within(workdir) or where,
                    "continued_from": run.before if started else None,
                    "step": step,
                    "newest": complete,
                    "lost": max(0, step - complete),
                }
            )
            bar.update()
        else:
            run = Run(workdir, args, rng.choice(args.processes))
            run.end()
            run.check_start(run.before)
        require_equal(workdir, reference, args.steps, rtol)
        if len(rows) == args.kills:
            return rows
    return rows


def terminated(args: argparse.Namespace, reference: Path, rng: random.Random) -> dict:
    workdir = args.scratch / "terminated"
    run = Run(workdir, args)
    require(
        run.wait_for(lambda: last_step(run.metrics) > rng.uniform(1, args.every)), "ended early"
    )
    run.process.send_signal(signal.SIGTERM)
    run.end(128 + signal.SIGTERM)
    step, saved = last_step(run.metrics), newest(workdir)
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


def full_copies(args: argparse.Namespace, reference: str | Path) -> dict | None:
    """The disk of the copies has no room for metrics; None where nothing may be mounted."""
    disk, workdir = args.scratch / "host0", f"{args.root}/full"
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    if subprocess.run([*mount, "size=64k"], capture_output=True).returncode:
        return None
    try:
        run = Run(workdir, args)
        run.process.wait(PATIENCE_SECONDS)
        last = run.errors().splitlines()[-1]
        require("No space left on device" in last, f"a full disk is not reported: {last}")
        subprocess.run([*mount[:3], "tmpfs", str(disk), "-o", "remount,size=1g"], check=True)
        again = Run(workdir, args)
        again.end()
        again.check_start(again.before)
        require_equal(workdir, reference, args.steps)
        return {"error": last.replace(str(args.scratch), ""), "continued_from": again.before}
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
    parser.add_argument("--storage", choices=("disk", "bucket", "mount"), default="disk")
    parser.add_argument(
        "--processes",
        type=lambda text: [int(x) for x in text.split(",")],
        default=[1],
        help="of each start of a run that is killed, drawn from these: 1,2",
    )
    parser.add_argument("--out", type=Path, default=OUTPUT)
    args = parser.parse_args()
    rng, start = random.Random(args.seed), time.monotonic()
    key = "" if args.storage == "disk" else args.storage
    with (
        tempfile.TemporaryDirectory(prefix="gcl_jax_faults_") as scratch,
        bucket() if key == "bucket" else contextlib.nullcontext(scratch) as root,
    ):
        args.scratch, args.root = Path(scratch), root
        for name, text in (("no_renames/sitecustomize.py", NO_RENAMES), ("host0/none", "")):
            (args.scratch / name).parent.mkdir()
            (args.scratch / name).write_text(text)
        if key == "bucket":
            os.environ["GCL_JAX_CACHE"] = str(args.scratch / "own")
        reference = f"{root}/whole" if key else args.scratch / "whole"
        Run(reference, args).end()
        rows = kills(args, reference, rng)
        print(table(rows, args.every), flush=True)
        report: dict = {
            "about": {
                "kills": args.kills,
                "seed": args.seed,
                "every": args.every,
                "processes": args.processes,
            },
            "sigkill": rows,
        }
        if key == "bucket":
            report["full_disk"] = full_copies(args, reference)
            print("full disk", report["full_disk"] or "left out: no tmpfs can be mounted here")
        elif not key:
            report["sigterm"] = terminated(args, reference, rng)
            print("SIGTERM", report["sigterm"], flush=True)
            for harm in (truncate, flip_bits, delete):
                report[harm.__name__] = damaged(args, reference, harm)
                print(harm.__name__, report[harm.__name__], flush=True)
            report["full_disk"] = full_disk(args, reference)
            print("full disk", report["full_disk"] or "left out: no tmpfs can be mounted here")
    report["about"]["seconds"] = round(time.monotonic() - start)
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    others = {name: x for name, x in known.items() if name in ("bucket", "mount")}
    known = known | {key: report} if key else report | others
    args.out.write_text(json.dumps(known, indent=2) + "\n")
    print(f"all runs ended with the bits of the uninterrupted one; wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"failed: {failure}")
