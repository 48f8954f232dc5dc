"""Stores: written from a source, opened by directory or by the name of a registered source."""

import contextlib
import importlib.metadata
import operator
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from gcl_jax import config, logs, paths
from gcl_jax.config import DataConfig
from gcl_jax.data import store
from gcl_jax.data.mixture import Mixture
from gcl_jax.data.negatives import save_negatives
from gcl_jax.data.store import MANIFEST, VERSION, Pairs, RankedStore
from gcl_jax.errors import ConfigError, DataError, UserError, naming
from gcl_jax.paths import (
    NO_RENAMES,
    UNFINISHED,
    address,
    alone_at,
    digest_of,
    filesystem,
    last_of,
    listing,
    mark_copy,
    md5_of,
    replacing,
    talking,
    transfer,
    twin_of,
    write_json,
)
from gcl_jax.prepare.parts import Part, PartsWriter
from gcl_jax.prepare.source import BadRows, Source, arguments_of, make_source
from gcl_jax.registry import SOURCES


def open_store(name: str) -> RankedStore:
    """Opens the store in `directory_of(name)`.

    Raises:
        ConfigError, DataError: as there; the store is damaged.
    """
    return RankedStore(directory_of(name))


def open_stores(data: DataConfig) -> RankedStore:
    """The store that `data` names, or the several ones of `data.stores` as one.

    Raises:
        ConfigError, DataError: as `open_store`; stores that do not go together.
    """
    if not data.stores:
        return open_store(data.store)
    return Mixture({name: open_store(name) for name in sorted(data.stores)})


def directory_of(name: str) -> Path:
    """The directory `name`, or that of the store of the registered source `name` if it needs no
    arguments, such as the bundled "emoji" and "emoji_languages": it is prepared on first use under
    $GCL_JAX_CACHE (default ~/.cache/gcl_jax).

    Raises:
        ConfigError: the source needs arguments.
        DataError: `name` is no text.
    """
    if not isinstance(name, str | os.PathLike):
        raise DataError(f"a store is named by its path or its source, not {name!r}")
    if name not in SOURCES or Path(name).is_dir():
        return paths.local_path(name)
    make, bad_rows = SOURCES[name], BadRows()
    if needed := [k for k, p in arguments_of(make).items() if p.default is p.empty]:
        raise ConfigError(
            f"config.data.store={name!r}: this source needs {', '.join(needed)}; prepare it with "
            f"`python -m gcl_jax.prepare --source={name} ...` and name the directory of the store"
        )
    source = make_source(make, {}, bad_rows)
    of_source = getattr(type(source), "fingerprint", Source.fingerprint)(source)
    fingerprint = f"{name}-{VERSION}-{of_source}"
    directory = paths.cache_folder() / fingerprint / name
    if not directory.exists():
        write_store(source, directory, bad_rows, fingerprint=fingerprint)
    return directory


def vacant(out: Path) -> bool:
    """Whether nothing is at `out`, or what a `publish` left that was killed."""
    twins = (twin for way in ("", "*/") for twin in out.glob(f"{way}.*{UNFINISHED}"))
    return not out.exists() or any(not last_of(twin).exists() for twin in twins)


def publish(made: Path, out: Path, last: str) -> None:
    """The folder `made` becomes `out`, in place of what is there: complete, or without the file
    `last`, by which readers know that it is complete. Where folders can be renamed that is one
    step. Elsewhere its files are copied, and a call that was killed leaves `out` `vacant` and
    `made` as it was: publish it again.
    """
    if not address(out):
        try:
            old = made.with_name(f"{made.name}.old")
            if out.exists():
                out.rename(old)
            made.rename(out)
        except OSError as error:
            if error.errno not in NO_RENAMES:
                raise
        else:
            shutil.rmtree(old, ignore_errors=True)
            return
    with alone_at(out):
        _copy(made, out, last)
        if address(out):
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            made.rename(out)
        else:
            shutil.rmtree(made)


def _copy(made: Path, out: Path, last: str) -> None:
    place, twin = address(out), twin_of(PurePath(last)).as_posix()
    bucket = filesystem(place) if place else None
    before = listing(place) if place else {}
    found = (path for path in made.rglob("*") if path.is_file())
    sizes = {path.relative_to(made).as_posix(): path.stat().st_size for path in found}
    copied = (path for path in out.rglob("*") if path.is_file())
    there = list(before) if place else [path.relative_to(out).as_posix() for path in copied]

    def put(name: str) -> None:
        if bucket is None:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(out / name) as copy:
                shutil.copyfile(made / name, copy)
        elif md5_of(before.get(name, {})) != digest_of(made / name, "md5"):
            bucket.put_file(str(made / name), f"{place}/{name}")

    def remove(name: str) -> None:
        bucket.rm_file(f"{place}/{name}") if bucket else (out / name).unlink(missing_ok=True)

    with talking(place):
        (made / twin).touch()
        put(twin)
        for name in sorted(there, key=lambda name: name != last):
            if name == last or name not in sizes.keys() | {twin}:
                remove(name)
                before.pop(name, None)
        others = {name: size for name, size in sizes.items() if name not in (last, twin)}
        transfer(place, "upload" if place else "copy", others, put)
        put(last)
        remove(twin)
        (made / twin).unlink()
    for name, about in listing(place).items() if place else ():
        if about["size"] == sizes.get(name):
            mark_copy(made / name, about)


def trained_on(store: RankedStore) -> dict[str, str]:
    """{split: what to say of it} for splits that have pairs in common with the one that training
    takes by default: an evaluation of these pairs is none of unseen ones."""
    train = store.resolve(config.TrainConfig()).data.train_split
    pairs = {name: store.pairs(name) for name in store.splits}
    keys = {n: x.query.astype(np.int64) << 32 | x.document for n, x in pairs.items()}
    shared = {name: np.isin(keys[name], keys[train]).sum() for name in keys if name != train}
    return {
        name: f"{n} of these pairs are in split {train}, too" for name, n in shared.items() if n
    }


def finished_store(out: Path, fingerprint: str) -> RankedStore | None:
    """The store at `out` if it has this very `fingerprint`, None if there is nothing, or what a
    call left that was killed while it published. Nothing unfinished stays beside a finished one.

    Raises:
        DataError: there is something else.
    """
    if vacant(out):
        return None
    with contextlib.suppress(DataError):
        existing = RankedStore(out)
        if fingerprint and existing.info["plan"] == fingerprint:
            paths.remove_unfinished(out)
            return existing
    raise DataError(f"{out} exists already; remove it or choose another --out")


def write_store(
    source: Source,
    out: Path,
    bad_rows: BadRows | None = None,
    *,
    fingerprint: str = "",
    workers: int = 1,
    beam: Sequence[str] | None = None,
    image_size: int = 0,
) -> RankedStore:
    """Writes `source` to the directory `out`, which is complete or absent: it is built beside its
    place, in OUT.incomplete, and published at the end. What `bad_rows` skipped is listed in
    OUT/skipped.jsonl. `workers` threads read and decode images; or the workers of an Apache Beam
    pipeline with the options `beam` (such as ["--runner=FlinkRunner"]) write the records,
    `documents()` and `queries()` being read twice then. With an `image_size`, images of more pixels
    on their shorter side are stored with so many, as JPEG.

    A run that was cut short is continued by the next one of the same `fingerprint`, which stands
    for all that the store depends on; without one, and after a `UserError`, work starts afresh.

    Raises:
        DataError: `out` exists already, the source has bad rows, or no pairs.
        ConfigError: Apache Beam is asked for and not installed.
    """
    out = paths.output_path(out)
    building = paths.building(out)
    with store.locked(building):
        try:
            if existing := finished_store(out, fingerprint):
                return existing
            _keep_if_same(building, fingerprint)
            if not (building / "store" / store.CHECKSUMS).exists():
                bad_rows = bad_rows or BadRows()
                with naming(building):
                    read = _write_records(source, building, bad_rows, workers, beam, image_size)
                    _write_rest(source, building / "store", bad_rows, read, fingerprint, image_size)
        except UserError:
            paths.remove_unfinished(out)
            raise
        publish(building / "store", out, last=MANIFEST)
        paths.remove_unfinished(out)
    return RankedStore(out)


def _keep_if_same(building: Path, fingerprint: str) -> None:
    """Empties `building` but for its lock, unless it holds unfinished work of `fingerprint`."""
    note = building / "fingerprint"
    if not (fingerprint and note.exists() and note.read_text() == fingerprint):
        for name in ("parts", "store"):
            shutil.rmtree(building / name, ignore_errors=True)
        note.write_text(fingerprint)
    for name in ("parts", "store"):
        (building / name).mkdir(exist_ok=True)


def _write_records(
    source: Source,
    building: Path,
    bad_rows: BadRows,
    workers: int,
    beam: Sequence[str] | None,
    image_size: int,
) -> dict[str, Part]:
    """What became of the "documents" and of the "queries"."""
    folder, skipping = building / "parts", BadRows("skip")
    fields = {"documents": source.document_fields, "queries": source.query_fields}
    if beam is not None:
        for kind in fields:
            parts = PartsWriter(kind, fields[kind], folder, skipping, image_size)
            parts.make_with_beam(getattr(source, kind)(), beam)
    sides = {kind: getattr(source, kind)() for kind in fields}
    read = {}
    total = sum(operator.length_hint(records) for records in sides.values())
    with logs.progress(total, unit="records", description="write") as bar:
        for kind, records in sides.items():
            parts = PartsWriter(kind, fields[kind], folder, bad_rows, image_size)
            read[kind] = parts.write(records, building / "store", bar.update, workers)
            if not read[kind].ids:
                raise DataError(
                    f"source {_name(source)} has no {kind} left to write{bad_rows.told()}"
                )
            if left_out := read[kind].left_out:
                source.leave_out(kind, left_out)
    return read


def _write_rest(
    source: Source,
    out: Path,
    bad_rows: BadRows,
    read: dict[str, Part],
    fingerprint: str,
    image_size: int,
) -> None:
    """The pairs, the corpora, store.json, which describes it all, and the checksums."""
    splits, corpora = source.splits(), source.corpora()
    if not any(len(split.pairs) for split in splits.values()):
        raise DataError(f"source {_name(source)} has no pair left to train on{bad_rows.told()}")
    sizes = {"query": len(read["queries"].ids), "document": len(read["documents"].ids)}
    for name, split in splits.items():
        if split.corpus == "all":
            corpora.setdefault("all", np.arange(sizes["document"]))
        if split.corpus not in corpora:
            raise DataError(f"split {name!r} searches {split.corpus!r}, which is no corpus")
        _write_pairs(split.pairs, out / "pairs" / name, sizes, least=1)
        save_negatives(out / "pairs" / name, split.negatives)
        for kind, judged in split.ground_truth.items():
            _write_pairs(judged, out / "ground_truth" / name / kind, sizes, least=0)
    (out / "corpora").mkdir(exist_ok=True)
    for name, documents in corpora.items():
        np.save(out / "corpora" / f"{name}.npy", np.unique(documents).astype(np.int32))
    info = {
        "version": VERSION,
        "gcl_jax": importlib.metadata.version("gcl_jax"),
        "query_fields": source.query_fields,
        "document_fields": source.document_fields,
        "image_size": image_size,
        "splits": {
            name: {
                "pairs": len(split.pairs),
                "queries": len(np.unique(split.pairs.query)),
                "corpus": split.corpus,
                "documents": len(corpora[split.corpus]),
                "negatives": {
                    side: int((rows[:, 0] >= 0).sum()) for side, rows in split.negatives.items()
                },
                "ground_truth": {
                    kind: len(np.unique(judged.query))
                    for kind, judged in split.ground_truth.items()
                },
                **_taught(split.pairs),
            }
            for name, split in splits.items()
        },
        "plan": fingerprint,
        "provenance": {"source": _name(source)}
        | source.provenance()
        | {
            "missing": {"query": read["queries"].missing, "document": read["documents"].missing},
            "skipped": bad_rows.counts(),
        },
    }
    bad_rows.write(out / "skipped.jsonl")
    write_json(out / MANIFEST, info)
    store.write_checksums(out)


def _taught(pairs: Pairs) -> dict[str, int]:
    """What store.json says of the pairs' teacher scores: nothing if there are none."""
    scores = pairs.teacher_score
    count = 0 if scores is None else int(np.isfinite(scores).sum())
    return {"teacher_scores": count} if count else {}


def _write_pairs(pairs: Pairs, folder: Path, sizes: dict[str, int], least: int) -> None:
    """Raises `DataError` for records that there are not, or scores outside [least, 100]."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = {side: (0, size - 1) for side, size in sizes.items()} | {"score": (least, 100)}
    for column, (low, high) in bounds.items():
        values = np.asarray(getattr(pairs, column))
        if len(values) != len(pairs) or not np.all((values >= low) & (values <= high)):
            raise DataError(
                f"pairs of {folder.name!r}: one {column} a pair, from {low} to {high}, is wanted"
            )
        np.save(folder / f"{column}.npy", values.astype(store.COLUMNS[column]))
    if _taught(pairs):
        taught = np.asarray(pairs.teacher_score, np.float32)
        if len(taught) != len(pairs) or np.isinf(taught).any():
            raise DataError(
                f"pairs of {folder.name!r}: one teacher_score a pair is wanted, a number or NaN"
            )
        np.save(folder / "teacher_score.npy", taught)


def _name(source: Source) -> str:
    return str(source.provenance().get("source", type(source).__name__))
