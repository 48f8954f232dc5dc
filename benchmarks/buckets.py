"""Why stores in buckets are copied: records read one by one over HTTP, and from the copy.

    python benchmarks/buckets.py --out=benchmarks/buckets.json

The server is gcp-storage-emulator in a process of this machine (`tests/buckets.py`): no network
lies between, so a record of a real bucket takes longer than here. Each record is an object of its
own, as large as a reduced photograph; reading a part of an object is one request as well.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS, BYTES = 128, 32_768
ADDRESS = "gs://bucket/records"


def per_second(read: Callable[[str], bytes], names: list[str], threads: int) -> float:
    """Records a second, in a random order."""
    names = random.Random(0).sample(names, len(names))
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        assert all(len(record) == BYTES for record in pool.map(read, names))
    return len(names) / (time.perf_counter() - begun)


def measure(folder: Path) -> dict[str, float]:
    from gcl_jax import paths
    from gcl_jax.prepare.stores import publish

    out = paths.path_of(ADDRESS)
    made = paths.building(out)
    made.mkdir()
    names = [f"{number:05}" for number in range(RECORDS)]
    for name in names:
        # The server drops a carriage return that comes last.
        (made / name).write_bytes(os.urandom(BYTES - 1) + b"x")
    begun = time.perf_counter()
    publish(made, out, last=names[-1])
    sent = time.perf_counter() - begun
    out.rename(folder / "aside")
    begun = time.perf_counter()
    paths.local_path(ADDRESS)
    fetched = time.perf_counter() - begun
    begun = time.perf_counter()
    paths.local_path(ADDRESS)
    asked = time.perf_counter() - begun
    bucket = paths.filesystem(ADDRESS)
    remote = lambda name: bucket.cat_file(f"{ADDRESS}/{name}")
    local = lambda name: (out / name).read_bytes()
    return {
        "seconds_to_send": sent,
        "seconds_to_fetch": fetched,
        "seconds_if_in_step": asked,
        "http_records_per_second": per_second(remote, names, 1),
        "http_records_per_second_16_threads": per_second(remote, names, 16),
        "copy_records_per_second": per_second(local, names, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    command = [sys.executable, "-m", "tests.buckets"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=ROOT, text=True, **quiet) as server,
    ):
        os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
        os.environ |= {"GCL_JAX_CACHE": f"{folder}/cache", "NO_GCE_CHECK": "true"}
        try:
            found = measure(Path(folder))
        finally:
            server.kill()
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "server": "gcp-storage-emulator on the same machine",
        "records": RECORDS,
        "bytes": BYTES,
        **{name: round(value, 4) for name, value in found.items()},
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
