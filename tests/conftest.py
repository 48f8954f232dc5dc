"""Eight CPU devices, and the tiny store and configuration that the tests share."""

import os

import processes

# Read once, when jax first looks for devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *processes.XLA_FLAGS,
    ]
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import copy
import gc
import io
import resource

import jax
import numpy as np
import parity
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh
from PIL import Image

from gcl_jax.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    described,
    value,
)
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.prepare.source import Source, Split
from gcl_jax.prepare.stores import write_store
from gcl_jax.sharding import BATCH_AXES
from tests.buckets import bucket, bucket_server, s3_bucket  # noqa: F401

# Tracing makes millions of small objects, few of them in circles: left to itself, the search for
# circles is a tenth of the tests.
gc.set_threshold(100_000, 20, 100)

# (data, fsdp), and slices where there are several.
MESHES = ((1, 1), (8, 1), (4, 2), (2, 2, 2))

# What takes a minute or more on a core.
LONGEST = (
    "test_docs.py",
    "test_site.py",
    "test_train.py",
    "test_distributed.py",
    "test_parity_models.py",
    "test_finetune.py",
    "test_gradient_cache.py",
    "test_sharding.py",
    "test_loss_memory.py",
)


def pytest_collection_modifyitems(items):
    """Long files first, so that one of several workers does not end minutes after the others."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def make_cpu_mesh(data: int, fsdp: int, slices: int = 1) -> Mesh:
    """A mesh over the first slices * data * fsdp of the eight devices."""
    shape, types = (slices, data, fsdp), (AxisType.Auto,) * 3
    devices = jax.devices()[: slices * data * fsdp]
    return jax.make_mesh(shape, BATCH_AXES, axis_types=types, devices=devices)


@pytest.fixture(params=MESHES, ids=lambda shape: "x".join(map(str, shape)))
def mesh(request) -> Mesh:
    """A test that asks for it runs on all of `MESHES`, or on those of
    `parametrize("mesh", [...], indirect=True)`."""
    return make_cpu_mesh(*request.param)


def make_tiny_config() -> TrainConfig:
    """A fresh configuration of the smallest towers; set `data.store` to use `tiny_store`."""
    return TrainConfig(
        model=ModelConfig(
            embed_dim=16,
            vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=2, head_width=8),
            text=TextConfig(context_length=8, width=16, heads=2, layers=1),
        ),
        data=DataConfig(
            train_split="in_domain",
            query_fields={"query": 1.0},
            document_fields={"image": 0.5, "title": 0.5},
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, steps=4, batch_size=8),
    )


@pytest.fixture
def tiny_config() -> TrainConfig:
    return make_tiny_config()


class TinySource(Source):
    """24 documents and 8 queries; four splits of 4 queries, each with 6 of 12 documents.

    Document 3 has no image, document 5 no title.
    """

    def __init__(self):
        self.query_fields = {"query": "text"}
        self.document_fields = {"image": "image", "title": "text"}

    def documents(self):
        for i in range(24):
            image = b"" if i == 3 else png(np.random.default_rng(i))
            yield {"id": f"d{i:02}", "image": image, "title": "" if i == 5 else f"thing {i}"}

    def queries(self):
        return ({"id": f"q{i}", "query": f"find {i}"} for i in range(8))

    def splits(self):
        def pairs(queries, documents):
            query = np.repeat(queries, 6)
            document = documents[(query + np.tile(np.arange(6), 4)) % 12]
            score = np.tile(100 - 10 * np.arange(6), 4)
            return Pairs(
                query.astype(np.int32), document.astype(np.int32), score.astype(np.float32)
            )

        known, new = np.arange(4), np.arange(4, 8)
        first, second = self.corpora().values()
        return {
            "in_domain": Split(pairs(known, first), "known"),
            "novel_query": Split(pairs(new, first), "known"),
            "novel_document": Split(pairs(known, second), "new"),
            "zero_shot": Split(pairs(new, second), "new"),
        }

    def corpora(self):
        return {"known": np.arange(12), "new": np.arange(12, 24)}

    def provenance(self):
        return {"source": "tests"}


def png(rng: np.random.Generator) -> bytes:
    """A 20 x 20 image of noise, encoded."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> RankedStore:
    """`TinySource`, written once; open it elsewhere by its `directory`."""
    return write_store(TinySource(), tmp_path_factory.mktemp("stores") / "tiny")


@pytest.fixture
def full_disk():
    """A context in which no file can have more than 4 KiB."""

    @contextlib.contextmanager
    def full():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory) -> None:
    """What takes a while to compile is compiled once, by whichever test or process comes first."""
    base = tmp_path_factory.getbasetemp()  # each worker's own, in one for all
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    for environment in (os.environ, processes.ENVIRONMENT):
        environment["JAX_COMPILATION_CACHE_DIR"] = folder
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    compilation_cache.reset_cache()  # jax looks at its settings once


@pytest.fixture
def config_file(tiny_config, tiny_store, tmp_path):
    """A config file of three training steps, with augmentation and an evaluation."""
    cfg = tiny_config
    cfg.data.store, cfg.data.augmentation = str(tiny_store.directory), "crop_flip"
    cfg.optim.steps, cfg.checkpoint.every, cfg.log_every = 3, 2, 1
    cfg.eval.every, cfg.eval.splits, cfg.eval.batch_size = 2, ("in_domain",), 16
    return processes.write_config(cfg, tmp_path / "tiny.py")


def make_tiny_batch(cfg: TrainConfig) -> dict:
    """One training batch for `cfg`: random pixels and ids, some fields missing. No split has these
    pairs, so `cfg` gets the targets that need none."""
    cfg.loss.targets = "diagonal"
    rng = np.random.default_rng(0)
    n, text = cfg.optim.batch_size, cfg.model.text
    tokens = lambda: rng.integers(1, text.vocab_size, (n, text.context_length)).astype(np.int32)
    size = cfg.model.vision.image_size
    return {
        "query": {"query": tokens()},
        "document": {
            "image": rng.integers(0, 256, (n, size, size, 3), np.uint8),
            "title": tokens(),
        },
        "query_present": {"query": np.ones(n, bool)},
        "document_present": {"image": np.arange(n) != 1, "title": np.arange(n) != 3},
        "weight": rng.uniform(0.1, 1, n).astype(np.float32),
        "query_id": rng.integers(n, size=n).astype(np.int32),
        "document_id": rng.integers(n, size=n).astype(np.int32),
    }


@pytest.fixture
def tiny_batch(tiny_config) -> dict:
    return make_tiny_batch(tiny_config)


def leave_out_images(cfg: TrainConfig, batch: dict) -> None:
    """For what is the same of every tower and field: a step of texts alone compiles in half the
    time."""
    cfg.model.vision, cfg.data.document_fields = None, {"title": 1.0}
    for name in ("document", "document_present"):
        del batch[name]["image"]


@pytest.fixture
def compiled_once(monkeypatch):
    """The trainings of a test are of one configuration and share their step: to trace it is most of
    a short training."""
    from gcl_jax.train import setup

    make, made = setup.make_train_step, []

    def make_once(cfg, tx, mesh):
        if not made:
            made.extend([copy.deepcopy(cfg), mesh, make(cfg, tx, mesh)])
        keys = (one.key for one in described() if not one.key.startswith(("eval.", "checkpoint.")))
        for key in keys:  # what a run leaves open is spelled out where it goes on
            assert value(made[0], key) in (value(cfg, key), None), key
        assert mesh == made[1]
        return made[2]

    monkeypatch.setattr(setup, "make_train_step", make_once)


@pytest.fixture(scope="session")
def open_clip():
    """The module; tests that ask for it, or for what builds on it, need the [parity] extra."""
    try:
        return parity.import_open_clip()
    except ImportError:
        pytest.skip("needs the [parity] extra")


@pytest.fixture(scope="session")
def transformers(open_clip):
    """The module, with torch beside it."""
    import transformers

    return transformers
