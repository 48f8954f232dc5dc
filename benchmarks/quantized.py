"""What int8 and binary indexes lose of exact search:

    pip install -e ".[search]"
    python benchmarks/quantized.py --workdir=runs/demo

Embeds the documents and 500 queries of a run's store, exports the embeddings for FAISS as
`gcl_jax.embed` does, and writes as JSON what it prints of each export.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from gcl_jax.embed import vectors
from gcl_jax.embed.__main__ import ROUNDED, export, loss, queries_of
from gcl_jax.embed.embedder import Embedder
from gcl_jax.runs import load_run, parameters_digest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    cfg, store, params, mesh, step = load_run(args.workdir)
    embedder, digest = Embedder(cfg, params, mesh), parameters_digest(params)
    rows = np.arange(len(store.documents))
    task = vectors.Task(cfg, store, "document", rows, step, digest, per_field=False)
    queries = queries_of(cfg, store, embedder)
    report = {"store": store.name, "documents": len(rows), "dim": task.dim, "exports": {}}
    with tempfile.TemporaryDirectory() as folder:
        vectors.make(Path(folder) / "vectors", task, embedder)
        for kind in ROUNDED:
            export(Path(folder) / "vectors", kind)
            report["exports"][kind] = loss(Path(folder) / "vectors", kind, queries)
    print(json.dumps(report, indent=2))
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
