"""Plans: shapes against real batches, bytes against formulas, verdicts, errors, one TPU slice."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh, make_tiny_config
from processes import ENVIRONMENT

from benchmarks import plans
from gcl_jax.config import MeshConfig
from gcl_jax.data.pipeline import train_batches
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models.clip import abstract_model
from gcl_jax.models.flops import train_flops
from gcl_jax.models.presets import preset
from gcl_jax.plan import planner, topology
from gcl_jax.plan.hlo import PARTS
from gcl_jax.train.step import known_weights
from tests.test_loss_memory import tpu_mesh

EIGHT = topology.open_topology("cpu:8")


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


@pytest.mark.parametrize(
    "changes",
    [{}, {"text_negatives": "swap", "num_negatives": 2}, {"query_fields": {}}],
    ids=["plain", "negatives", "all fields"],
)
@pytest.mark.parametrize("targets", ["diagonal", "known"])
def test_the_abstract_batch_is_that_of_the_pipeline(tiny_config, tiny_store, changes, targets):
    cfg = tiny_config
    cfg.data = dataclasses.replace(cfg.data, store=str(tiny_store.directory), **changes)
    cfg.loss.targets = targets
    cfg, data = planner.resolve(cfg)
    batch = planner.abstract_batch(cfg, data, make_cpu_mesh(4, 2))
    real = next(train_batches(cfg, tiny_store))
    if targets == "known":
        real["known"] = known_weights(cfg, tiny_store)
    assert shapes(batch) == shapes(real)
    rows = jax.tree.leaves({name: x for name, x in batch.items() if name != "known"})
    assert {x.sharding.shard_shape(x.shape)[0] for x in rows} == {1}


def test_without_a_store_the_config_names_the_fields(tiny_config):
    cfg = tiny_config
    cfg.data.store, cfg.loss.targets = "stores/to_come", "known"
    cfg.data.query_fields = {"photo": 1.0, "words": 1.0}
    cfg, data = planner.resolve(cfg, ["photo", "image"])
    assert data.kinds == {
        "query": {"photo": "image", "words": "text"},
        "document": {"image": "image", "title": "text"},
    }
    assert data.known.document.shape == (data.pairs,)
    assert "no store at stores/to_come" in data.note
    cfg.data.query_fields = cfg.data.document_fields = {}
    cfg, data = planner.resolve(cfg)
    assert data.kinds == {
        "query": {"query": "text"},
        "document": {"image": "image", "title": "text"},
    }


def test_an_image_without_an_image_tower(tiny_config):
    cfg = tiny_config
    cfg.data.store, cfg.model.vision = "stores/to_come", None
    with pytest.raises(ConfigError, match="'image' is an image, and the model has no image tower"):
        planner.resolve(cfg)


def test_a_store_that_is_there_is_checked(tiny_config, tiny_store):
    cfg = tiny_config
    cfg.data.store, cfg.data.document_fields = str(tiny_store.directory), {"colour": 1.0}
    with pytest.raises(DataError, match="no document field 'colour'"):
        planner.resolve(cfg)


@pytest.fixture(scope="module", params=[1, 4])
def planned(request):
    cfg = make_tiny_config()
    cfg.data.store, cfg.optim.batch_size = "none", 256
    cfg.mesh, cfg.loss.form, cfg.model.embed_dim = MeshConfig(fsdp=request.param), "gather", 256
    cfg, data = planner.resolve(cfg)
    return cfg, planner.compile_plan(cfg, data, EIGHT)


def test_sizes_flops_and_bytes_of_a_small_step(planned):
    cfg, plan = planned
    data, fsdp = plan.mesh
    assert data * fsdp == 8
    _, params = abstract_model(cfg.model)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert plan.parameters == pytest.approx(whole / fsdp, rel=0.1)
    assert plan.optimizer == pytest.approx(2 * plan.parameters, rel=0.01)
    assert plan.peak >= plan.parameters + plan.optimizer + plan.inputs + plan.temporaries
    assert plan.tower_flops == train_flops(cfg) / 8
    # The gradients by images, which the formula counts, nobody needs.
    assert 0.75 < plan.work.flops / (plan.tower_flops + plan.loss_flops) < 1.05
    assert 0 <= plan.exposed <= plan.sent
    sent = {part: sum(c.sent for c in plan.collectives if c.part == part) for part in PARTS}
    # Two document fields and the merged one, there in float32 and their gradients back.
    assert sent["loss"] == pytest.approx(3 * 8 * 256 * 256 * 7 / 8, rel=0.1)
    if fsdp == 1:
        # The text tower's may be summed over the devices for the queries and for the titles.
        assert 0.99 < sent["gradients"] / (2 * whole * 7 / 8) < 2.01
        assert sent["parameters"] == 0


def test_under_fsdp_layers_move_and_activations_stay():
    """Once forward, and at most once more backward, for every field. Left alone, XLA gathered 77
    tokens of 1,024 rows to spare a matrix of 512 x 512 (ViT-B-32, v5e:4x4). What both fields of
    text look up in the table of tokens moves once in either direction, their ids once."""
    cfg = make_tiny_config()
    cfg.data.store, cfg.optim.batch_size, cfg.mesh = "none", 512, MeshConfig(fsdp=8)
    cfg.model.vision.width = cfg.model.text.width = 256
    cfg.model.text.vocab_size = 64
    cfg, data = planner.resolve(cfg)
    plan = planner.compile_plan(cfg, data, EIGHT)
    layer = 12 * 256**2 * 4
    forward = (cfg.model.vision.layers + 2 * cfg.model.text.layers) * layer * 7 / 8
    sent = {part: sum(c.sent for c in plan.collectives if c.part == part) for part in PARTS}
    assert forward <= sent["parameters"] < 2.1 * forward
    tokens = 2 * 512 * cfg.model.text.context_length
    assert sent["activations"] == pytest.approx((2 * tokens / 8 * 256 + tokens) * 4 * 7 / 8)
    assert sum(sent.values()) < 5 * forward


def test_too_little_memory_is_an_answer(tiny_config):
    cfg = tiny_config
    cfg.data.store, cfg.loss.targets = "none", "diagonal"  # no table of known pairs
    cfg, data = planner.resolve(cfg)
    plan = planner.compile_plan(cfg, data, EIGHT._replace(memory=1e6))
    assert (plan.fits, plan.peak) == (False, None)
    assert re.fullmatch(r"state and batch alone need 0.01 of 0.00 GiB", plan.verdict)
    assert planner.find_batch(cfg, data, EIGHT._replace(memory=1e6), lambda plan: None) is None


@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (16.45G) exceeds available HBM (15.75G).",
            "temporaries alone need 16.45 of 15.75 GiB",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 17.20G of 15.75G hbm. Exceeded hbm capacity by 1.45G.\nmore",
            "needs 17.20 of 15.75 GiB",
        ),
        ("INTERNAL: RESOURCE_EXHAUSTED: of something else\nmore", "of something else"),
    ],
)
def test_the_compilers_refusals_in_one_line(message, verdict):
    assert topology.why_not(message) == verdict


@pytest.mark.parametrize("start", [8, 64, 4096])
@pytest.mark.parametrize(("largest", "found"), [(8, 8), (100, 96), (1000, 960), (1023, 960)])
def test_the_search_for_a_batch(tiny_config, monkeypatch, start, largest, found):
    """`largest`: what fits; the search knows it to an eighth."""
    tried = []

    def fake(cfg, data, topology):
        size = cfg.optim.batch_size
        return dataclasses.replace(PLAN, batch=size, fits=size <= largest)

    monkeypatch.setattr(planner, "compile_plan", fake)
    tiny_config.optim.batch_size = start
    best = planner.find_batch(tiny_config, None, EIGHT, tried.append)
    assert best.batch == found
    assert len(tried) == len({plan.batch for plan in tried}) <= 14


PLAN = planner.Plan(
    topology="t",
    mesh=(8, 1),
    batch=8,
    parameters=1,
    optimizer=1,
    inputs=1,
    memory=1.0,
    tower_flops=1e12,
    loss_flops=1e10,
    fits=True,
    verdict="",
)


def test_the_projection_is_arithmetic(tiny_config):
    chip = topology.CHIPS["TPU v5e"]
    target = EIGHT._replace(chip=chip, platform="tpu")
    sent = planner.Collective("all-reduce", "gradients", 1, 2e9, 0.0)
    out = sent._replace(network="dcn", sent=1e9)
    plan = dataclasses.replace(PLAN, collectives=(sent, out), slices=2)
    tiny_config.loss.dtype = "float32"
    times = planner.project(tiny_config, plan, target, 0.5)
    assert times.towers == pytest.approx(1e12 / (197e12 / 2))
    assert times.loss == pytest.approx(6 * 1e10 / (197e12 / 2))
    assert times.communication == pytest.approx(2e9 / 200e9)
    assert times.between_slices == pytest.approx(1e9 / (6.4e12 / 8 / 256))
    assert times.exposed == pytest.approx(sum(times))
    assert times.overlapped == pytest.approx(times.between_slices)
    tiny_config.model.remat, tiny_config.optim.grad_cache_chunks = "full", 2
    again = planner.project(tiny_config, plan, target, 0.5)
    assert again.towers == pytest.approx(5 / 3 * times.towers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "is unknown; give one like v5e:16x16"),
        ("v9:4x4", "is unknown"),
        ("v5e:4x0", "is unknown"),
        ("v5e:4x4*0", "is unknown"),
        ("cpu:4*4", "is unknown"),
        ("cpu:2x4", "give the number of devices, like cpu:8"),
        ("v6e:4x4x4", "v6e has 2 axes"),
        ("b200:2x4", "give the number of devices, like b200:8"),
        ("cpu:9", "jax runs already, with 8 CPU devices"),
    ],
)
def test_topologies_that_are_none(name, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=re.escape(message)):
        topology.open_topology(name)


@pytest.mark.parametrize(
    ("name", "command"), [("v5e:4x4", "pip install 'jax[tpu]'"), ("h100:8", "jax[cuda13]")]
)
def test_compilers_that_are_not_installed(name, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(command)):
        topology.open_topology(name)


def run(*arguments: str):
    command = [sys.executable, "-m", "gcl_jax.plan", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_the_command(config_file, tmp_path):
    """With a number of devices of its own, whatever this process has."""
    flags = [f"--config={config_file}", "--topology=cpu:4", f"--json={tmp_path / 'plan.json'}"]
    done = run(*flags, "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "cpu:4: 4 devices, mesh data 2 x fsdp 2\nbatch 8: 2 pairs on each"
    )
    assert "loss form 'auto', tiles of 1,024\n" in done.stdout
    assert "query query (text); document image (image), title (text)" in done.stdout
    assert re.search(r"^fits: needs [\d.]+ of", done.stdout, re.MULTILINE)
    assert re.search(r"^as compiled it computes [\d.e-]+ TFLOP", done.stdout, re.MULTILINE)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert found["sent"] == sum(c["sent"] for c in found["collectives"]) > 0

    done = run(*flags, "--config.optim.batch_size=6")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: config.optim.batch_size=6 is no multiple of the 4 devices\n")


def test_the_tables_cases_are_configurations():
    case = plans.Case("ViT-L-14", "v5e:16x16", 32768, fsdp=16, chunks=2, form="ring")
    cfg, data = planner.resolve(plans.config(case))
    assert data.kinds["document"] == {"image": "image"}
    assert cfg.model.vision.width == preset("ViT-L-14").vision.width
    assert (cfg.mesh.fsdp, cfg.optim.grad_cache_chunks, cfg.loss.form) == (16, 2, "ring")


def test_tables_are_resumed_and_limited(tmp_path, monkeypatch, capsys):
    """What is there of the same commit stays; a row without a compiler is passed over, and comes
    next time."""
    out, asked = tmp_path / "plans.json", []

    def in_own_process(row):
        asked.append(row.name)
        return {"failed": "no compiler"} if "h100" in row.name else {"seconds": 30}

    def call(commit, *flags):
        asked.clear()
        monkeypatch.setattr(plans, "commit", lambda: commit)
        monkeypatch.setattr(plans, "in_own_process", in_own_process)
        monkeypatch.setattr(sys, "argv", ["plans.py", f"--out={out}", "--tables=chips", *flags])
        plans.main()
        return len(asked), capsys.readouterr().out.splitlines()[0]

    few = ("--chips=v5e,h100", "--models=ViT-B-32")
    assert call("a", *few) == (2, f"2 of {len(plans.rows())} rows, about 2 minutes of a core")
    assert call("a", *few)[0] == 1
    assert call("b", *few) == (2, f"2 of {len(plans.rows())} rows, about 1 minutes of a core")
    assert call("b")[0] == len(plans.DEVICES) * len(plans.FIRST) - 1
    assert {row["commit"] for row in json.loads(out.read_text()).values()} == {"b"}
    with pytest.raises(SystemExit):
        call("b", "--chips=v5")
    assert "--chips=v5: there are v4, v5e, v5p" in capsys.readouterr().err


def test_vit_b32_on_a_tpu_slice():
    """The whole step, sharded 4 x 4, of the TPU's own compiler; with less effort than a run's."""
    tpu_mesh()  # skips without libtpu
    target = topology.open_topology("v5e:4x4")
    target = target._replace(compiler_options=topology.QUICK)
    cfg, data = planner.resolve(plans.config(plans.Case("ViT-B-32", "v5e:4x4", 4096, fsdp=4)))
    plan = planner.compile_plan(cfg, data, target)
    assert plan.fits
    assert plan.parameters == pytest.approx(4 * 151.28e6 / 4, rel=0.01)
    assert 0.5 < plan.temporaries / 2**30 < 4.0
    sent = {part: sum(c.sent for c in plan.collectives if c.part == part) for part in PARTS}
    # Documents in bfloat16, as the towers compute, and their gradients in float32.
    assert sent["loss"] == pytest.approx(6 * 4096 * 512 * 15 / 16, rel=0.05)
    # In bfloat16, each tower's layers once forward and once backward; and what is looked up in the
    # table of tokens.
    layers = 2 * 2 * (85.0e6 + 37.8e6)
    assert 1 < sent["parameters"] / (layers * 3 / 4) < 1.05
    looked_up = 2 * (4096 / 16) * 77 * 512
    assert sent["activations"] == pytest.approx(2 * looked_up * 3 / 4, rel=0.05)
