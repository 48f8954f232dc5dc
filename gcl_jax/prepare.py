"""Makes a store, which training reads, from your own tables of scored pairs.

A pair is a query, a document and a score from 1 to 100, 100 best. Its documents' fields (title,
image, ...) stand in the same rows, or in a file of their own given with --documents. Files are
CSV or TSV with a header line, JSONL, or parquet, in UTF-8. An image is a path, or in parquet bytes.

  python -m gcl_jax.prepare --out=stores/shop --pairs=pairs.csv --query_fields=query \\
      --document_fields=image:image,title --id_column=product_id --score_column=score
"""

import argparse
import shlex
from pathlib import Path

from gcl_jax.errors import reported_in_one_line

FIELD_KINDS = ("text", "image")


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
        choices=("tables", "emoji"),
        default="tables",
        help="your tables (default), or the bundled emoji benchmark, which takes only --out",
    )
    add = parser.add_argument_group("your tables").add_argument
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
    add("--score_column", metavar="COLUMN", help="the score, from 1 to 100, 100 best")
    add("--query_id_column", metavar="COLUMN", help="the query's id (default: its texts)")
    add(
        "--image_root",
        type=Path,
        metavar="DIR",
        help="where relative image paths begin (default: the folder of the file that names them)",
    )
    add(
        "--on_error",
        choices=("strict", "skip"),
        default="strict",
        help="stop at the first bad row (default), or leave bad rows out and list them in "
        "OUT/skipped.jsonl; an unreadable image then counts as missing",
    )
    splits = parser.add_argument_group("splits")
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
    from gcl_jax.datasets.bad_rows import BadRows
    from gcl_jax.datasets.builder import check_absent, write_store

    if args.source == "emoji":
        from gcl_jax.datasets.emoji import EmojiSource

        return write_store(EmojiSource(), args.out)

    from gcl_jax.datasets.tables import Columns, TablesSource

    check_absent(args.out)
    bad_rows = BadRows(args.on_error)
    columns = Columns(
        args.query_fields,
        args.document_fields,
        args.id_column,
        args.score_column,
        args.query_id_column,
        args.split_column,
    )
    source = TablesSource(
        args.out.name,
        args.pairs,
        columns,
        bad_rows,
        documents=args.documents,
        image_root=args.image_root,
        split=args.split,
        seed=args.seed,
    )
    return write_store(source, args.out, bad_rows)


def summary(store) -> str:
    """What is in the store, what was left out, and the command to type next."""
    info, provenance = store.info, store.info["provenance"]
    lines = [f"{store.directory}: {len(store.documents)} documents, {len(store.queries)} queries"]
    for name, split in info["splits"].items():
        lines.append(
            f"  split {name}: {split['pairs']} pairs of {split['queries']} queries, "
            f"which search {split['documents']} documents"
        )
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
    needed = ("pairs", "query_fields", "document_fields", "id_column", "score_column")
    if args.source == "tables" and (absent := [name for name in needed if not getattr(args, name)]):
        parser.error(f"missing --{absent[0]}; see --help for an example")
    with reported_in_one_line():
        print(summary(prepare(args)))


if __name__ == "__main__":
    main()
