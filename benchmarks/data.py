"""How fast `gcl_jax.prepare` is and what memory it takes, on data made up here:

    python benchmarks/data.py --pairs=1000000 --documents=200000          # texts
    python benchmarks/data.py --pairs=20000 --documents=2000 --images     # and a JPEG a document

Prints, and writes as JSON, rows a second (pairs, over the whole command) and the peak of the main
process's resident memory.
"""

import argparse
import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

COMMAND = (
    "-m gcl_jax.prepare --out=store --pairs=pairs.csv --query_fields=query --id_column=id "
    "--score_column=score"
)


def write_pairs(folder: Path, pairs: int, documents: int, images: bool) -> None:
    """pairs.csv: queries of 20 pairs each, their documents drawn evenly."""
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "id", "title", "image", "score"])
        for start in range(0, pairs, 20):
            drawn = rng.choice(documents, min(20, pairs - start), replace=False)
            for position, document in enumerate(drawn):
                image = f"{document}.jpg" if images else ""
                row = [f"find number {start}", f"d{document}", f"product {document} of many"]
                writer.writerow([*row, image, 100 - position])


def write_images(folder: Path, documents: int) -> None:
    """One JPEG of 480 x 480 pixels, about 70 kB, a document."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
    pixels = np.asarray(noise.resize((480, 480), Image.Resampling.BICUBIC))
    for document in range(documents):
        file = io.BytesIO()
        Image.fromarray(np.roll(pixels, document, 1)).save(file, "JPEG", quality=92)
        (folder / f"{document}.jpg").write_bytes(file.getvalue())


def measure(folder: Path, fields: str, workers: int) -> tuple[float, float]:
    """(seconds, MiB) of one `prepare` in `folder`."""
    command = [sys.executable, *COMMAND.split(), f"--document_fields={fields}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    began = time.monotonic()
    subprocess.run(
        [*command, f"--workers={workers}"],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - began
    # The only child so far that was large.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--images", action="store_true", help="give every document a JPEG")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, args.pairs, args.documents, args.images)
        if args.images:
            write_images(folder, args.documents)
        fields = "image:image,title" if args.images else "title"
        seconds, peak = measure(folder, fields, args.workers)
    figures = {
        "pairs": args.pairs,
        "documents": args.documents,
        "images": args.images,
        "workers": args.workers,
        "seconds": round(seconds, 1),
        "pairs_per_second": round(args.pairs / seconds),
        "documents_per_second": round(args.documents / seconds),
        "peak_MiB": round(peak),
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
