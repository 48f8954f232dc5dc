"""Zero-shot classification and Recall@k, against open_clip and plain loops."""

import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_cpu_mesh, png
from PIL import Image
from scipy.optimize import minimize
from scipy.special import logsumexp
from test_search import HostileSource, untrained_run
from towers import SMALL, random_params

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import Pairs
from gcl_jax.embed import embedder as embedding
from gcl_jax.errors import DataError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate import classify, ranked
from gcl_jax.port.pretrained import export_pretrained
from gcl_jax.prepare.source import Split

CLASSES = ("ant lion", "bee", "cat")


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [png(np.random.default_rng(i)) for i in range(7)]


@pytest.fixture
def folder(tmp_path, pictures):
    """Class 0 has three images, one of them deeper, class 1 four, class 2 none."""
    root = tmp_path / "flowers"
    for path, picture in zip(
        (
            "ant_lion/a.png",
            "ant_lion/b.PNG",
            "ant_lion/more/c.png",
            *(f"bee/{i}.png" for i in "1234"),
        ),
        pictures,
        strict=True,
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture)
    (root / "bee" / "notes.txt").write_text("no image")
    (root / "README").write_text("no class")
    (root / "cat").mkdir()
    return root


def read(images) -> list[bytes]:
    return [x if isinstance(x, bytes) else x.read_bytes() for x in images]


def test_a_folder_is_read_as_torchvision_does(folder, pictures):
    data = classify.read_images(folder)
    assert data.classnames == list(CLASSES)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert read(data.images) == pictures
    assert data.images[2] == folder / "ant_lion/more/c.png"
    named = classify.read_images(folder, ["x", "y", "z"])
    assert named.classnames == ["x", "y", "z"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "bytes", "hugging face"])
def test_a_table_is_read(folder, pictures, kind):
    paths = [str(x.relative_to(folder)) for x in classify.read_images(folder).images]
    labels = ["ant lion"] * 3 + ["bee"] * 4
    file = folder / ("labels.csv" if kind == "csv" else "labels.parquet")
    cells = paths
    if kind == "bytes":
        cells = pictures
    elif kind == "hugging face":
        cells = [{"bytes": x, "path": None} for x in pictures]
    if kind == "csv":
        rows = [f'"{path}",{label}' for path, label in zip(paths, labels, strict=True)]
        file.write_text("\n".join(["image,label", *rows]))
    else:
        pq.write_table(pa.table({"image": cells, "label": labels}), file)
    data = classify.read_images(file)
    assert data.classnames == ["ant lion", "bee"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert read(data.images) == pictures
    assert classify.read_images(file, CLASSES).classnames == list(CLASSES)


def test_numbers_are_places_in_the_classnames(tmp_path):
    file = tmp_path / "t.csv"
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    file.write_text("image,label\na.png,2\nb.png,0\n")
    assert classify.read_images(file, CLASSES).labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="name their classes with --classnames"):
        classify.read_images(file)
    with pytest.raises(DataError, match=r"label '2' is not in --classnames"):
        classify.read_images(file, CLASSES[:2])
    file.write_text("image,label\na.png,007\nb.png,m\n")
    assert classify.read_images(file).classnames == ["007", "m"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "image,class\na,b\n", "no column 'label'; there are image, class"),
        ("t.csv", "image,label\n", "has no row"),
        ("t.csv", "", "is empty or has no header line"),
        ("t.csv", "image,label\na.png,x\n,y\n", "line 3: no image"),
        ("t.parquet", "PAR1", "not a readable parquet file"),
        ("t.txt", "image,label\na.png,x\n", "unknown format"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=message):
        classify.read_images(tmp_path / name)


def test_other_input_that_is_refused(tmp_path, folder):
    with pytest.raises(DataError, match="no such file or folder"):
        classify.read_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no subfolder with images"):
        classify.read_images(folder / "bee")
    with pytest.raises(DataError, match="2 names for the 3 folders"):
        classify.read_images(folder, ["a", "b"])
    (file := tmp_path / "templates").write_text("a photo of a {}.\n\na photo\n")
    with pytest.raises(DataError, match=r"'a photo' has no \{\}"):
        classify.read_templates(file)
    file.write_text("\n \n")
    with pytest.raises(DataError, match="has no line"):
        classify.read_templates(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no UTF-8"):
        classify.read_lines(file)
    (file := tmp_path / "t.csv").write_text("image,label\na.png,x\n")
    with pytest.raises(DataError, match=r"t\.csv, line 2: .*a\.png: no such file"):
        classify.read_images(file)


def test_accuracy_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 8)).astype(np.float32)
    classes = rng.normal(size=(9, 8)).astype(np.float32)
    labels = rng.integers(0, 8, 200)  # the last class has no image
    result = classify.accuracy(images, classes, labels)
    top, right = {1: 0, 5: 0}, {}
    for image, label in zip(images, labels, strict=True):
        cosines = [float(row @ image) for row in classes]
        rank = sum(cosine > cosines[label] for cosine in cosines)
        for k in top:
            top[k] += rank < k
        right.setdefault(int(label), []).append(rank == 0)
    recalls = {label: float(np.mean(hits)) for label, hits in right.items()}
    assert result["top1"] == pytest.approx(top[1] / 200)
    assert result["top5"] == pytest.approx(top[5] / 200)
    assert result["per_class"] == pytest.approx(recalls)
    assert result["mean_per_class_recall"] == pytest.approx(np.mean(list(recalls.values())))
    assert classify.accuracy(images, classes[:3], labels % 3)["top5"] == 1.0, "three classes"


def test_logistic_regression_has_the_least_loss():
    """Against scipy in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)) + 1
    labels, penalty = rng.integers(0, 3, 60), 1e-2

    def loss(flat):
        w, b = flat[:15].reshape(3, 5), flat[15:]
        z = x @ w.T + b
        return np.mean(logsumexp(z, axis=1) - z[np.arange(60), labels]) + penalty / 2 * np.sum(w**2)

    best = minimize(loss, np.zeros(18), tol=1e-10).x
    w, b = classify.logistic_regression(np.float32(x), labels, penalty, 3)
    np.testing.assert_allclose(w, best[:15].reshape(3, 5), atol=2e-3)
    np.testing.assert_allclose(b - b.mean(), best[15:] - best[15:].mean(), atol=2e-3)


def test_a_probe_finds_what_is_linear_and_which_penalty_it_needs():
    """Two classes that a small part of the embedding tells apart, and one more in its middle."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(600, 8)).astype(np.float32)
    labels = np.digitize(x[:, 0], [-0.5, 0.5])
    x[:, 0] *= 0.05
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    w, b, penalty = classify.linear_probe(x[:400], labels[:400], 3)
    right = np.argmax(x[400:] @ w.T + b, axis=1) == labels[400:]
    assert right.mean() > 0.8
    assert penalty < 1e-2


def test_the_probes_classes_are_those_of_the_images(folder, tmp_path):
    data = classify.read_images(folder)
    with pytest.raises(DataError, match=r"class 'cat' has 0 images; a probe needs two or more"):
        classify.read_training(folder, data)
    picture = (folder / "bee/1.png").read_bytes()
    for name in "12":
        (folder / "cat" / f"{name}.png").write_bytes(picture)
    rows = [f"flowers/{name}/{i}.png,{name}" for name in ("cat", "bee") for i in "12"]
    (table := tmp_path / "t.csv").write_text("\n".join(["image,label", *rows]))
    with pytest.raises(DataError, match=r"class 'ant lion' is in only one of --probe and --clas"):
        classify.read_training(table, data)
    rows += [f"flowers/ant_lion/{name},ant lion" for name in ("a.png", "b.PNG")]
    table.write_text("\n".join(["image,label", *rows]))
    data = data._replace(classnames=["cat", "bee", "ant lion"])
    with pytest.raises(
        DataError, match=r"--probe=.*ant_lion/a\.png is in --classify, too; test on ot"
    ):
        classify.read_training(table, data)
    train = classify.read_training(table, data._replace(images=[]))
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match=r"--probe=.*nowhere: no such file or folder"):
        classify.read_training(tmp_path / "nowhere", data)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    workdir = untrained_run(HostileSource(), tmp_path)
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("\n".join(CLASSES))
    templates.write_text("a {} here\n{}\n")
    options = [f"--classify={folder}", f"--classnames={names}", f"--templates={templates}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}", *options])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((workdir / "eval/classify/flowers.json").read_text())
    assert lines[0].split() == ["top1", f"{report['top1']:.4f}"]
    assert lines[-1] == "over 7 images of 3 classes"
    assert report["templates"] == ["a {} here", "{}"]
    assert report["per_class"].keys() == {"ant lion", "bee"}
    assert report["top5"] == 1.0
    (folder / "bee" / "5.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "bee/5.png)', field 'image': unreadable" in capsys.readouterr().err.splitlines()[-1]
    (folder / "bee" / "5.png").unlink()
    (folder / "cat").rmdir()
    names.write_text("\n".join(CLASSES[:2]))
    shutil.copytree(folder, tmp_path / "others")
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--probe={tmp_path / 'others'}"])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((workdir / "eval/classify/flowers.json").read_text())
    assert lines[0].split() == ["zero-shot", "linear", "probe"]
    assert lines[1].split() == ["top1", *(f"{x['top1']:.4f}" for x in (report, report["probe"]))]
    assert report["probe"]["images"] == 7


def test_classes_and_answers_are_open_clips(open_clip, tmp_path, folder):
    import torch

    text = dataclasses.replace(SMALL["clip"].text, vocab_size=49408)
    model = dataclasses.replace(SMALL["clip"], text=text)
    cfg = TrainConfig(model=model)
    params = random_params(model)
    export_pretrained(params, model, tmp_path / "out", "open_clip")
    name = f"local-dir:{tmp_path}/out"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(name)
    names, templates = [*CLASSES, *"defg"], list(classify.TEMPLATES)
    expected = open_clip.build_zero_shot_classifier(theirs, tokenizer, names, templates).T.numpy()
    embedder = embedding.Embedder(cfg, params, make_cpu_mesh(8, 1))
    classes = classify.classifier(embedder, names, templates)
    np.testing.assert_allclose(classes, expected, atol=2e-5)
    data = classify.read_images(folder)._replace(classnames=names)
    pixels = [preprocess(Image.open(io.BytesIO(x)).convert("RGB")) for x in read(data.images)]
    with torch.no_grad():
        images = theirs.encode_image(torch.stack(pixels), normalize=True).numpy()
    cosines = images @ expected.T
    ranks = (cosines > np.take_along_axis(cosines, data.labels[:, None], axis=1)).sum(axis=1)
    result = classify.classify(embedder, data, templates)
    assert result["top1"] == pytest.approx((ranks < 1).mean())
    assert result["top5"] == pytest.approx((ranks < 5).mean())


def clip_benchmark_recall(scores, positive, k) -> float:
    """Its `recall_at_k(...) > 0`, by its words: of each row, whether a positive is in the top k."""
    hits = []
    for row, wanted in zip(scores, positive, strict=True):
        best = np.argsort(-row, kind="stable")[:k]
        hits.append(wanted[best].sum() > 0)
    return float(np.mean(hits))


def test_recall_is_clip_benchmarks():
    """Several captions per image, one twice; an image without any."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 6)).astype(np.float32)
    image_of = np.concatenate([np.repeat(np.arange(39), 5), [3, 3]])
    texts = images[image_of] + rng.normal(0, 2, (len(image_of), 6)).astype(np.float32)
    texts[7] = texts[101]
    found = ranked.recall_at(texts, images, image_of)
    positive = image_of[:, None] == np.arange(40)
    for k in ranked.RECALL_KS:
        both = {
            "text_to_image": clip_benchmark_recall(texts @ images.T, positive, k),
            "image_to_text": clip_benchmark_recall(images[:39] @ texts.T, positive.T[:39], k),
        }
        for direction, expected in both.items():
            assert found[direction][f"R@{k}"] == pytest.approx(expected), (direction, k)
    assert 0 < found["text_to_image"]["R@1"] < found["image_to_text"]["R@1"] < 1


def test_recall_of_fewer_than_k():
    one = np.eye(2, dtype=np.float32)
    assert ranked.recall_at(one, one, np.array([0, 1]))["image_to_text"]["R@10"] == 1.0


@pytest.mark.parametrize("flag", ["classify", "compositional", "recall"])
def test_an_image_tower_that_never_saw_an_image_answers_nothing(
    folder, tmp_path, monkeypatch, capsys, flag
):
    workdir = untrained_run(HostileSource(), tmp_path)
    (workdir / "config.json").write_text(
        (workdir / "config.json").read_text().replace('"image": 0.5', '"title": 0.5')
    )
    given = f"--{flag}" if flag == "recall" else f"--{flag}={folder}"
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}", given])
    with pytest.raises(SystemExit):
        evaluate.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--{flag} compares texts with images, and in {workdir} the image tower" in line
    assert "learns nothing from the fields query (text), title (text): train with" in line


def test_the_recall_command(tmp_path, monkeypatch, capsys):
    class Captions(HostileSource):
        """Three captions for every image of the first corpus but one."""

        def __init__(self):
            super().__init__()
            self.document_fields = {"image": "image"}

        def documents(self):
            yield from (
                {"id": d["id"], "image": d["image"]} for d in super().documents() if d["image"]
            )

        def queries(self):
            return ({"id": f"q{i}", "query": f"caption {i}"} for i in range(30))

        def splits(self):
            rows = np.arange(30, dtype=np.int32)
            return {"test": Split(Pairs(rows, rows // 3, np.ones(30, np.float32)), "known")}

        def corpora(self):
            return {"known": np.arange(11)}

    workdir = untrained_run(Captions(), tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}", "--recall"])
    evaluate.main()
    row = capsys.readouterr().out.splitlines()[-1].split()
    report = json.loads((workdir / "eval/recall/test.json").read_text())
    assert row[:3] == ["test", "30", "11"]
    shares = [*report["text_to_image"].values(), *report["image_to_text"].values()]
    assert row[3:] == [f"{share:.4f}" for share in shares]
    assert 0 < report["text_to_image"]["R@10"] <= 1
