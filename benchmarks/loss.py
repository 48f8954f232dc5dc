"""Time and memory of the loss with its gradients: `gcl_loss_reference` (naive), the blockwise forms
and open_clip's `ClipLoss`, on one device, side by side in one run.

    python benchmarks/loss.py                              # what benchmarks/loss.json holds
    python benchmarks/loss.py --batches=1024 --repeats=1   # a glance
    python benchmarks/loss.py --dim=768 --dtype=bfloat16 --batches=65536,1048576   # on a GPU

Constant weights, so that all compute one number, and they are compared. Methods take turns; times
are medians. JAX's memory is the compiler's count of temporary memory, without embeddings and their
gradients; torch's is by how much a call raises the peak of a fresh process, gradients included.
`ClipLoss` needs the extra `parity`; its `local_loss` differs only on several processes.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gcl_jax.losses.contrastive import gcl_loss, gcl_loss_reference
from gcl_jax.losses.pairs import PairRows
from gcl_jax.sharding import BATCH_AXES

HERE = Path(__file__).parent
SCALE = 20.0
MIB = 2**20


def embeddings(batch: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of queries and documents, float32."""
    rng = np.random.default_rng(batch)
    both = rng.standard_normal((2, batch, dim), np.float32)
    return tuple(both / np.linalg.norm(both, axis=-1, keepdims=True))


def compile_loss(name: str, batch: int, dim: int, dtype: str):
    """The program (queries, documents, scale, pairs) -> (loss, gradients by the first three)."""
    mesh = jax.make_mesh((1, 1, 1), BATCH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    blockwise = functools.partial(gcl_loss, mesh=mesh, form=name)
    loss = gcl_loss_reference if name == "naive" else blockwise
    one_each = lambda dtype: jax.ShapeDtypeStruct((batch,), dtype)
    pairs = PairRows(*map(one_each, (jnp.float32, jnp.bool, jnp.int32, jnp.int32)))
    both = [jax.ShapeDtypeStruct((batch, dim), dtype)] * 2
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return jax.jit(gradients).lower(*both, scale, pairs).compile()


def jax_method(name: str, batch: int, dim: int, dtype: str):
    """(a call that computes loss and gradients and waits, MiB of temporary memory)."""
    program = compile_loss(name, batch, dim, dtype)
    ids = np.arange(batch, dtype=np.int32)
    pairs = PairRows(np.ones(batch, np.float32), np.ones(batch, bool), ids, ids)
    given = *(jnp.asarray(x, dtype) for x in embeddings(batch, dim)), jnp.float32(SCALE), pairs
    given = jax.device_put(given)
    memory = program.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(program(*given))[0], memory / MIB


def largest_batch(name: str, dim: int, dtype: str, gib: float) -> int:
    """The largest power of two that fits with embeddings, gradients and temporary memory."""
    batch = 1024
    while True:
        memory = compile_loss(name, 2 * batch, dim, dtype).memory_analysis()
        needed = sum(
            getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")
        )
        if needed > gib * 1024 * MIB:
            return batch
        batch *= 2


def torch_method(batch: int, dim: int, dtype: str):
    """A call that computes open_clip's loss and gradients."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import parity

    ClipLoss = parity.import_open_clip().ClipLoss
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    given = [torch.tensor(x, dtype=getattr(torch, dtype)) for x in embeddings(batch, dim)]
    given = [x.to(device).requires_grad_() for x in given]
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    loss = ClipLoss(cache_labels=True)

    def call():
        for x in (*given, scale):
            x.grad = None
        value = loss(*given, scale)
        value.backward()
        return value.detach().float().item()

    return call


def torch_peak(batch: int, dim: int, dtype: str) -> float:
    """MiB by which one call raises the peak of a fresh process, as it reports it."""
    command = [sys.executable, __file__, "--torch_peak", str(batch), str(dim), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_torch_peak(batch: int, dim: int, dtype: str) -> None:
    call = torch_method(16, dim, dtype)
    call()
    call = torch_method(batch, dim, dtype)
    if jax.default_backend() == "gpu":
        import torch

        before = torch.cuda.memory_allocated()
        call()
        print((torch.cuda.max_memory_allocated() - before) / MIB)
        return
    # Resets the process's peak to what it holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    call()
    print((peak_kib() - before) / 1024)


def peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def compare(batch: int, dim: int, dtype: str, methods: list[str], repeats: int) -> dict:
    """{method: {"seconds", "mib"}} at one batch size."""
    calls, rows = {}, {}
    for name in methods:
        if name == "ClipLoss":
            calls[name], memory = torch_method(batch, dim, dtype), torch_peak(batch, dim, dtype)
        else:
            calls[name], memory = jax_method(name, batch, dim, dtype)
        rows[name] = {"mib": round(memory, 1)}
    values = {name: float(call()) for name, call in calls.items()}
    spread = max(values.values()) - min(values.values())
    if not spread <= (1e-4 if dtype == "float32" else 1e-1):
        raise SystemExit(f"the methods disagree on the loss: {values}")
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["seconds"] = round(statistics.median(times[name]), 4)
    return rows


def available(batch: int, limit_mib: float, has_torch: bool) -> list[str]:
    """Methods whose memory fits: those that keep all logits keep at least two copies."""
    fits = 2.5 * 4 * batch**2 / MIB < limit_mib
    return [
        *(["naive"] if fits else []),
        "gather",
        "ring",
        *(["ClipLoss"] if fits and has_torch else []),
    ]


def table(results: dict[int, dict]) -> str:
    lines = [f"{'batch':>8}  {'method':<9}{'seconds':>10}{'MiB':>10}  against naive"]
    for batch, rows in results.items():
        naive = rows.get("naive")
        for name, row in rows.items():
            line = f"{batch:>8}  {name:<9}{row['seconds']:>10.3f}{row['mib']:>10.1f}"
            if naive and row is not naive:
                line += f"  {naive['seconds'] / row['seconds']:.2f}x as fast"
                line += f", 1/{naive['mib'] / row['mib']:.0f} of the memory"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="fewer beyond 8192")
    parser.add_argument("--limit_mib", type=float, default=4096, help="for all logits at once")
    parser.add_argument("--gib", type=float, default=16, help="memory that a batch may fill")
    parser.add_argument("--out", type=Path, default=HERE / "loss.json")
    parser.add_argument("--torch_peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_peak:
        batch, dim, dtype = args.torch_peak
        print_torch_peak(int(batch), int(dim), dtype)
        return
    try:
        torch_method(16, 16, args.dtype)
        has_torch = True
    except ImportError:
        has_torch = False
    summary: dict = {
        "about": {
            "device": jax.devices()[0].device_kind,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "jax": jax.__version__,
            "dim": args.dim,
            "dtype": args.dtype,
            "repeats": args.repeats,
        },
        "batches": {},
    }

    def save() -> None:
        args.out.write_text(json.dumps(summary, indent=2) + "\n")

    for batch in map(int, args.batches.split(",")):
        repeats = max(1, min(args.repeats, round(args.repeats * (8192 / batch) ** 2)))
        methods = available(batch, args.limit_mib, has_torch)
        rows = summary["batches"][batch] = compare(batch, args.dim, args.dtype, methods, repeats)
        print(table({batch: rows}), flush=True)
        save()
    largest = {
        name: largest_batch(name, args.dim, args.dtype, args.gib)
        for name in ("naive", "gather", "ring")
    }
    print(f"largest batch in {args.gib:g} GiB:", largest)
    summary["largest_batch"] = {f"{args.gib:g} GiB": largest}
    save()


if __name__ == "__main__":
    main()
