"""`import gcl_jax`: what its names do, on values, and what they say when they cannot."""

import dataclasses
import io
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image
from test_search import HostileSource, untrained_run

import gcl_jax
from gcl_jax import config
from gcl_jax.config import ModelConfig, TextConfig
from gcl_jax.embed import __main__ as embed
from gcl_jax.errors import UserError
from gcl_jax.models import clip
from gcl_jax.port.pretrained import export_pretrained
from gcl_jax.runs import load_run
from gcl_jax.search.searcher import SearchIndex


class ThreeFields(HostileSource):
    """Its documents have two texts, and its queries may be images too."""

    def __init__(self):
        super().__init__()
        self.document_fields = {"image": "image", "title": "text", "brand": "text"}
        self.query_fields = {"query": "text", "photo": "image"}

    def documents(self):
        for i, document in enumerate(super().documents()):
            yield document | {"brand": f"brand {i % 5}" if i % 2 else ""}

    def queries(self):
        pictures = [document["image"] for document in super().documents()]
        for i, query in enumerate(super().queries()):
            yield query | {"photo": pictures[i] if i > 4 else b""}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = untrained_run(ThreeFields(), tmp_path_factory.mktemp("front"))
    cfg = config.load(folder / "config.json")
    cfg.data.document_fields = {"image": 0.7, "title": 0.2, "brand": 0.1}
    cfg.data.query_fields = {"query": 0.6, "photo": 0.4}
    cfg.model.text.query_prefix, cfg.model.text.document_prefix = "query: ", "passage: "
    config.save(cfg, folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return gcl_jax.load(workdir)


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(ThreeFields().documents())


@pytest.fixture(scope="module")
def png(documents) -> bytes:
    return documents[0]["image"]


@pytest.fixture(scope="module")
def written(workdir, tmp_path_factory) -> Path:
    """The folder of both sides that `gcl_jax.embed` writes, of each field too."""
    out = tmp_path_factory.mktemp("written") / "vectors"
    with pytest.MonkeyPatch.context() as patch:
        args = ["embed", f"--workdir={workdir}", f"--out={out}", "--side=both", "--per_field"]
        patch.setattr(sys, "argv", args)
        embed.main()
    return out


def check(embeddings: np.ndarray, expected: np.ndarray) -> None:
    assert embeddings.dtype == np.float32
    assert embeddings.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


NOTEBOOK = """
import numpy as np

import gcl_jax

gcl_jax.train(config, workdir)

model = gcl_jax.load("runs/demo")
texts = model.encode_text(["find 3", "find 4"])
images = model.encode_image(["cat.png"])
embeddings = model.encode(documents)

index = gcl_jax.Index(embeddings, ids=[d["id"] for d in documents])
scores, ids = index.search(texts, k=5)

run = {q: dict(zip(found, s)) for q, found, s in zip(["q3", "q4"], ids.tolist(), scores.tolist())}
metrics = gcl_jax.evaluate_run(qrels, run)

q, d, scale, weights = texts, embeddings[[3, 4]], 10.0, np.array([1.0, 0.5], "f4")
loss = gcl_jax.gcl_loss(q, d, scale, weights)
"""


def test_a_notebook(tiny_config, tiny_store, documents, png, tmp_path, monkeypatch):
    """From training to the metrics of a search, and the loss of what was found."""
    monkeypatch.chdir(tmp_path)
    Path("cat.png").write_bytes(png)
    documents = [{k: v for k, v in d.items() if k != "brand"} for d in documents]
    tiny_config.data.store, tiny_config.optim.steps = str(tiny_store.directory), 2
    qrels = {"q3": {"d03": 100, "d04": 90}, "q4": {"d04": 100}}
    cells = {"documents": documents, "config": tiny_config, "workdir": "runs/demo", "qrels": qrels}
    exec(NOTEBOOK, cells)
    assert cells["texts"].shape == (2, 16)
    assert cells["images"].shape == (1, 16)
    assert cells["embeddings"].shape == (24, 16)
    assert cells["ids"].shape == (2, 5)
    assert cells["metrics"]["NDCG@10"].shape == (2,)
    logits = 10 * cells["q"] @ cells["d"].T
    chosen = [logits - np.log(np.exp(logits).sum(axis, keepdims=True)) for axis in (0, 1)]
    expected = -(np.diag(sum(chosen)) * [1.0, 0.5]).sum() / 4
    np.testing.assert_allclose(cells["loss"], expected, rtol=1e-5)


def test_importing_loads_nothing_and_dir_shows_the_public_names(tmp_path):
    code = (
        "import sys, gcl_jax; print(*dir(gcl_jax)); "
        "heavy = {'jax', 'numpy', 'tensorflow_datasets', 'PIL', 'grain'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "print(gcl_jax.losses.__name__, gcl_jax.train.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, packages = done.stdout.splitlines()
    assert set(names.split()) == {*gcl_jax.__all__, "__version__"}
    assert packages == "gcl_jax.losses gcl_jax.train"


def test_public_names_are_there_and_say_what_they_are():
    assert 12 <= len(gcl_jax.__all__) <= 20
    assert gcl_jax.__version__ == "0.2.0"
    for name in gcl_jax.__all__:
        thing = getattr(gcl_jax, name)
        assert len((thing.__doc__ or "").strip()) > 12, name
    assert set(gcl_jax._HOMES) <= set(gcl_jax.__all__)
    with pytest.raises(AttributeError, match="module 'gcl_jax' has no attribute 'nothing'"):
        _ = gcl_jax.nothing
    assert not hasattr(gcl_jax, "__wrapped__")


def test_documents_are_embedded_as_the_command_does(model, documents, written):
    expected = np.load(written / "documents" / "embeddings.npy")
    check(model.encode(documents), expected)
    check(model.encode(documents[:5]), expected[:5])
    check(model.encode(d for d in documents[3:4]), expected[3:4])
    check(model.encode(documents[7]), expected[7])
    missing = [{**d, "brand": d["brand"] or None, "image": d["image"] or None} for d in documents]
    check(model.encode(missing), expected)
    left_out = [{k: v for k, v in d.items() if v} for d in documents]
    left_out[0]["brand"] = float("nan")
    check(model.encode(left_out), expected)


def test_queries_are_embedded_as_the_command_does(model, written):
    queries = list(ThreeFields().queries())
    check(model.encode(queries, side="query"), np.load(written / "queries" / "embeddings.npy"))


def test_texts_and_images_are_the_fields_alone(model, documents, written):
    fields = written / "documents" / "fields"
    titles = [d["title"] for d in documents]
    kept = [i for i, title in enumerate(titles) if title]
    expected = np.load(fields / "title.npy")[kept]
    check(model.encode_text([titles[i] for i in kept], side="document"), expected)
    check(model.encode_text(titles[0], side="document"), expected[0])
    assert abs(model.encode_text(titles[0]) - expected[0]).max() > 1e-4, "another prefix"
    text = np.load(written / "queries" / "fields" / "query.npy")
    check(model.encode_text((q["query"] for q in ThreeFields().queries()), side="query"), text)
    check(model.encode_text(np.array(["find 0", "find 1"])), text[:2])

    expected = np.load(fields / "image.npy")
    kept = [i for i, d in enumerate(documents) if d["image"]]
    check(model.encode_image([documents[i]["image"] for i in kept]), expected[kept])


def test_images_may_be_paths_or_pixels(model, documents, written, tmp_path):
    expected = np.load(written / "documents" / "fields" / "image.npy")[[0, 1, 2, 4]]
    path = tmp_path / "0.png"
    path.write_bytes(documents[0]["image"])
    opened = Image.open(io.BytesIO(documents[1]["image"]))
    pixels = np.asarray(Image.open(io.BytesIO(documents[2]["image"])))
    given = [path, opened, pixels, documents[4]["image"]]
    check(model.encode_image(given), expected)
    check(model.encode_image([str(path)]), expected[:1])
    for image, row in zip(given, expected, strict=True):
        check(model.encode_image(image), row)
    check(model.encode_image(np.stack([pixels] * 2)), expected[[2, 2]])
    check(model.encode_image(Image.fromarray(pixels)), expected[2])
    document = {"image": path, "title": documents[0]["title"]}
    check(model.encode(document), np.load(written / "documents" / "embeddings.npy")[0])


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA", "CMYK", "L", "1"])
def test_a_picture_in_memory_is_embedded_as_its_file(model, png, mode):
    picture = Image.open(io.BytesIO(png)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    file = io.BytesIO()
    picture.save(file, "TIFF" if mode == "CMYK" else "PNG")
    check(model.encode_image(picture), model.encode_image(file.getvalue()))


def test_odd_sizes_and_nothing(model, written):
    assert model.encode([]).shape == model.encode_text([]).shape == (0, 16)
    assert model.encode_image([]).shape == model.encode_image(np.zeros((0, 9, 9, 3))).shape
    texts = [f"find {i % 8}" for i in range(21)]
    expected = np.load(written / "queries" / "fields" / "query.npy")[np.arange(21) % 8]
    for n in (1, 2, 7, 8, 9, 21):
        check(model.encode_text(texts[:n]), expected[:n])


def test_fewer_dimensions(workdir, documents):
    short = gcl_jax.load(str(workdir), "newest", embed_dim=4)
    run = load_run(workdir, 4)
    expected = SearchIndex(run, np.arange(24))._documents
    assert short.embed_dim == 4
    check(short.encode(documents), expected)
    assert "4 dimensions" in repr(short)


def test_index_answers_with_ids(model, documents):
    embeddings = model.encode(documents)
    ids = [document["id"] for document in documents]
    queries = model.encode_text(["find 3", "find 4"])
    index = gcl_jax.Index(embeddings, ids=ids)
    found = index.search(queries, k=5)
    order = np.argsort(-(queries @ embeddings.T), axis=1, kind="stable")[:, :5]
    assert found.ids.tolist() == [[ids[row] for row in ranking] for ranking in order]
    assert found.ids.tolist() == found[1].tolist()
    np.testing.assert_allclose(found.scores, np.take_along_axis(queries @ embeddings.T, order, 1))
    scores, rows = gcl_jax.Index(embeddings).search(queries, k=99)
    assert scores.shape == rows.shape == (2, 24), "as many as there are"
    np.testing.assert_array_equal(rows[:, :5], order)
    alone = index.search(queries[1], k=5)
    assert alone.ids.tolist() == found.ids[1].tolist()
    assert (len(index), index.search(queries).ids.shape) == (24, (2, 10))
    assert repr(index) == "<gcl_jax.Index of 24 documents, 16 dimensions, float32>"
    pairs = gcl_jax.Index(embeddings[:2], ids=[("a", 1), ("b", 2)]).search(embeddings[:1], 1)
    assert pairs.ids.tolist() == [[("a", 1)]], "whatever an id is, it comes back"
    on_jax = gcl_jax.Index(jax.numpy.asarray(embeddings)).search(jax.numpy.asarray(queries), 5)
    np.testing.assert_array_equal(on_jax.ids, order)
    assert gcl_jax.Index(model.encode([])).search(queries, 3).ids.shape == (2, 0)


def test_a_run_without_its_store_still_embeds(workdir, documents, written, tmp_path):
    copied = shutil.copytree(workdir, tmp_path / "run")
    cfg = config.load(copied / "config.json")
    cfg.data.store = str(tmp_path / "gone")
    config.save(cfg, copied / "config.json")
    model = gcl_jax.load(copied)
    expected = np.load(written / "queries" / "fields" / "query.npy")
    check(model.encode_text([f"find {i}" for i in range(8)]), expected)
    with pytest.raises(UserError, match=r"gone, is gone: .* gcl_jax.load\(..., image_fields="):
        model.encode(documents)
    model = gcl_jax.load(copied, image_fields=["image", "photo"])
    check(model.encode(documents), np.load(written / "documents" / "embeddings.npy"))


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> Path:
    cfg, _, params, _, _ = load_run(workdir)
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_pretrained(params, cfg.model, folder, "safetensors")
    return folder


def test_a_pretrained_folder(exported, model, documents, written):
    weights = {"image": 0.7, "title": 0.2, "brand": 0.1}
    pretrained = gcl_jax.from_pretrained(exported, document_fields=weights)
    check(pretrained.encode(documents), np.load(written / "documents" / "embeddings.npy"))
    check(pretrained.encode_text("find 3"), model.encode_text("find 3"))
    for given, message in (
        (
            {"document_fields": ["image"]},
            "document_fields must be a dict",
        ),
        ({"document_fields": {"image": "x"}}, "must be a dict of names and weights"),
        ({"image_fields": "image"}, "image_fields must be a list of names, not str 'image'"),
        ({"embed_dim": "8"}, "embed_dim=8 is not from 1 to 16"),
        ({"context_length": -3}, "context_length=-3 must be"),
    ):
        with pytest.raises(UserError, match=message):
            gcl_jax.from_pretrained(exported, **given)
    equal = gcl_jax.from_pretrained(str(exported), embed_dim=8)
    assert equal.embed_dim == 8
    both = equal.encode([{"image": documents[0]["image"], "name": "thing 0"}])
    parts = equal.encode_image(documents[0]["image"]) + equal.encode_text("thing 0", "document")
    check(both[0], parts / np.linalg.norm(parts))


def test_a_weights_file_needs_the_name_of_its_model(exported, model, png):
    (weights,) = exported.glob("*.safetensors")
    with pytest.raises(UserError, match="name its model"):
        gcl_jax.from_pretrained(weights)
    with pytest.raises(UserError, match="model 'ViT-B-33' is unknown"):
        gcl_jax.from_pretrained(weights, model="ViT-B-33")
    with pytest.raises(UserError, match="do not fit the model"):
        gcl_jax.from_pretrained(weights, model="all-MiniLM-L6-v2")


def test_a_model_without_image_tower(tmp_path, png):
    cfg = ModelConfig(
        embed_dim=16, vision=None, text=TextConfig(context_length=8, width=16, heads=2, layers=1)
    )
    params = clip.init_params(cfg, jax.random.key(0))
    export_pretrained(params, cfg, tmp_path / "texts", "safetensors")
    model = gcl_jax.from_pretrained(tmp_path / "texts")
    assert model.encode_text(["a"]).shape == (1, 16)
    for refused in (lambda: model.encode_image(png), lambda: model.encode({"image": png})):
        with pytest.raises(UserError, match="no image tower"):
            refused()


class Frame:
    """What says of itself that it is of pandas."""

    def to_dict(self):
        raise AssertionError("nobody asked")


EYE = jnp.eye(2)


def with_extension(cfg):
    return dataclasses.replace(cfg, extensions=("nosuch",))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, png: gcl_jax.load("no/such/run"), "no/such/run is no directory of a training"),
        (lambda m, png: gcl_jax.load("."), "config.json not found"),
        (lambda m, png: gcl_jax.load(None), "workdir must be a path, not None"),
        (lambda m, png: gcl_jax.from_pretrained("no/such"), "no/such"),
        (lambda m, png: gcl_jax.from_pretrained(7), "source must be a path, not int 7"),
        (lambda m, png: gcl_jax.load("x", image_fields="image"), "x is no directory"),
        (lambda m, png: gcl_jax.open_store(None), "a store is named by its path"),
        (lambda m, png: gcl_jax.open_store("no/such"), "no/such holds no store"),
        (lambda m, png: gcl_jax.preset(None), "model 'None' is unknown"),
        (lambda m, png: gcl_jax.train(None, "x"), "config is a NoneType"),
        (lambda m, png: gcl_jax.train(m.cfg, ""), "workdir='' must be the path of a directory"),
        (lambda m, png: gcl_jax.train(m.cfg, None), "workdir=None must be the path of a direc"),
        (lambda m, png: gcl_jax.train(with_extension(m.cfg), "x"), "extension nosuch .* imported"),
        (lambda m, png: gcl_jax.load(""), "workdir is empty"),
        (lambda m, png: gcl_jax.from_pretrained("ViT-B-32"), "architecture, not of weights"),
        (lambda m, png: gcl_jax.METRICS.register("mine")(5), "5 is no function and no class"),
        (lambda m, png: gcl_jax.evaluate_run({"q": {"d": 1}}, {"q": {"d": 1}}, 5), "ks=5 must be"),
        (lambda m, png: gcl_jax.evaluate_run({"q": {"d": 1}}, {"q": {"d": 1}}, (0,)), "ks=.0,. m"),
        (lambda m, png: m.encode_text({"a", "b"}), "texts must be a list, not set"),
        (lambda m, png: m.encode_text(np.array("a")), "texts must be a list, not an array"),
        (lambda m, png: m.encode(Frame()), r"documents are pandas: give .to_dict"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3)), ids={1, 2}), "ids must be a list, not"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3)), mesh="x"), "mesh='x' must be a jax"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3))).search(np.ones(3), k=True), "k=True is no"),
        (lambda m, png: gcl_jax.evaluate_run(None, {}), "qrels is a NoneType"),
        (lambda m, png: m.encode_text(None), "texts must be a list, not None"),
        (lambda m, png: m.encode_text(7), "texts must be a list, not int 7"),
        (lambda m, png: m.encode_text(["a", None]), r"texts\[1\] has no text"),
        (lambda m, png: m.encode_text(["a", ""]), r"texts\[1\] has no text"),
        (lambda m, png: m.encode_text(["a", 7]), r"texts\[1\], field 'text': int 7 is no text"),
        (lambda m, png: m.encode_text([png]), r"texts\[0\], field 'text': bytes b.* is no text"),
        (lambda m, png: m.encode_text("a", side="left"), "side='left' must be 'query' or"),
        (lambda m, png: m.encode_image(["a sad cat"]), r"images\[0\].*: cannot read .*a sad cat"),
        (lambda m, png: m.encode_image("a\0b"), r"images\[0\].*: cannot read the image: .*null"),
        (lambda m, png: m.encode_image([png, b"GIF89a"]), r"'images\[1\]'.*: unreadable image"),
        (lambda m, png: m.encode_image([png, png[:99]]), r"'images\[1\]'.*: unreadable image"),
        (lambda m, png: m.encode_image([b""]), r"images\[0\] has no image"),
        (lambda m, png: m.encode_image([png, None]), r"images\[1\] has no image"),
        (lambda m, png: m.encode_image({"image": png}), "images must be a list, not dict"),
        (
            lambda m, png: m.encode_image([np.zeros((9, 9, 3))]),
            r"images\[0\].*: an array float64 \(9, 9, 3\) is no image: give a path, .* uint8",
        ),
        (lambda m, png: m.encode_image(Image.new("I;16", (9, 9))), "16-bit image"),
        (lambda m, png: m.encode_image("/dev/zero"), "not a regular file"),
        (lambda m, png: m.encode_image(np.zeros((9, 9), np.uint8)), r"\(9, 9\) is no image"),
        (lambda m, png: m.encode_image(np.uint8(3)), "must be a list, not uint8"),
        (lambda m, png: m.encode_image(Image.new("RGB", (0, 4))), r"is no image"),
        (lambda m, png: m.encode_image(Image.open(io.BytesIO(png[:99]))), "unreadable image"),
        (lambda m, png: m.encode("a cat"), r"documents\[0\] is str 'a', not a dict"),
        (lambda m, png: m.encode(None), "documents must be a list, not None"),
        (lambda m, png: m.encode([{"title": "a"}, "b"]), r"documents\[1\] is str 'b', not a dict"),
        (
            lambda m, png: m.encode([{"title": "a"}, {"titel": "a"}]),
            r"documents\[1\] has a field 'titel'; the model has image, title, brand",
        ),
        (
            lambda m, png: m.encode([{"title": "a"}, {"title": "", "id": 3}]),
            r"documents\[1\] has no image or title or brand",
        ),
        (lambda m, png: m.encode([{}], side="query"), r"queries\[0\] has no query or photo"),
        (lambda m, png: m.encode({"title": png}), r"documents\[0\], field 'title': bytes"),
        (lambda m, png: m.encode({"image": "no.png"}), r"documents\[0\], field 'image': cannot"),
        (lambda m, png: gcl_jax.Index(None), "documents must be an array .* not NoneType"),
        (lambda m, png: gcl_jax.Index([[1.0, 2.0]]), "not list"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3), int)), r"not int64 of shape \(2, 3\)"),
        (lambda m, png: gcl_jax.Index(np.broadcast_to(1.0, (2**31, 1))), "one index can hold"),
        (lambda m, png: gcl_jax.Index(np.ones(3)), r"not float64 of shape \(3,\)"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3)), ids=["a"]), "1 ids for 2 documents"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3)), ids=7), "ids must be a list"),
        (lambda m, png: gcl_jax.Index(np.full((2, 3), np.nan)), "embedding 0 is not finite"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3))).search(np.ones((1, 4))), "one dimension"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3))).search("cat"), "queries must be an array"),
        (
            lambda m, png: jax.jit(gcl_jax.Index(np.ones((2, 3))).search)(np.ones((1, 3))),
            "queries are not known yet: .* outside of jax.jit",
        ),
        (lambda m, png: jax.jit(gcl_jax.Index)(np.ones((2, 3))), "documents are not known yet"),
        (
            lambda m, png: jax.jvp(gcl_jax.gcl_loss, (EYE, EYE, 1.0), (EYE, EYE, 1.0)),
            "gradients in reverse only: take jax.grad",
        ),
        (
            lambda m, png: jax.shard_map(
                gcl_jax.gcl_loss,
                mesh=jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]),
                in_specs=P(),
                out_specs=P(),
            )(EYE, EYE, 1.0),
            "call it outside of shard_map",
        ),
        (
            lambda m, png: gcl_jax.evaluate_run({"q": {"d": 1}}, {"q": {"d": np.float16(np.inf)}}),
            r"score of document 'd' is np.float16\(inf\), not a finite number$",
        ),
        (
            lambda m, png: gcl_jax.evaluate_run({"q": {"d": 1}}, {"q": {"d": EYE[0, 0]}}),
            r"Array\(1.*, not a finite number \(int, float, or one of numpy's\)",
        ),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3))).search(np.ones(3), k=-1), "k=-1 is no"),
        (lambda m, png: gcl_jax.Index(np.ones((2, 3))).search(np.ones(3), k=1.5), "k=1.5 is no"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(model, png, call, message):
    with pytest.raises(UserError, match=message) as told:
        call(model, png)
    assert "\n" not in str(told.value)
