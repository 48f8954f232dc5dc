"""Every benchmark of speed in one go; figures.py then draws what they found into the pages.

    pip install -e ".[parity]" faiss-cpu
    python benchmarks/all.py                              # about 40 minutes on 2 cores, 12 GB
    python benchmarks/all.py --only search startup

Each runs by itself, one after another, and writes NAME.json beside its script; what fails is said
and leaves its rows as they were.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from figures import SPEED

HERE = Path(__file__).parent


def run(name: str, more: list[str]) -> bool:
    """Whether it went well; the figures of a failed run stay what they were."""
    out, made = HERE / f"{name}.json", HERE / f"{name}.json.new"
    flags = [*SPEED[name].flags, *more, f"--out={made}"]
    print(f"== python benchmarks/{name}.py {' '.join(flags[:-1])}", flush=True)
    try:
        failed = subprocess.run([sys.executable, HERE / f"{name}.py", *flags]).returncode
        if not failed:
            made.replace(out)
        return not failed
    finally:
        made.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=SPEED, default=list(SPEED))
    parser.add_argument("--flags", nargs="*", default=[], help="more flags, for each of them")
    args = parser.parse_args()
    failed = [name for name in args.only if not run(name, args.flags)]
    subprocess.run([sys.executable, HERE / "figures.py"], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
