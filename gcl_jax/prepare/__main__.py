"""Makes a store, which training reads, from scored pairs of queries and documents.

--source=tables (default): your own CSV or TSV files with a header line, JSONL or parquet, in UTF-8.
A pair is a query, a document and a score from 1 to 100, 100 best. Its documents' fields (title,
image, ...) stand in the same rows, or in files of their own given with --documents. An image is a
path, or in parquet bytes.

  python -m gcl_jax.prepare --out=stores/shop --pairs=pairs.csv --query_fields=query \\
      --document_fields=image:image,title --id_column=product_id --score_column=score

--source=clicks: logs of what was shown and clicked, which become scores (docs/data.md).

  python -m gcl_jax.prepare --out=stores/shop --source=clicks --log=log.csv \\
      --documents=products.csv --document_fields=image:image,title

--source=marqo_gs: the folder --data of Marqo-GS-10M or a variant, as the authors' archive or as
parquet shards. --source=webdataset: tar files --data with images and captions. --source=folder: the
images below --data with captions. Captions have no scores: every pair has the best one.

  python -m gcl_jax.prepare --out=stores/gs --source=marqo_gs --data=DIR --image_root=DIR/images
  python -m gcl_jax.prepare --out=stores/web --source=webdataset --data shards/*.tar
  python -m gcl_jax.prepare --out=stores/art --source=folder --data=DIR --captions=captions.csv

--source=photos: a benchmark, 12,000 photographs of CIFAR-10 and queries that say what is seen, from
the folder --data, or fetched by TFDS.

  python -m gcl_jax.prepare --out=stores/photos --source=photos --data=cifar-10-batches-bin

A source of your own is a class or function in a module of yours (docs/data.md), by its name or by
its place:

  python -m gcl_jax.prepare --out=stores/mine --extensions=my_module --source=mine
  python -m gcl_jax.prepare --out=stores/mine --source=my_module:Mine --source_options limit=1000

A store is complete or absent. The same command again continues a run that was killed.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import shlex
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.data.store import VERSION
from gcl_jax.errors import ArgumentParser, ConfigError, reported_in_one_line, spelled
from gcl_jax.paths import local_path, output_path
from gcl_jax.prepare.clicks import FLAGS
from gcl_jax.prepare.records import scores_recipe
from gcl_jax.prepare.source import BadRows, arguments_of, code_checksum, make_source, naming_flags
from gcl_jax.prepare.stores import finished_store, trained_on, write_store
from gcl_jax.registry import SOURCES, load_extensions

FIELD_KINDS = ("text", "image")
LOCAL_BEAM = "--direct_running_mode=multi_processing --direct_num_workers=0"  # a process per core
NO_CONTENT = ("out", "workers", "beam", "extensions", "source_options")
OF_COMMAND = (*NO_CONTENT, "source", "on_error", "image_size")
# What an absent flag counts as in the fingerprint of a store, now as in earlier versions.
ABSENT: dict[str, Any] = {"documents": [], "split": "train", "seed": 0}
ABSENT |= {"image_column": "image", "caption_column": "caption"}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".tar", ".txt")


def parse_fields(text: str) -> dict[str, str]:
    """{column: kind} of "image:image,title"; the kind is "text" if not given."""
    fields = {}
    for item in text.split(","):
        column, _, kind = item.rpartition(":") if ":" in item else (item, "", "text")
        if not column or kind not in FIELD_KINDS:
            raise argparse.ArgumentTypeError(f"{item!r} is not COLUMN, COLUMN:text or COLUMN:image")
        if column in fields:
            raise argparse.ArgumentTypeError(f"column {column!r} is named twice")
        fields[column] = kind
    return fields


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out",
        type=output_path,
        required=True,
        metavar="DIR",
        help="the store to make; must not exist",
    )
    add(
        "--source",
        default="tables",
        metavar="NAME",
        help=f"what to read (default: tables): {', '.join(SOURCES)} (the last two are bundled, and "
        "take only --out), or one of your own, by name or MODULE:NAME",
    )
    add(
        "--extensions",
        type=lambda text: text.split(","),
        default=[],
        metavar="MODULE[,MODULE]",
        help="modules of your own, or Python files, to import first: they register sources",
    )
    add(
        "--source_options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of your own source that are no flag here",
    )
    add(
        "--data",
        type=local_path,
        nargs="+",
        metavar="PATH",
        help="of marqo_gs, folder and photos the folder, of webdataset tar files or folders of "
        "them",
    )
    add(
        "--image_root",
        type=local_path,
        metavar="DIR",
        help="where relative image paths begin, and which no path may leave (default: the folder "
        "of the file that names them)",
    )
    add(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="store images with so many pixels on their shorter side, as JPEG, unless they have "
        "fewer; loads several times as fast (default: image files as they are)",
    )
    add(
        "--on_error",
        choices=("strict", "skip"),
        default="strict",
        help="stop at the first bad row (default), or leave bad rows out and list them in "
        "OUT/skipped.jsonl; an unreadable image then counts as missing",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="threads that read and check images (default: one per core)",
    )
    add(
        "--beam",
        nargs="?",
        const=LOCAL_BEAM,
        metavar="OPTIONS",
        help="write the records with Apache Beam, for data too large for one machine: its "
        f'pipeline\'s options, e.g. --beam="--runner=FlinkRunner ..."; alone, "{LOCAL_BEAM}"',
    )
    add = parser.add_argument_group("tables").add_argument
    add(
        "--pairs", type=local_path, nargs="+", metavar="FILE", help="files with a scored pair a row"
    )
    add(
        "--documents",
        type=local_path,
        nargs="+",
        metavar="FILE",
        help="files with one document a row (default: the documents stand in the pairs' rows)",
    )
    add("--query_fields", type=parse_fields, metavar="COLUMNS", help="the query's, e.g. query")
    add(
        "--document_fields",
        type=parse_fields,
        metavar="COLUMNS",
        help="the document's columns, e.g. image:image,title: an image and a text",
    )
    add("--id_column", metavar="COLUMN", help="the document's id")
    add(
        "--score_column",
        metavar="COLUMN",
        help="the score, from 1 to 100, 100 best; marqo_gs has score_linear (default), "
        "score_reciprocal and no_score",
    )
    for column, meaning in {
        "query_id": "the query's id (default: its texts)",
        "negative_documents": "hard negatives: a list of document ids, in a text file as JSON",
        "negative_queries": "hard negatives: a list of other queries' texts",
        "teacher_score": "what another model says of the pair, any number or nothing, to distill",
    }.items():
        add(f"--{column}_column", metavar="COLUMN", help=meaning)
    clicks = parser.add_argument_group("clicks, beside --documents and the columns of tables")
    for name, about in FLAGS.items():
        clicks.add_argument(f"--{name}", **about)
    add = parser.add_argument_group("folder").add_argument
    add(
        "--captions",
        type=local_path,
        metavar="FILE",
        help="a table of captions (default: a.txt of a.jpg)",
    )
    add("--image_column", metavar="COLUMN", help="its paths (default: image)")
    add("--caption_column", metavar="COLUMN", help="(default: caption)")
    splits = parser.add_argument_group("splits of tables")
    one = splits.add_mutually_exclusive_group()
    one.add_argument(
        "--split",
        choices=("train", "paper"),
        help="all pairs in one split, or the paper's in_domain, novel_query, novel_document and "
        "zero_shot, drawn from 80/20 of the queries and 50/50 of the documents (default: train and "
        "val by --val_share)",
    )
    one.add_argument(
        "--split_column",
        metavar="COLUMN",
        help="the column that names each split; the queries of every split search all documents",
    )
    splits.add_argument(
        "--val_share",
        type=float,
        metavar="SHARE",
        help="of the queries, with all their pairs, for a split val; they search all documents "
        "(default: 0.1 of 100 queries or more, without the flags above; 0: one split)",
    )
    splits.add_argument("--seed", type=int, help="of splits that are drawn (default 0)")
    return parser


def prepare(args: argparse.Namespace):
    """The `RankedStore` that the command's arguments ask for.

    Raises:
        ConfigError: the source cannot do with these arguments.
        DataError: bad input; nothing is left at `args.out` then.
    """
    if args.image_size is not None and args.image_size < 1:
        raise ConfigError(f"--image_size={args.image_size}: give 1 pixel or more")
    load_extensions(args.extensions)
    make = find_source(args.source)
    given = given_arguments(args, make)
    fingerprint = fingerprint_of(args, given, make)
    if existing := finished_store(args.out, fingerprint):
        return existing
    bad_rows = BadRows(args.on_error)
    beam = None if args.beam is None else shlex.split(args.beam)
    with naming_flags(make, given):
        return write_store(
            make_source(make, given, bad_rows),
            args.out,
            bad_rows,
            fingerprint=fingerprint,
            workers=max(1, args.workers),
            beam=beam,
            image_size=args.image_size or 0,
        )


def find_source(name: str) -> Callable[..., Any]:
    """The registered source `name`, or what "MODULE:NAME" says."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return SOURCES[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--source={name} is not found: {error}") from None


def given_arguments(args: argparse.Namespace, make: Callable[..., Any]) -> dict[str, Any]:
    """Arguments for `make`, which declares by its parameters what it takes and needs: flags of
    this command, and `--source_options`.

    Raises:
        ConfigError: one that it does not take, one that it needs, or one of another type.
    """
    parameters = arguments_of(make)
    given = {k: v for k, v in vars(args).items() if v is not None and k not in OF_COMMAND}
    options = [option.partition("=") for option in args.source_options]
    for name in (*given, *(name for name, _, _ in options)):
        if name not in parameters:
            takes = ", ".join(parameters) or "no arguments"
            raise ConfigError(f"--source={args.source} takes no {name!r}; it takes {takes}")
        value, kind = given.get(name), parameters[name].annotation
        if isinstance(value, list) and kind in (Path, Path | None):
            if len(value) > 1:
                raise ConfigError(f"--source={args.source} takes one --{name}, not {len(value)}")
            given[name] = value[0]
    for name, _, text in options:
        kind = parameters[name].annotation
        try:
            given[name] = _as(kind, text)
        except (ValueError, KeyError):
            wanted = inspect.formatannotation(kind)
            raise ConfigError(f"--source_options {name}={text}: it must be {wanted}") from None
    if needed := [k for k, p in parameters.items() if p.default is p.empty and k not in given]:
        raise ConfigError(f"missing --{needed[0]}; see --help for an example")
    return given


def _as(kind: Any, text: str) -> Any:
    """`text` as a value of the annotation `kind`; raises `ValueError` or `KeyError`."""
    inner = [k for k in typing.get_args(kind) if k is not types.NoneType]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _as(inner[0], text)
    if typing.get_origin(kind) is list:
        return [_as(inner[0], part) for part in text.split(",")]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is Path:
        return local_path(text)
    return kind(text) if kind in (int, float) else text


def fingerprint_of(
    args: argparse.Namespace, given: Mapping[str, Any], make: Callable[..., Any]
) -> str:
    """Stands for what decides a store's content: the arguments, and size and time of the tables
    that they name, or that lie in folders that they name. Image files are taken as unchanging."""
    options = {k: v for k, v in vars(args).items() if k not in NO_CONTENT}
    for name in ("image_size", "teacher_score_column", *FLAGS):  # not of earlier versions
        if options[name] is None:
            del options[name]
    options |= {k: v for k, v in ABSENT.items() if options[k] is None}
    if args.val_share is None and args.source == "tables" and not (args.split or args.split_column):
        options["val_share"] = "default"
    if not options["val_share"]:
        del options["val_share"]
    if not make.__module__.startswith("gcl_jax."):
        options["own"] = [code_checksum(make), sorted(args.source_options)]
    files = []
    for name in dict.fromkeys(["pairs", "documents", "data", "captions", *sorted(given)]):
        paths = given.get(name) if name != "image_root" else None
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, Path) and path.exists():
                inside = sorted(x for x in path.rglob("*") if x.suffix.lower() in TABLE_SUFFIXES)
                for file in inside if path.is_dir() else [path]:
                    status = file.stat()
                    files.append((str(file), status.st_size, status.st_mtime_ns))
    content = spelled(json.dumps([VERSION, options, files], default=str, sort_keys=True))
    return hashlib.sha256(content.encode()).hexdigest()


def summary(store) -> str:
    """What is in the store, what was left out, and the command to type next."""
    info, provenance = store.info, store.info["provenance"]
    lines = [f"{store.directory}: {len(store.documents)} documents, {len(store.queries)} queries"]
    seen = trained_on(store)
    for name, split in info["splits"].items():
        lines.append(
            f"  split {name}: {split['pairs']} pairs of {split['queries']} queries, "
            f"which search {split['documents']} documents"
        )
        lines += [f"    {seen[name]}"] if name in seen else []
        for side, pairs in split.get("negatives", {}).items():
            lines.append(f"    hard negatives ({side}): of {pairs} pairs")
    for side, fields in provenance.get("missing", {}).items():
        for field, count in fields.items():
            if count:
                lines.append(f"  {side} field {field}: missing in {count}")
    if merged := provenance.get("merged spellings"):
        lines.append(f"  queries that differ in case or blanks only, merged: {merged} spellings")
    if validation := provenance.get("validation"):
        lines.append(f"  {validation}")
    lines += provenance.get("report", [])
    recipe = provenance.get("scores")
    if provenance["source"] == "tables" and not recipe:
        recipe = scores_recipe(np.concatenate([store.pairs(n).score for n in info["splits"]]))
    if recipe:
        lines.append(f"  {recipe}")
    if hidden := provenance.get("hidden files"):
        lines.append(f"  hidden files (.DS_Store, ._*, __MACOSX), not read: {hidden}")
    if info.get("image_size"):
        lines.append(f"  images: {info['image_size']} pixels on the shorter side, or fewer")
    if skipped := provenance.get("skipped"):
        lines.append(f"  skipped, listed in {store.directory / 'skipped.jsonl'}:")
        lines += [f"    {reason}: {count}" for reason, count in skipped.items()]

    command = ["python -m gcl_jax.train --config=configs/own_data.py --workdir=runs/NAME"]
    command += [f"--config.data.store={shlex.quote(str(store.directory))}"]
    if not any("image" in has.values() for has in store.kinds.values()):
        command.append("--config.model.vision=none")
    return "\n".join([*lines, "Train on it with", "  " + " \\\n    ".join(command)])


def main() -> None:
    args = make_parser().parse_args()
    with reported_in_one_line():
        print(spelled(summary(prepare(args))))


if __name__ == "__main__":
    main()
