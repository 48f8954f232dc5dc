"""Makes a store, which training reads, from scored pairs of queries and documents.

--source=tables (default): your own CSV or TSV files with a header line, JSONL or parquet, in UTF-8.
A pair is a query, a document and a score from 1 to 100, 100 best. Its documents' fields (title,
image, ...) stand in the same rows, or in files of their own given with --documents. An image is a
path, or in parquet bytes.

  python -m gcl_jax.prepare --out=stores/shop --pairs=pairs.csv --query_fields=query \\
      --document_fields=image:image,title --id_column=product_id --score_column=score

--source=marqo_gs: the folder --data of Marqo-GS-10M or a variant, as the authors' archive or as
parquet shards. --source=webdataset: tar files --data with images and captions. --source=folder: the
images below --data with captions. Captions have no scores: every pair has the best one.

  python -m gcl_jax.prepare --out=stores/gs --source=marqo_gs --data=DIR --image_root=DIR/images
  python -m gcl_jax.prepare --out=stores/web --source=webdataset --data shards/*.tar
  python -m gcl_jax.prepare --out=stores/art --source=folder --data=DIR --captions=captions.csv

A store is complete or absent. The same command again continues a run that was killed.
"""

import argparse
import os
import shlex
from pathlib import Path

from gcl_jax.errors import DataError, reported_in_one_line
from gcl_jax.stores import BUNDLED

HOW = ("out", "workers", "beam")  # arguments that leave the store's content alone
FIELD_KINDS = ("text", "image")
NEEDED: dict[str, tuple[str, ...]] = {  # per source
    "tables": ("pairs", "query_fields", "document_fields", "id_column", "score_column"),
    "marqo_gs": ("data",),
    "webdataset": ("data",),
    "folder": ("data",),
    **dict.fromkeys(BUNDLED, ()),
}
LOCAL_BEAM = "--direct_running_mode=multi_processing --direct_num_workers=0"  # a process per core


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
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the store to make; must not exist")
    add(
        "--source",
        choices=tuple(NEEDED),
        default="tables",
        help="what to read (default: tables); emoji and emoji_languages are bundled and take only "
        "--out",
    )
    add(
        "--data",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="of marqo_gs and folder the folder, of webdataset tar files or folders of them",
    )
    add(
        "--image_root",
        type=Path,
        metavar="DIR",
        help="where relative image paths begin, and which no path may leave (default: the folder "
        "of the file that names them)",
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
    add("--pairs", type=Path, nargs="+", metavar="FILE", help="files with one scored pair a row")
    add(
        "--documents",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files with one document a row (default: the documents stand in the pairs' rows)",
    )
    add(
        "--query_fields",
        type=parse_fields,
        metavar="COLUMNS",
        help="the query's columns, e.g. query",
    )
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
    add("--query_id_column", metavar="COLUMN", help="the query's id (default: its texts)")
    add(
        "--negative_documents_column",
        metavar="COLUMN",
        help="hard negatives: a list of document ids, in a text file as JSON",
    )
    add(
        "--negative_queries_column",
        metavar="COLUMN",
        help="hard negatives: a list of other queries' texts",
    )
    add = parser.add_argument_group("folder").add_argument
    add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="a table of captions (default: a.txt of a.jpg)",
    )
    add("--image_column", default="image", metavar="COLUMN", help="its paths (default: image)")
    add("--caption_column", default="caption", metavar="COLUMN", help="(default: caption)")
    splits = parser.add_argument_group("splits of tables")
    one = splits.add_mutually_exclusive_group()
    one.add_argument(
        "--split",
        choices=("train", "paper"),
        default="train",
        help="all pairs in one split (default), or the paper's in_domain, novel_query, "
        "novel_document and zero_shot, drawn from 80/20 of the queries and 50/50 of the documents",
    )
    one.add_argument("--split_column", metavar="COLUMN", help="the column that names each split")
    splits.add_argument("--seed", type=int, default=0, help="of the paper's splits (default 0)")
    return parser


def prepare(args: argparse.Namespace):
    """The `RankedStore` that the command's arguments ask for.

    Raises:
        DataError: bad input; nothing is left at `args.out` then.
    """
    from gcl_jax.prepare.bad_rows import BadRows
    from gcl_jax.prepare.builder import finished_store, write_store
    from gcl_jax.prepare.plan import fingerprint

    given = (*(args.pairs or ()), *args.documents, *(args.data or ()))
    options = {name: value for name, value in vars(args).items() if name not in HOW}
    plan = fingerprint(options, given if args.captions is None else (*given, args.captions))
    if existing := finished_store(args.out, plan):
        return existing
    bad_rows = BadRows(args.on_error)
    source = make_source(args, bad_rows)
    beam = None if args.beam is None else shlex.split(args.beam)
    workers = max(1, args.workers)
    return write_store(source, args.out, bad_rows, plan=plan, workers=workers, beam=beam)


def make_source(args: argparse.Namespace, bad_rows):
    """The `Source` that the arguments describe."""
    if args.source in BUNDLED:
        from gcl_jax.prepare.emoji import SOURCES

        return SOURCES[args.source]()
    if args.source in ("marqo_gs", "folder") and len(args.data) > 1:
        raise DataError(f"--source={args.source} takes one folder --data, not {len(args.data)}")
    if args.source == "marqo_gs":
        from gcl_jax.prepare.marqo_gs import SCORE, MarqoGSSource

        return MarqoGSSource(
            args.data[0],
            bad_rows,
            image_root=args.image_root,
            score=args.score_column or SCORE,
            document_fields=args.document_fields,
        )
    if args.source == "webdataset":
        from gcl_jax.prepare.captions import webdataset_source

        return webdataset_source(args.data, bad_rows)
    if args.source == "folder":
        from gcl_jax.prepare.captions import folder_source

        named = (args.image_column, args.caption_column)
        return folder_source(args.data[0], bad_rows, args.captions, named)

    from gcl_jax.prepare.columns import Columns, Table
    from gcl_jax.prepare.tables import TablesSource

    columns = Columns(
        args.query_fields,
        args.document_fields,
        args.id_column,
        args.score_column,
        args.query_id_column,
        args.split_column,
        args.negative_documents_column,
        args.negative_queries_column,
    )
    return TablesSource(
        args.out.name,
        [Table(path) for path in args.pairs],
        columns,
        bad_rows,
        documents=[Table(path) for path in args.documents],
        image_root=args.image_root,
        split=args.split,
        seed=args.seed,
    )


def summary(store) -> str:
    """What is in the store, what was left out, and the command to type next."""
    info, provenance = store.info, store.info["provenance"]
    lines = [f"{store.directory}: {len(store.documents)} documents, {len(store.queries)} queries"]
    for name, split in info["splits"].items():
        lines.append(
            f"  split {name}: {split['pairs']} pairs of {split['queries']} queries, "
            f"which search {split['documents']} documents"
        )
        for side, pairs in split.get("negatives", {}).items():
            lines.append(f"    hard negatives ({side}): of {pairs} pairs")
    for side, fields in provenance.get("missing", {}).items():
        for field, count in fields.items():
            if count:
                lines.append(f"  {side} field {field}: missing in {count}")
    if skipped := provenance.get("skipped"):
        lines.append(f"  skipped, listed in {store.directory / 'skipped.jsonl'}:")
        lines += [f"    {reason}: {count}" for reason, count in skipped.items()]

    command = ["python -m gcl_jax.train --config=configs/YOURS.py --workdir=runs/NAME"]
    command += [f"--config.data.store={shlex.quote(str(store.directory))}"]
    return "\n".join([*lines, "Train on it with", "  " + " \\\n    ".join(command)])


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if absent := [name for name in NEEDED[args.source] if not getattr(args, name)]:
        parser.error(f"missing --{absent[0]}; see --help for an example")
    with reported_in_one_line():
        print(summary(prepare(args)))


if __name__ == "__main__":
    main()
