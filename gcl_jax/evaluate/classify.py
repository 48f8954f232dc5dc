"""Zero-shot classification: `python -m gcl_jax.evaluate --workdir=RUN --classify=PATH`.

PATH is a folder with a subfolder of images per class (as torchvision's ImageFolder), or a CSV, TSV,
JSONL or parquet file with a column `image` (a path from the file's folder on; in parquet also the
encoded bytes, or {bytes, path}) and a column `label` (a class name, or its number in --classnames).

A class is the mean of its embedded prompts, at length 1 again; an image belongs to the class of the
highest cosine (arXiv 2103.00020, as open_clip's `build_zero_shot_classifier` does it).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gcl_jax import distributed
from gcl_jax.data.store import is_hidden, visible_files
from gcl_jax.data.transforms import IMAGE_ENDINGS, read_file
from gcl_jax.embed.embedder import Embedder
from gcl_jax.embed.model import GivenRecords
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.evaluate.results import of_model, writing
from gcl_jax.paths import write_json
from gcl_jax.prepare.records import image_cell, text_cell
from gcl_jax.prepare.rows import read_rows
from gcl_jax.prepare.source import Place, RowError
from gcl_jax.runs import NEWEST, load_model, set_embed_dim
from gcl_jax.search.index import exact_top_k

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}.")
TOP = (1, 5)


class Labelled(NamedTuple):
    """Images, files or encoded bytes, and their classes: `labels`, int64 (n,), are places in
    `classnames`. `source`: where the images are from."""

    source: Path
    images: list[Path | bytes]
    labels: Int[np.ndarray, " n"]
    classnames: list[str]


def read_images(path: Path, classnames: Sequence[str] | None = None) -> Labelled:
    """The images at `path` (see the module); `classnames` replace the names of the subfolders, in
    their alphabetical order, and are what the labels of a file name or count from 0.

    Raises:
        DataError: there are no images or labels, or they do not fit `classnames`.
    """
    if path.is_dir():
        return _of_folder(path, classnames)
    if not path.is_file():
        raise DataError(f"--classify={path}: no such file or folder")
    return _of_table(path, classnames)


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


def classify(embedder: Embedder, data: Labelled, templates: Sequence[str] = TEMPLATES) -> dict:
    """`accuracy` of the model on `data`, with how many images and classes there are.

    Raises:
        DataError: an image that cannot be read.
    """
    classes = classifier(embedder, data.classnames, templates)
    rows = [{"image": image} for image in data.images]
    records = GivenRecords(str(data.source), {"image": "image"}, rows)
    numbers = np.arange(len(rows))
    embedded = embedder.embed("document", records, ["image"], numbers, description="images")
    result = accuracy(embedded.merged({"image": 1.0}), classes, data.labels)
    result["per_class"] = {data.classnames[c]: x for c, x in result["per_class"].items()}
    return {"images": len(rows), "classes": len(data.classnames), **result}


def classify_workdir(
    workdir: Path,
    path: Path,
    classnames: Path | None = None,
    templates: Path | None = None,
    embed_dim: int | None = None,
    checkpoint: str = NEWEST,
) -> str:
    """Classifies the images at `path` by a checkpoint of a run, writes
    WORKDIR/eval/classify/NAME.json and returns a table.

    Raises:
        ConfigError: the model has no image tower.
        DataError: a file or image cannot be read, or does not fit.
    """
    data = read_images(path, read_lines(classnames) if classnames else None)
    prompts = read_templates(templates) if templates else list(TEMPLATES)
    cfg, params, mesh, step = load_model(workdir, checkpoint)
    if cfg.model.vision is None:
        raise ConfigError(f"--classify needs images, and the model in {workdir} has no image tower")
    if embed_dim is not None:
        set_embed_dim(cfg, embed_dim)
    result = classify(Embedder(cfg, params, mesh), data, prompts)
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
    lines = [f"{name.replace('_', ' '):<24}{result[name]:.4f}" for name in names]
    return "\n".join([*lines, f"over {result['images']} images of {result['classes']} classes"])


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
