"""The configurations of the paper's table: whole, without arrays; with reduced towers, for real."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh
from safetensors.numpy import save_file

from benchmarks import marqo_gs as plan
from gcl_jax import sharding
from gcl_jax.config import TrainConfig
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.losses.multi_field import product_dtype
from gcl_jax.plan import planner
from gcl_jax.plan.planner import bytes_per_device
from gcl_jax.port.convert import to_state_dict
from gcl_jax.port.hugging_face import is_hub_id
from gcl_jax.search import __main__ as search
from gcl_jax.train.flags import read_config
from gcl_jax.train.loop import train
from gcl_jax.validation import validate
from tests.test_ground_truth import write_ground_truth
from tests.test_prepare import tree
from tests.test_sources import SPLITS, marqo, rows_of, write_layout_1, write_layout_2
from tests.towers import random_params, save_wordpiece

TEXT_ONLY = ("e5_large_v2", "xlm_roberta_vit_b32")
# The keys that a checkpoint of each model has, and the file that it lies in.
PRETRAINED = {
    "vit_b32": ("open_clip", "open_clip_model.safetensors"),
    "vit_l14": ("open_clip", "open_clip_model.safetensors"),
    "clip_vit_l14": ("open_clip", "open_clip_model.safetensors"),
    "e5_large_v2": ("bert", "model.safetensors"),
    "xlm_roberta_vit_b32": ("open_clip_custom", "open_clip_model.safetensors"),
}
configs = pytest.mark.parametrize("name", plan.NAMES)


@configs
def test_the_authors_settings(name):
    """method: Evaluation protocol, the product's defaults."""
    cfg = plan.load(name)
    validate(cfg)
    optim = cfg.optim
    assert (optim.lr, optim.weight_decay, optim.betas) == (2e-5, 0.02, (0.9, 0.98))
    assert (optim.eps, optim.epochs, optim.batch_size) == (1e-6, 20, 8 * 256)
    assert cfg.model.text.context_length == 77
    assert (cfg.model.dtype, cfg.model.param_dtype) == ("bfloat16", "float32")
    assert product_dtype(cfg) == "bfloat16"
    assert cfg.data.query_fields == {"query": 1.0}
    text_only = name in TEXT_ONLY
    fields = {"title": 1.0} if text_only else {"image": 0.9, "title": 0.1}
    assert cfg.data.document_fields == fields
    assert cfg.eval.splits == tuple(SPLITS)
    assert cfg.data.train_split == "in_domain"
    assert cfg.loss.score_to_weight == ("constant" if name == "clip_vit_l14" else "inverse")
    assert is_hub_id(cfg.init_from)
    ending = "_text" if text_only else ""
    assert cfg.data.store == f"stores/marqo_gs_full_10m{ending}"
    assert plan.load(name, "wfash_1m").data.store == f"stores/marqo_gs_wfash_1m{ending}"


def test_e5_has_prefixes_and_mean_pooling():
    text = plan.load("e5_large_v2").model.text
    assert (text.query_prefix, text.document_prefix) == ("query: ", "passage: ")
    assert text.pool == "mean"


def test_a_variant_is_named_behind_a_colon():
    """On the command line, where the file is looked for first."""
    cfg = read_config(f"{plan.CONFIGS}/vit_b32.py:fashion_5m")
    assert cfg.data.store == "stores/marqo_gs_fashion_5m"


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)], ids="{0[0]}x{0[1]}".format)
@configs
def test_full_size_without_arrays(name, shape):
    """The whole training step is traced and lowered for eight devices; a state's share on each."""
    cfg, mesh = plan.load(name), make_cpu_mesh(*shape)
    cfg, data = planner.resolve(cfg)
    lowered, state, _ = planner.lower(cfg, data, mesh)
    after, metrics = lowered.out_info
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), state, after)
    assert all(jax.tree.leaves(same))
    assert metrics["loss"].shape == ()

    # Parameters, of which frozen ones have no moments, in float32; over fsdp all but small change.
    whole = bytes_per_device(planner.abstract_training(cfg, make_cpu_mesh(8, 1), data.pairs)[0])
    frozen = state.params["visual"] if cfg.optim.freeze else {}
    count = lambda tree: sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(tree))
    numbers = 3 * count(state.params) - 2 * count(frozen)
    assert whole == pytest.approx(4 * numbers, rel=1e-5)
    assert bytes_per_device(state) == pytest.approx(whole / shape[1], rel=0.01)


@configs
def test_the_page_has_the_figures_of_the_program(name):
    """docs/reproduce.md quotes `benchmarks/marqo_gs.py`."""
    page = (Path(plan.__file__).parents[1] / "docs" / "reproduce.md").read_text("utf-8")
    (line,) = re.findall(rf"^\| `{name}` \|.* M \|.*$", page, re.MULTILINE)
    assert line == plan.as_line(plan.plan(name, plan.H100, 0.2))


def reduced(name: str, folder: Path) -> TrainConfig:
    """The configuration with towers of the same families, small, and a pretrained start in
    `folder`; two steps of eight pairs."""
    cfg = plan.load(name)
    model = cfg.model
    if model.vision:
        small = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
        model.vision = dataclasses.replace(model.vision, **small)
    small = {"context_length": 12, "width": 32, "heads": 2, "layers": 2}
    if model.text.family == "bert":
        tokenizer = save_wordpiece(folder / "tokenizer")
        small |= {"vocab_size": 90, "max_positions": 16, "pad_id": 0, "tokenizer": tokenizer}
    model.text = dataclasses.replace(model.text, **small)
    model.embed_dim = 32
    family, file = PRETRAINED[name]
    save_file(to_state_dict(random_params(model), model, family), folder / file)
    cfg.init_from = str(folder)
    cfg.data.num_workers = 0
    cfg.optim.steps, cfg.optim.batch_size, cfg.optim.warmup_steps = 2, 8, 0
    cfg.eval.batch_size = 16
    return cfg


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """{layout: {"all" or "text": store}}, of which the second has texts alone, as text-only models
    take them: documents without a title are skipped."""
    root = tmp_path_factory.mktemp("marqo_gs")
    one = write_ground_truth(write_layout_1(root / "one", "images/{0}.png"))
    two = write_ground_truth(write_layout_2(root / "two"))
    for _, _, file in SPLITS.values():  # document 3 is not judged: it has no title
        for folder in (one, two):
            path = folder / f"{file}_gt_test.json"
            judged = json.loads(path.read_text())
            kept = {q: {d: g for d, g in docs.items() if d != "p03"} for q, docs in judged.items()}
            path.write_text(json.dumps({q: docs for q, docs in kept.items() if docs}))
    made = {}
    for layout, folder in ((1, one), (2, two)):
        text = ["--document_fields=title", "--on_error=skip"]
        made[layout] = {
            "all": marqo(root / f"store_{layout}" / "gs", folder),
            "text": marqo(root / f"store_{layout}" / "gs_text", folder, *text),
        }
    return made


@pytest.mark.parametrize("kind", ["all", "text"])
def test_both_layouts_give_one_store(stores, kind):
    """Ids, fields, scores, splits, corpora and ground truth, byte for byte; only the notes about
    the source, and their checksums, are each layout's own."""
    trees = [tree(stores[layout][kind].directory) for layout in (1, 2)]
    differing = {n for n in trees[0] | trees[1] if trees[0].get(n) != trees[1].get(n)}
    assert differing <= {"store.json", "checksums.sha256", "skipped.jsonl"}
    one, two = (stores[layout][kind].info for layout in (1, 2))
    for key in ("splits", "query_fields", "document_fields"):
        assert one[key] == two[key]


# The stores are the same byte for byte; one model of each kind is run on the second as well.
RUNS = [("vit_b32", 1), ("e5_large_v2", 2)]
SLOW = [(name, 1) for name in plan.NAMES if name != "vit_b32"] + [("vit_b32", 2)]


@pytest.mark.parametrize(
    ("name", "layout"), RUNS + [pytest.param(*run, marks=pytest.mark.slow) for run in SLOW]
)
def test_reduced_towers_train_evaluate_and_search(
    name, layout, stores, tmp_path, monkeypatch, capsys
):
    (tmp_path / "pretrained").mkdir()
    cfg = reduced(name, tmp_path / "pretrained")
    store = stores[layout]["text" if name in TEXT_ONLY else "all"]
    cfg.data.store = str(store.directory)
    validate(cfg)
    # Meshes have tests of their own; for one device less is compiled.
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_cpu_mesh(1, 1))
    run = tmp_path / "run"
    train(cfg, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert np.isfinite(rows[-1]["loss"])

    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={run}"])
    evaluate.main()
    for split in SPLITS:
        report = json.loads((run / "eval" / f"{split}.json").read_text())
        assert report["ground_truth"] == "test"
        assert 0 < report["summary"]["NDCG@10"] <= 1

    capsys.readouterr()
    asked, pictures = rows_of("zero_shot")[0]["query"], tmp_path / "found"
    more = ["--json", "--top_k=12", f"--images={pictures}"]
    monkeypatch.setattr(sys, "argv", ["search", f"--workdir={run}", asked, *more])
    search.main()
    answer = json.loads(capsys.readouterr().out)
    assert {result["id"] for result in answer["results"]} == set(store.documents.ids)
    assert len(list(pictures.iterdir())) == (0 if name in TEXT_ONLY else 12)
