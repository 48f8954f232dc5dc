"""Two processes with four devices each compute what one process with eight does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import conftest
import jax
import numpy as np
from test_targets import scored_batch

from gcl_jax.losses.contrastive import gcl_loss
from gcl_jax.optim import make_optimizer
from gcl_jax.sharding import replicated, to_global
from gcl_jax.state import abstract_model, init_state
from gcl_jax.step import make_train_step

ROOT = Path(__file__).parents[1]


def outcome() -> dict[str, np.ndarray]:
    """Loss and gradients in both forms; all parameters after a training step in two chunks."""
    mesh = conftest.make_cpu_mesh(4, 2)
    everywhere = replicated(mesh)

    def share(x):
        """This process's rows of what all processes know."""
        return np.split(x, jax.process_count())[jax.process_index()]

    (q, d, scale, pairs), known = scored_batch(np.random.default_rng(0), 24)
    batch = to_global(jax.tree.map(share, (q, d, pairs)), mesh)
    known = jax.device_put(known, everywhere)
    results = {}
    for form in ("gather", "ring"):

        def loss(q, d, pairs, scale, known, form=form):
            return gcl_loss(q, d, scale, pairs, mesh=mesh, form=form, known=known)

        gradients = jax.value_and_grad(loss, argnums=(0, 1, 3))
        results[form] = jax.jit(gradients, out_shardings=everywhere)(*batch, scale, known)

    cfg = conftest.make_tiny_config()
    cfg.optim.batch_size, cfg.optim.chunks = 16, 2
    batch = to_global(jax.tree.map(share, conftest.make_tiny_batch(cfg)), mesh)
    tx = make_optimizer(cfg.optim, 4, abstract_model(cfg.model)[1])
    state = init_state(cfg, tx, mesh)
    state, metrics = make_train_step(cfg, tx, mesh)(state, batch)
    params = jax.jit(lambda x: x, out_shardings=everywhere)(state.params)
    leaves = jax.tree_util.tree_leaves_with_path((results, params, metrics["loss"]))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def test_two_processes_equal_one(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    outputs = [tmp_path / f"{rank}.npz" for rank in range(2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(port), str(rank), str(outputs[rank])], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [child.wait(timeout=300) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    expected = outcome()
    for output in outputs:
        actual = np.load(output)
        assert set(actual) == set(expected)
        for name, value in expected.items():
            tolerance = 1e-5 * max(np.abs(value).max(), 0.1)
            np.testing.assert_allclose(actual[name], value, atol=tolerance, err_msg=name)


def main(port: str, rank: str, output: str) -> None:
    """One of the two processes, with half of conftest's devices."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(rank))
    assert (jax.local_device_count(), jax.device_count()) == (4, 8)
    np.savez(Path(output), **outcome())


if __name__ == "__main__":
    main(*sys.argv[1:])
