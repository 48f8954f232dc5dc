"""Gates: how much a field counts in a merged embedding, learned record by record."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from test_multi_field import DATA, compute, random_batch

import gcl_jax
from gcl_jax.config import LossConfig
from gcl_jax.errors import UserError
from gcl_jax.models.clip import Gate, merge_fields, truncated
from gcl_jax.port.__main__ import main as port
from gcl_jax.train.loop import train

WEIGHTS = {"image": 0.2, "title": 0.8}


def gated(gates, embeddings):
    return {field: gates[field](x) for field, x in embeddings.items()}


def drawn_gates(seed=0):
    rng = np.random.default_rng(seed)
    gates = {field: Gate(4) for field in WEIGHTS}
    for gate in gates.values():
        gate.direction[...] = jnp.float32(rng.normal(size=4))
        gate.bias[...] = jnp.float32(rng.normal())
    return gates


def test_merged_is_a_sum_weighted_by_a_softmax_over_the_fields_there_are():
    _, documents, batch = random_batch(DATA)
    present, gates = batch["document_present"], drawn_gates()
    merged = merge_fields(gated(gates, documents), present, WEIGHTS)
    for i, row in enumerate(merged):
        there = [field for field in WEIGHTS if present[field][i]]
        logits = [
            np.log(WEIGHTS[field])
            + documents[field][i] @ gates[field].direction[...]
            + gates[field].bias[...]
            for field in there
        ]
        shares = np.exp(logits - np.max(logits))
        expected = sum(
            share * documents[field][i] for share, field in zip(shares, there, strict=True)
        )
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-6)


def test_gates_change_the_merged_term_alone_and_have_its_gradients():
    queries, documents, batch = random_batch(DATA)
    options = {"loss": LossConfig(), "data": DATA, "mesh": None}
    options["mesh"] = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    plain = compute(queries, documents, batch, **options)[1]
    gates = drawn_gates()
    state = {field: nnx.split(gate, nnx.Param) for field, gate in gates.items()}

    def total(states):
        opened = {field: nnx.merge(state[field][0], x) for field, x in states.items()}
        return compute(queries, gated(opened, documents), batch, **options)

    with_gates, terms = jax.value_and_grad(lambda s: total(s)[0])(
        {f: s for f, (_, s) in state.items()}
    )
    found = total({f: s for f, (_, s) in state.items()})[1]
    for name, value in plain.items():
        changed = abs(float(found[name] - value))
        assert (changed > 1e-3) == name.endswith("merged"), name
    assert np.isfinite(with_gates)
    bias = gates["image"].bias

    def at(shift):
        bias[...] = bias[...] + shift
        value = compute(queries, gated(gates, documents), batch, **options)[0]
        bias[...] = bias[...] - shift
        return float(value)

    numeric = (at(1e-2) - at(-1e-2)) / 2e-2
    np.testing.assert_allclose(terms["image"]["bias"][...], numeric, rtol=2e-2, atol=1e-3)


def test_cut_to_fewer_dimensions_a_field_counts_as_much():
    _, documents, _ = random_batch(DATA)
    lengths = {
        field: np.linalg.norm(x, axis=1) for field, x in gated(drawn_gates(), documents).items()
    }
    for field, x in truncated(gated(drawn_gates(), documents), 2, gated=True).items():
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), lengths[field], rtol=1e-5)


def test_a_run_learns_them_and_all_that_reads_it_merges_by_them(
    tiny_config, tiny_store, tmp_path, capsys
):
    cfg = tiny_config
    cfg.data.store, cfg.model.gates, cfg.mesh.fsdp = str(tiny_store.directory), True, 2
    cfg.data.document_fields, cfg.optim.steps, cfg.optim.warmup_steps = WEIGHTS, 6, 0
    cfg.optim.lr, cfg.checkpoint.every = 0.05, 3
    train(cfg, tmp_path / "run")
    model = gcl_jax.load(tmp_path / "run")
    gates = traverse_util.flatten_dict(jax.device_get(model.embedder.params["gates"]), sep=".")
    assert set(gates) == {
        f"{kind}.{name}" for kind in ("image", "text") for name in ("bias", "direction")
    }
    assert all(np.abs(x).min() > 0 for x in gates.values())

    image, title = np.full((16, 16, 3), 90, np.uint8), "thing 1"
    alone = {"image": model.encode_image(image), "title": model.encode({"title": title})}
    expected = 0
    for field, kind in (("image", "image"), ("title", "text")):
        x = alone[field]
        np.testing.assert_allclose(np.linalg.norm(x), 1, rtol=1e-5)
        length = np.exp(x @ gates[f"{kind}.direction"] + gates[f"{kind}.bias"])
        expected = expected + WEIGHTS[field] * length * x
    merged = model.encode({"image": image, "title": title})
    np.testing.assert_allclose(merged, expected / np.linalg.norm(expected), atol=1e-5)

    export = ["export", f"--workdir={tmp_path / 'run'}", "--format=safetensors"]
    port([*export, f"--out={tmp_path / 'own'}"])
    again = gcl_jax.from_pretrained(tmp_path / "own", document_fields=WEIGHTS)
    np.testing.assert_allclose(again.encode({"image": image, "title": title}), merged, atol=1e-5)
    with pytest.raises((UserError, SystemExit)):
        port([*export[:-1], "--format=open_clip", f"--out={tmp_path / 'theirs'}"])
    assert "gates" in json.dumps(str(capsys.readouterr()))
