"""How fast `gcl_jax.prepare` and the input pipeline are and what memory they take, on data made up
here:

    python benchmarks/data.py --pairs=1000000 --documents=200000 --train_steps=40     # texts
    python benchmarks/data.py --pairs=20000 --documents=2000 --images --pipeline      # and JPEGs
    python benchmarks/data.py --pairs=1000 --documents=100 --demo_steps=60

Prints, and writes as JSON, rows a second (pairs, over the whole command) and the peak of the main
process's resident memory. `--train_steps` trains a small model on the store and adds its peak.
`--pipeline` adds benchmarks/pipeline.py, a comparison with PyTorch. `--demo_steps` trains the demo
(configs/emoji_tiny.py) and adds the share of the time that its loop waits for data.
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

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
}
COMMAND = (
    "-m gcl_jax.prepare --pairs=pairs.csv --query_fields=query --id_column=id --score_column=score "
    "--val_share=0"
)
EDGE = 256  # of the store with reduced images that `--pipeline` compares as well


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


def measure(folder: Path, *flags: str) -> tuple[float, float]:
    """(seconds, MiB) of one `prepare` in `folder`."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, *COMMAND.split(), *flags],
        cwd=folder,
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - began
    # The only child so far that was large.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


TEXT_CONFIG = """from gcl_jax.config import *

def get_config():
    text = TextConfig(context_length=12, width=64, heads=2, layers=1)
    return TrainConfig(
        model=ModelConfig(embed_dim=64, vision=None, text=text),
        data=DataConfig(store="store", document_fields={"title": 1.0}),
        optim=OptimConfig(batch_size=512),
    )
"""


def train(folder: Path, config: str, steps: int) -> tuple[float, float]:
    """(peak MiB, share of the time that the loop waits for data, compilation left aside) of a run
    of `config` with `folder` as its working directory."""
    command = [sys.executable, "-m", "gcl_jax.train", f"--config={config}", "--workdir=run"]
    flags = [f"--config.optim.steps={steps}", "--config.log_every=5", "--config.eval.every=0"]
    child = subprocess.Popen([*command, *flags], cwd=folder, env=ENVIRONMENT)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit("training failed")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    seconds = [1 / row["pairs_per_second"] for row in rows]  # up to a factor
    waits = [row["data_wait"] for row in rows]
    return usage.ru_maxrss / 1024, float(np.average(waits, weights=seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--images", action="store_true", help="give every document a JPEG")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the figures there")
    parser.add_argument("--pipeline", action="store_true", help="compare with a DataLoader")
    parser.add_argument("--image_size", type=int, default=224, help="of the model, for --pipeline")
    parser.add_argument("--turns", type=int, default=7, help="of each, for --pipeline")
    parser.add_argument("--train_steps", type=int, default=0, help="train on the texts as well")
    parser.add_argument("--demo_steps", type=int, default=0, help="train the demo as well")
    args = parser.parse_args()
    if args.pipeline and not args.images:
        parser.error("--pipeline needs --images")
    measured = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, args.pairs, args.documents, args.images)
        if args.images:
            write_images(folder, args.documents)
        fields = "image:image,title" if args.images else "title"
        flags = [f"--document_fields={fields}", f"--workers={args.workers}"]
        seconds, peak = measure(folder, "--out=store", *flags)
        if args.train_steps:
            (folder / "config.py").write_text(TEXT_CONFIG)
            measured["train_peak_MiB"] = round(train(folder, "config.py", args.train_steps)[0])
        if args.demo_steps:
            (folder / "demo").mkdir()
            demo = ROOT / "configs" / "emoji_tiny.py"
            wait = train(folder / "demo", str(demo), args.demo_steps)[1]
            measured["demo_data_wait"] = round(wait, 5)
        if args.pipeline:
            from pipeline import compare

            measure(folder, "--out=reduced", f"--image_size={EDGE}", *flags)
            stores = {"gcl_jax": folder / "store", "gcl_jax_reduced": folder / "reduced"}
            figures = compare(folder, stores, args.image_size, args.turns)
            measured["pipeline"] = figures | {"reduced_image_size": EDGE}
    figures = {
        "pairs": args.pairs,
        "documents": args.documents,
        "images": args.images,
        "workers": args.workers,
        "seconds": round(seconds, 1),
        "pairs_per_second": round(args.pairs / seconds),
        "documents_per_second": round(args.documents / seconds),
        "peak_MiB": round(peak),
        **measured,
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
