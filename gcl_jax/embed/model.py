"""A model for programs and notebooks: `gcl_jax.load`, `gcl_jax.from_pretrained`."""

import collections
import os
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, SupportsIndex, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from gcl_jax import logs, sharding
from gcl_jax.config import DataConfig, MeshConfig, TrainConfig
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import Records
from gcl_jax.data.transforms import read_file
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import DataError, UserError
from gcl_jax.models.clip import abstract_params
from gcl_jax.models.families import untrained_towers
from gcl_jax.models.flops import Kinds
from gcl_jax.models.presets import PRESETS
from gcl_jax.paths import local_path, path_of
from gcl_jax.prepare.stores import open_stores
from gcl_jax.runs import NEWEST, is_run, load_model, set_embed_dim
from gcl_jax.sharding import Params
from gcl_jax.validation import validate

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray


class Model:
    """Embeds texts, images and records of several fields; made by `gcl_jax.load` and
    `gcl_jax.from_pretrained`.

    Embeddings are float32 numpy arrays with rows of length 1, so that an inner product is a cosine.
    A list of n gives (n, embed_dim), an empty list (0, embed_dim), a single text, image or record
    (embed_dim,). They are made in batches, on all devices; a batch is filled up to a power of two,
    so that few sizes have to be compiled.

    Attributes:
        cfg: the configuration, a `gcl_jax.TrainConfig`.
        step: the training step of the parameters; 0 if they are pretrained.
        embed_dim: columns of the embeddings.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        params: Params,
        mesh: Mesh,
        step: int = 0,
        kinds: Kinds | None = None,
    ):
        """`kinds`: those of the fields of each side; None if nobody knows."""
        self.cfg, self.step, self._kinds = cfg, step, kinds
        self.embed_dim = cfg.eval.embed_dim or cfg.model.embed_dim
        self.embedder = Embedder(cfg, params, mesh)
        self._untrained = untrained_towers(cfg, kinds) if step and kinds else {}

    def __repr__(self) -> str:
        fields = ", ".join(f"{side} fields {self.fields(side)}" for side in get_args(Side))
        return f"<gcl_jax.Model of {self.embed_dim} dimensions, step {self.step}, {fields}>"

    def fields(self, side: Side) -> dict[str, float]:
        """{field: weight} of the side "query" or "document". A pretrained model may have none: then
        `encode` takes all fields of the records, with equal weights.

        Raises:
            UserError: there is no such side.
        """
        if side not in get_args(Side):
            raise UserError(f"side={side!r} must be 'query' or 'document'")
        return self.cfg.data.weights[side]

    def encode_text(
        self, texts: str | Iterable[str], side: Side = "query"
    ) -> Float[np.ndarray, "*n e"]:
        """Embeds texts. The prefix of `side` goes before each, if the model has prefixes ("query: "
        and "passage: " for E5).

        Raises:
            UserError: something that is no text, or is empty, by its position.
        """
        self.fields(side)
        return self._embed_alone("text", texts, str, side)

    def encode_image(self, images: ImageLike | Iterable[ImageLike]) -> Float[np.ndarray, "*n e"]:
        """Embeds images, resized and cropped as the model expects it.

        Args:
            images: paths (str or `Path`), encoded files (bytes), PIL images, or uint8
                arrays (height, width, 3); their sizes may differ.

        Raises:
            UserError: something that is no image or cannot be read, by its position; or the model
                has no image tower.
        """
        if isinstance(images, np.ndarray) and images.ndim > 3:
            images = list(images)
        return self._embed_alone("image", images, ImageLike, "document")

    def encode(
        self, records: Mapping[str, Any] | Iterable[Mapping[str, Any]], side: Side = "document"
    ) -> Float[np.ndarray, "*n e"]:
        """Embeds records as the weighted sum of their fields: for records of the run's store, what
        `python -m gcl_jax.embed` writes.

        Args:
            records: {field: value}. A text is a str, an image what `encode_image` takes; a field
                that is left out, empty, None or NaN is missing. A key "id" is left alone.
            side: whose fields, weights and prefix these are.

        Raises:
            UserError: a record without any field of the model, or with another one; something that
                is no text or image, or cannot be read. Its position is named.
        """
        weights, name = self.fields(side), "queries" if side == "query" else "documents"
        single, rows = _listed(name, records, Mapping)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise UserError(f"{name}[{i}] is {_described(row)}, not a dict {{field: value}}")
            if weights and (unknown := row.keys() - weights.keys() - {"id"}):
                raise UserError(
                    f"{name}[{i}] has a field {min(unknown, key=str)!r}; the model has "
                    f"{', '.join(weights)}"
                )
        weights = weights or {field: 1.0 for row in rows for field in row if field != "id"}
        if self._kinds is None:
            raise UserError(
                f"the store of this run, {self.cfg.data.named}, is gone: say which fields are "
                "images with gcl_jax.load(..., image_fields=[...])"
            )
        found = self._embed(name, rows, self._kinds[side], weights, side)
        return found[0] if single else found

    def _embed_alone(self, kind: str, values: Any, one: Any, side: Side) -> np.ndarray:
        single, values = _listed(f"{kind}s", values, one)
        rows = [{kind: value} for value in values]
        found = self._embed(f"{kind}s", rows, {kind: kind}, {kind: 1.0}, side)
        return found[0] if single else found

    def _embed(
        self,
        name: str,
        rows: list,
        kinds: Mapping[str, str],
        weights: dict[str, float],
        side: Side,
    ):
        """Embeddings of `rows` by the fields that `weights` names; `name` is theirs in errors."""
        weights = {field: weight for field, weight in weights.items() if weight > 0}
        used = {}
        for i, row in enumerate(rows):
            present = {f: row[f] for f in weights if not _is_missing(row.get(f))}
            if not present:
                raise DataError(f"{name}[{i}] has no {' or '.join(map(str, weights)) or 'field'}")
            for field, value in present.items():
                used[field] = kinds[field]
                if wrong := _misfit(kinds[field], value):
                    raise UserError(f"{name}[{i}], field {field!r}: {wrong}")
        if "image" in used.values() and self.cfg.model.vision is None:
            raise UserError("the model has no image tower: it embeds texts only")
        for kind in self._untrained.keys() & set(used.values()):
            raise UserError(f"{name}: {self._untrained[kind]}")
        if not rows:
            return np.zeros((0, self.embed_dim), np.float32)
        records = GivenRecords(name, used, rows)
        found = self.embedder.embed(side, records, list(used), np.arange(len(rows)), quiet=True)
        return found.merged({field: weights[field] for field in used})


class GivenRecords(Records):
    """Records in memory, as those of a store; the i-th has the id NAME[i], and the path of an image
    after it."""

    def __init__(self, name: str, kinds: dict[str, str], rows: Sequence[Mapping[str, Any]]):
        self.fields, self._name, self._rows = kinds, name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Files are read now, in the threads that decode images."""
        record: dict[str, Any] = {"id": f"{self._name}[{index}]"}
        for field, kind in self.fields.items():
            value = self._rows[int(index)].get(field)
            if _is_missing(value):
                value = ""
            elif isinstance(value, np.ndarray):
                value = Image.fromarray(value)
            elif kind == "image" and isinstance(value, str | os.PathLike):
                try:
                    path, value = str(value), read_file(local_path(value))
                except (OSError, ValueError) as error:
                    raise DataError(
                        f"{record['id']}, field {field!r}: cannot read the image: {error}"
                    ) from None
                record["id"] += f" ({path})"
            record[field] = value
        return record


def _listed(name: str, values: Any, one: Any) -> tuple[bool, list]:
    """Whether it is but `one`, and all in a list."""
    if isinstance(values, one):
        return True, [values]
    if hasattr(values, "to_dict"):
        raise UserError(f"{name} are pandas: give .to_dict('records'), or of one column .tolist()")
    many = isinstance(values, Iterable) and not isinstance(values, bytes | Mapping | Set)
    if many and getattr(values, "shape", None) != ():
        return False, list(values)
    raise UserError(f"{name} must be a list, not {_described(values)}")


def _is_missing(value: Any) -> bool:
    """NaN is what pandas has for nothing."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, str | bytes) and not value)


def _misfit(kind: str, value: Any) -> str:
    """Why `value` is no "text" or "image"; empty if it is one."""
    if kind == "text":
        return "" if isinstance(value, str) else f"{_described(value)} is no text (str)"
    fits = isinstance(value, str | os.PathLike | bytes)
    if isinstance(value, np.ndarray):
        fits = value.dtype == np.uint8 and value.shape[2:] == (3,) and value.size > 0
    elif isinstance(value, Image.Image):
        try:
            value.load()
        except Exception as error:  # whatever a decoder raises
            return f"unreadable image: {error}"
        if value.mode[0] in "IF":
            return f"16-bit image: mode {value.mode}; convert it to 8 bits a channel"
        fits = min(value.size) > 0
    if fits:
        return ""
    return (
        f"{_described(value)} is no image: give a path, the bytes of a file, a PIL image or a "
        "uint8 array (height, width, 3)"
    )


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {value.shape}"
    return "None" if value is None else f"{type(value).__name__} {repr(value)[:40]}"


def _texts_but(image_fields: Collection[str]) -> Kinds:
    if isinstance(image_fields, str) or not isinstance(image_fields, Collection):
        raise UserError(f"image_fields must be a list of names, not {_described(image_fields)}")
    kinds = collections.defaultdict(lambda: "text", dict.fromkeys(image_fields, "image"))
    return dict.fromkeys(get_args(Side), kinds)


def load(
    workdir: str | os.PathLike,
    checkpoint: str | int = NEWEST,
    *,
    embed_dim: int | None = None,
    image_fields: Collection[str] | None = None,
) -> Model:
    """The model of the training run in `workdir`, on all devices of this machine.

    Args:
        checkpoint: "newest", "best" by the run's `config.checkpoint.best`, or a step.
        embed_dim: cuts embeddings to that many leading dimensions; default as the run says.
        image_fields: where the store that the run was trained on is gone, the fields that are
            images; all others are texts.

    Raises:
        UserError: `workdir` is no run, or has no such checkpoint or dimensions.
    """
    folder = local_path(_path("workdir", workdir))
    if not folder.is_dir():
        raise UserError(f"{folder} is no directory of a training run")
    kinds = None if image_fields is None else _texts_but(image_fields)
    cfg, params, mesh, step = load_model(folder, str(checkpoint), embed_dim)
    try:
        store = open_stores(cfg.data)
        cfg, kinds = store.resolve(cfg), kinds or store.kinds
    except DataError:  # gone, or another: texts and images can be embedded all the same
        pass
    return Model(cfg, params, mesh, step, kinds)


def from_pretrained(
    source: str | os.PathLike,
    *,
    model: str = "",
    tokenizer: str = "",
    context_length: int = 0,
    query_fields: Mapping[str, float] | None = None,
    document_fields: Mapping[str, float] | None = None,
    image_fields: Collection[str] = ("image",),
    embed_dim: int | None = None,
) -> Model:
    """A pretrained model, on all devices of this machine.

    Args:
        source: a folder of open_clip, transformers or sentence-transformers or of our own export, a
            weights file, or "owner/name" on the Hugging Face hub.
        model: preset (`gcl_jax.preset`) or open_clip JSON file, where `source` has no configuration
            of its own, as a weights file has none.
        tokenizer, context_length: replace those of the model.
        query_fields, document_fields: {field: weight} for `Model.encode`; default all fields of the
            records, with equal weights.
        image_fields: which of the fields are images; all others are texts.
        embed_dim: cuts embeddings to that many leading dimensions.

    Raises:
        UserError: nothing at `source`, or no model that the towers here can be.
    """
    from gcl_jax.port.pretrained import load_pretrained, model_config

    name, kinds = _path("source", source), _texts_but(image_fields)
    if name in PRESETS and not Path(name).exists():
        raise UserError(
            f"{name} is the name of an architecture, not of weights: give their file or folder, "
            f"and model={name!r}"
        )
    if is_run(local_path(name)):
        raise UserError(f"{name} is a training run: open it with gcl_jax.load({name!r})")
    logs.quiet_libraries()
    cfg = TrainConfig(
        model=model_config(name, model, tokenizer, context_length),
        data=DataConfig(
            query_fields=_weights("query_fields", query_fields),
            document_fields=_weights("document_fields", document_fields),
        ),
    )
    validate(cfg)
    set_embed_dim(cfg, embed_dim)
    mesh = sharding.make_mesh(MeshConfig(), jax.device_count())
    placed = jax.tree.map(
        lambda x, at: jax.device_put(x, at.sharding),
        load_pretrained(name, cfg.model),
        abstract_params(cfg.model, mesh),
    )
    return Model(cfg, placed, mesh, kinds=kinds)


def _weights(name: str, fields: Any) -> dict[str, float]:
    if fields is not None and not isinstance(fields, Mapping):
        raise UserError(f"{name} must be a dict {{field: weight}}, not {_described(fields)}")
    return dict(fields or {})


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} must be a path, not {_described(value)}")
    if not os.fspath(value):
        raise UserError(f"{name} is empty")
    path_of(value)
    return os.path.expanduser(value)
