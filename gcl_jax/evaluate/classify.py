"""Zero-shot classification: `python -m gcl_jax.evaluate --workdir=RUN --classify=PATH`.

PATH is a folder with a subfolder of images per class (as torchvision's ImageFolder), or a CSV, TSV,
JSONL or parquet file with a column `image` (a path from the file's folder on; in parquet also the
encoded bytes, or {bytes, path}) and a column `label` (a class name, or its number in --classnames).

A class is the mean of its embedded prompts, at length 1 again; an image belongs to the class of the
highest cosine (arXiv 2103.00020, as open_clip's `build_zero_shot_classifier` does it).

With --probe=TRAIN, labelled images in the same form, also a linear probe (same paper, section 3.2):
multinomial logistic regression on the frozen embeddings of TRAIN, whose L2 penalty is the one of
`PENALTIES` that does best on a fifth of them.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gcl_jax import distributed
from gcl_jax.data.store import is_hidden, visible_files
from gcl_jax.data.transforms import IMAGE_ENDINGS, read_file
from gcl_jax.embed.embedder import Embedder
from gcl_jax.embed.model import GivenRecords
from gcl_jax.errors import DataError
from gcl_jax.evaluate.results import of_model, writing
from gcl_jax.paths import write_json
from gcl_jax.prepare.records import image_cell, text_cell
from gcl_jax.prepare.rows import read_rows
from gcl_jax.prepare.source import Place, RowError
from gcl_jax.runs import NEWEST, load_model
from gcl_jax.search.index import exact_top_k

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}.")
TOP = (1, 5)
PENALTIES = tuple(10.0**power for power in range(-7, 1))  # beside the mean loss
MOST_STEPS, FLAT = 1000, 1e-5  # of L-BFGS, and the norm of a gradient at which it is done


class Labelled(NamedTuple):
    """Images, files or encoded bytes, and their classes: `labels`, int64 (n,), are places in
    `classnames`. `source`: where the images are from."""

    source: Path
    images: list[Path | bytes]
    labels: Int[np.ndarray, " n"]
    classnames: list[str]


def read_images(
    path: Path, classnames: Sequence[str] | None = None, flag: str = "classify"
) -> Labelled:
    """The images at `path` (see the module), which `flag` gave; `classnames` replace the names of
    the subfolders, in their alphabetical order, and are what the labels of a file name or count
    from 0.

    Raises:
        DataError: there are no images or labels, or they do not fit `classnames`.
    """
    if path.is_dir():
        return _of_folder(path, classnames)
    if not path.is_file():
        raise DataError(f"--{flag}={path}: no such file or folder")
    return _of_table(path, classnames)


def read_training(path: Path, data: Labelled, classnames: Sequence[str] | None = None) -> Labelled:
    """The images to train a probe on, with the classes of `data` in their order.

    Raises:
        DataError: as `read_images`; images of `data` itself, other classes, or a class with fewer
            than two images.
    """
    train = read_images(path, classnames, "probe")
    if odd := sorted(set(train.classnames).symmetric_difference(data.classnames)):
        raise DataError(
            f"--probe={path}: class {odd[0]!r} is in only one of --probe and --classify; both need "
            "the same classes (labels of a file: name them all in --classnames)"
        )
    place = np.array([data.classnames.index(name) for name in train.classnames])
    labels = place[train.labels]
    counts = np.bincount(labels, minlength=len(data.classnames))
    if (counts < 2).any():
        name, count = data.classnames[int(counts.argmin())], int(counts.min())
        raise DataError(
            f"--probe={path}: class {name!r} has {count} images; a probe needs two or more of each"
        )
    files = [{x.resolve() for x in of.images if isinstance(x, Path)} for of in (train, data)]
    if shared := sorted(set.intersection(*files)):
        raise DataError(f"--probe={path}: {shared[0]} is in --classify, too; test on other images")
    return train._replace(labels=labels, classnames=data.classnames)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without blanks around them.

    Raises:
        DataError: there is none, or it is no UTF-8.
    """
    try:
        lines = [line.strip() for line in read_file(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from None
    if not any(lines):
        raise DataError(f"{path} has no line")
    return [line for line in lines if line]


def classifier(
    embedder: Embedder, classnames: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "c e"]:
    """The classes as rows of length 1: means over the templates, in which {} is the name."""
    texts = [template.replace("{}", name) for name in classnames for template in templates]
    records = GivenRecords("prompts", {"text": "text"}, [{"text": text} for text in texts])
    embedded = embedder.embed(
        "query", records, ["text"], np.arange(len(texts)), description="prompts"
    )
    means = embedded.merged({"text": 1.0}).reshape(len(classnames), len(templates), -1).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def accuracy(
    images: Float[np.ndarray, "n e"],
    classes: Float[np.ndarray, "c e"],
    labels: Int[np.ndarray, " n"],
) -> dict:
    """{"top1", "top5", "mean_per_class_recall", "per_class": {class: recall}}: shares of 1. Among
    equal cosines the first class counts as the better one; a class without images has no recall."""
    _, found = exact_top_k(images, classes, max(TOP))
    hit = found == labels[:, None]
    counts = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels, weights=hit[:, 0], minlength=len(classes))
    recall = {int(c): float(right[c] / counts[c]) for c in np.flatnonzero(counts)}
    return {
        **{f"top{k}": float(hit[:, :k].any(axis=1).mean()) for k in TOP},
        "mean_per_class_recall": float(np.mean(list(recall.values()))),
        "per_class": recall,
    }


def linear_probe(
    x: Float[np.ndarray, "n e"], labels: Int[np.ndarray, " n"], classes: int
) -> tuple[Float[np.ndarray, "c e"], Float[np.ndarray, " c"], float]:
    """(weights, biases, penalty) of logistic regression on `x`, of each class two or more rows: the
    penalty that is most often right on a fifth of each class, the larger of equally good ones."""
    order = np.random.default_rng(0).permutation(len(x))
    held_out = np.zeros(len(x), bool)
    for c in range(classes):
        own = order[labels[order] == c]
        held_out[own[: -(-len(own) // 5)]] = True
    kept, best = ~held_out, (-1.0, 0.0)
    for penalty in PENALTIES:
        w, b = _fitted(x[kept], labels[kept], penalty, classes)
        right = np.argmax(x[held_out] @ w.T + b, axis=1) == labels[held_out]
        best = max(best, (float(right.mean()), penalty))
    return *_fitted(x, labels, best[1], classes), best[1]


def _fitted(x, labels, penalty: float, classes: int):
    return jax.device_get(logistic_regression(x, labels, penalty, classes))


@functools.partial(jax.jit, static_argnums=3)
def logistic_regression(
    x: Float[Array, "n e"], labels: Int[Array, " n"], penalty: float, classes: int
) -> tuple[Float[Array, "c e"], Float[Array, " c"]]:
    """(w, b) with the least mean of -log softmax(w x + b) + `penalty` / 2 * sum w^2, by L-BFGS."""

    def loss(params):
        w, b = params
        logits = jnp.matmul(x, w.T, precision=jax.lax.Precision.HIGHEST) + b
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + penalty / 2 * jnp.sum(w**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, _, count = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad), count + 1

    def is_steep(carry):
        return (carry[2] > FLAT) & (carry[3] < MOST_STEPS)

    start = jnp.zeros((classes, x.shape[1])), jnp.zeros(classes)
    return jax.lax.while_loop(is_steep, step, (start, solver.init(start), jnp.inf, 0))[0]


def classify(
    embedder: Embedder,
    data: Labelled,
    templates: Sequence[str] = TEMPLATES,
    train: Labelled | None = None,
) -> dict:
    """`accuracy` of the model on `data`, with how many images and classes there are; and, if there
    are images to `train` it on (`read_training`), that of a linear probe under "probe".

    Raises:
        DataError: an image that cannot be read.
    """
    names = data.classnames
    classes = classifier(embedder, names, templates)
    images = _embedded(embedder, data, "images")
    sizes = {"images": len(images), "classes": len(names)}
    result = sizes | _by_name(accuracy(images, classes, data.labels), names)
    if train is not None:
        x = _embedded(embedder, train, "images to train on")
        w, b, penalty = linear_probe(x, train.labels, len(names))
        ones = np.ones((len(images), 1), np.float32)
        probed = accuracy(np.hstack([images, ones]), np.hstack([w, b[:, None]]), data.labels)
        how = {"data": str(train.source), "images": len(x), "penalty": penalty}
        result["probe"] = how | _by_name(probed, names)
    return result


def _embedded(embedder: Embedder, data: Labelled, description: str) -> Float[np.ndarray, "n e"]:
    rows = [{"image": image} for image in data.images]
    records = GivenRecords(str(data.source), {"image": "image"}, rows)
    numbers = np.arange(len(rows))
    embedded = embedder.embed("document", records, ["image"], numbers, description=description)
    return embedded.merged({"image": 1.0})


def _by_name(result: dict, names: Sequence[str]) -> dict:
    return result | {"per_class": {names[c]: x for c, x in result["per_class"].items()}}


def classify_workdir(
    workdir: Path,
    path: Path,
    classnames: Path | None = None,
    templates: Path | None = None,
    probe: Path | None = None,
    embed_dim: int | None = None,
    checkpoint: str = NEWEST,
) -> str:
    """Classifies the images at `path` by a checkpoint of a run, and by a probe trained on those at
    `probe`, writes WORKDIR/eval/classify/NAME.json and returns a table.

    Raises:
        DataError: a file or image cannot be read, or does not fit.
    """
    names = read_lines(classnames) if classnames else None
    data = read_images(path, names)
    train = read_training(probe, data, names) if probe else None
    prompts = read_templates(templates) if templates else list(TEMPLATES)
    cfg, params, mesh, step = load_model(workdir, checkpoint, embed_dim)
    result = classify(Embedder(cfg, params, mesh), data, prompts, train)
    model = of_model(cfg, params, step)
    if not distributed.is_first():
        return ""
    report = model | {"data": str(path), "templates": prompts, **result}
    name = path.resolve().stem if embed_dim is None else f"{path.resolve().stem}@{embed_dim}"
    text = format_result(result)
    with writing(text):
        write_json(workdir / "eval" / "classify" / f"{name}.json", report)
    return text


def format_result(result: dict) -> str:
    """A line per figure."""
    names = [*(f"top{k}" for k in TOP), "mean_per_class_recall"]
    columns, over = [result], f"over {result['images']} images of {result['classes']} classes"
    head = []
    if probe := result.get("probe"):
        columns.append(probe)
        head = [f"{'':<24}zero-shot   linear probe"]
        over += f"; probe of {probe['images']} others, penalty {probe['penalty']:g}"
    lines = [
        f"{name.replace('_', ' '):<24}" + "      ".join(f"{one[name]:.4f}" for one in columns)
        for name in names
    ]
    return "\n".join([*head, *lines, over])


def read_templates(path: Path) -> list[str]:
    """A template per line. Raises `DataError` as `read_lines`, and for one without {}."""
    templates = read_lines(path)
    if lacking := [template for template in templates if "{}" not in template]:
        raise DataError(f"{path}: {lacking[0]!r} has no {{}} for the name of the class")
    return templates


def _of_folder(folder: Path, classnames: Sequence[str] | None) -> Labelled:
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    if classnames is not None and len(classnames) != len(folders):
        raise DataError(
            f"--classnames has {len(classnames)} names for the {len(folders)} folders in {folder}"
        )
    found = [
        (path, label)
        for label, subfolder in enumerate(folders)
        for path in visible_files(subfolder)
        if path.suffix[1:].lower() in IMAGE_ENDINGS
    ]
    if not found:
        raise DataError(f"{folder} has no subfolder with images; one for each class is expected")
    images, labels = zip(*found, strict=True)
    names = list(classnames or (path.name.replace("_", " ") for path in folders))
    return Labelled(folder, list(images), np.array(labels), names)


def _of_table(path: Path, classnames: Sequence[str] | None) -> Labelled:
    images: list[Path | bytes] = []
    texts = []
    for number, row in read_rows(path, ("image", "label")):
        place = Place(path, number)
        try:
            if isinstance(row, RowError):
                raise row
            image, text = image_cell(row["image"]), text_cell(row["label"]).strip()
        except RowError as error:
            raise DataError(f"{place}: {error}") from None
        if not image or not text:
            raise DataError(f"{place}: no {'label' if image else 'image'}")
        if isinstance(image, str) and not (path.parent / image).is_file():
            raise DataError(f"{place}: {path.parent / image}: no such file")
        images.append(path.parent / image if isinstance(image, str) else image)
        texts.append(text)
    if not images:
        raise DataError(f"{path} has no row")
    names = list(classnames or sorted(set(texts)))
    numbered = all(text.isdecimal() for text in texts)
    if numbered and classnames is None:
        raise DataError(f"{path}: the labels are numbers; name their classes with --classnames")
    if numbered and max(map(int, texts)) < len(names):
        return Labelled(path, images, np.array(texts, np.int64), names)
    places = {name: i for i, name in enumerate(names)}
    if unknown := [text for text in texts if text not in places]:
        raise DataError(f"{path}: the label {unknown[0]!r} is not in --classnames")
    return Labelled(path, images, np.array([places[text] for text in texts]), names)
