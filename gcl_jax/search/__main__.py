"""Search the documents of a run: `python -m gcl_jax.search --workdir=runs/demo "sad cat"`.

Prints a table of the best documents, or JSON. The first call embeds the documents, and keeps them
in WORKDIR/embeddings. With --serve it serves a page to search with; several --workdir then answer
side by side.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from gcl_jax.data.transforms import read_file
from gcl_jax.errors import ArgumentParser, UserError, reported_in_one_line
from gcl_jax.models.families import require_tokens
from gcl_jax.paths import local_path, output_path
from gcl_jax.runs import (
    CHECKPOINT,
    NEWEST,
    count,
    load_config,
    load_run,
    one_store,
    port,
    set_embed_dim,
)
from gcl_jax.search import calibration, hybrid
from gcl_jax.search.searcher import (
    SearchIndex,
    as_results,
    format_table,
    image_type,
    one_line,
    save_images,
)

# Arguments that only one of the two ways to search has; the page asks for its own.
SERVED = {"port": "--port"}
NOT_SERVED = {"texts": "QUERY", "query": "--query", "top_k": "--top_k", "json": "--json"}
NOT_SERVED |= {"images": "--images", "hybrid": "--hybrid", "maxsim": "--maxsim"}


def parse_queries(
    kinds: Mapping[str, str], texts: Sequence[str], assignments: Sequence[str]
) -> list[dict[str, str | bytes]]:
    """One query per text; `assignments` (FIELD=VALUE) are fields that all of them share, or the one
    query when there is no text. A text goes to the first text field that is not assigned: one tower
    reads them all alike, whatever their name.

    Args:
        kinds: {field: "text" or "image"}, the query fields of the model.

    Raises:
        UserError: an empty query, or one that does not fit the fields.
    """
    shared = dict(_parse_assignment(kinds, assignment) for assignment in assignments)
    free = [field for field, kind in kinds.items() if kind == "text" and field not in shared]
    if texts and not free:
        raise UserError(
            f"no text field is left for {texts[0]!r}: the query fields are {', '.join(kinds)}"
        )
    queries = [shared | {free[0]: text.strip()} for text in texts] or [shared]
    if not all(any(query.values()) for query in queries) or not all(map(str.strip, texts)):
        raise UserError("the query is empty")
    return queries


def _parse_assignment(kinds: Mapping[str, str], assignment: str) -> tuple[str, str | bytes]:
    field, _, value = assignment.partition("=")
    if field not in kinds:
        raise UserError(
            f"--query={assignment!r}: write FIELD=VALUE; the query fields are {', '.join(kinds)}"
        )
    if kinds[field] == "text":
        return field, value.strip()
    try:
        return field, read_file(local_path(value))
    except OSError as error:
        raise UserError(
            f"--query={assignment!r}: cannot read the image: {error.strerror}"
        ) from None


def search_run(args: argparse.Namespace) -> None:
    """The command, with parsed arguments."""
    # Whatever can be wrong with the arguments is told before jax and the model are loaded.
    for name in ("workdir", "checkpoint"):
        if len(getattr(args, name)) > 1:
            raise UserError(f"several --{name} go with --serve only")
    (workdir,), (checkpoint,) = args.workdir, args.checkpoint or [NEWEST]
    store = one_store([workdir])
    cfg = store.resolve(load_config(workdir))
    set_embed_dim(cfg, args.embed_dim)
    kinds = {
        field: store.queries.fields[field] for field, w in cfg.data.query_fields.items() if w > 0
    }
    queries = parse_queries(kinds, args.texts, args.query)
    if args.hybrid:
        hybrid.check(store, cfg.data.query_fields)
    if args.maxsim:
        require_tokens(cfg.model, "--maxsim")
        if args.hybrid:
            raise UserError("--maxsim does not go with --hybrid: give one of them")
    rows = store.corpus(args.split) if args.split else np.arange(len(store.documents))

    run = load_run(workdir, args.embed_dim, checkpoint=checkpoint)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    cosines = not (args.hybrid or args.maxsim)
    meaning = calibration.of_run(run, workdir, args.embed_dim) if cosines else None
    if args.maxsim:
        from gcl_jax.search import maxsim

        hits = maxsim.search_run(run, workdir, rows, queries, args.top_k)
    else:
        index = SearchIndex(run, rows, workdir)
        hits = index.search(queries, max(args.top_k, hybrid.DEPTH if args.hybrid else 0))
    if args.hybrid:
        texts = [hybrid.text_of(store.queries, query) for query in queries]
        words, near = hybrid.Words(store.documents, rows), np.searchsorted(rows, hits[1])
        scores, best = words.joined(texts, near, args.top_k)
        hits = scores, rows[best]
    answers = zip(queries, *hits, strict=True)
    for number, (query, scores, found) in enumerate(answers, 1):
        results = as_results(store.documents, scores, found, meaning)
        shown = [v if isinstance(v, str) else f"<{image_type(v)}>" for v in query.values() if v]
        if args.images:
            save_images(store.documents, found, args.images, str(number))
        if args.json:
            utf8 = sys.stdout.encoding.lower().startswith("utf")  # another would break the JSON
            line = {"query": " + ".join(shown), "results": results}
            print(json.dumps(line, ensure_ascii=not utf8))
        else:
            if len(queries) > 1:
                print(f"{number}. {' + '.join(map(one_line, shown))}")
            print(format_table(results, width))


def serve_runs(args: argparse.Namespace) -> None:
    """The search page, with parsed arguments."""
    runs, checkpoints = len(args.workdir), args.checkpoint or [NEWEST]
    if len(checkpoints) not in (1, runs):
        raise UserError(
            f"{len(checkpoints)} --checkpoint for {runs} --workdir: give one for all, or one each"
        )
    store = one_store(args.workdir)  # told before jax is loaded and anything is embedded
    if args.split:
        store.corpus(args.split)
    for workdir in args.workdir:
        set_embed_dim(load_config(workdir), args.embed_dim)

    from gcl_jax.search.serve import serve

    checkpoints = checkpoints * (runs // len(checkpoints))
    serve(args.workdir, checkpoints, args.split, args.embed_dim, args.port)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m gcl_jax.search",
        description="Search the documents of a trained model.",
        epilog='example: python -m gcl_jax.search --workdir=runs/demo "sad cat" --top_k=5',
    )
    parser.add_argument("texts", nargs="*", metavar="QUERY", help="what to search for")
    parser.add_argument(
        "--workdir",
        type=local_path,
        required=True,
        action="append",
        help="directory of a training run; with --serve repeat it to compare runs side by side",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        help=f"{CHECKPOINT}; with --serve also one for each --workdir",
    )
    parser.add_argument("--top_k", type=count, default=10, help="documents per query (default: 10)")
    parser.add_argument(
        "--split", help="search only the corpus of this split (default: all documents of the store)"
    )
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a query field by name, an image by its path; repeat it for a query of several fields",
    )
    parser.add_argument(
        "--embed_dim",
        type=count,
        help="leading dimensions of the embeddings (default: config)",
    )
    parser.add_argument(
        "--hybrid",
        action="store_true",
        help="rank by words (BM25) and embeddings together: reciprocal rank fusion",
    )
    parser.add_argument(
        "--maxsim",
        action="store_true",
        help="rank by late interaction of tokens: the mean over the query's of the best of each "
        "document's (for a run that learned by loss.objectives.filip)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per query, one per line"
    )
    parser.add_argument(
        "--images",
        type=output_path,
        metavar="FOLDER",
        help="also save the pictures of the results there",
    )
    parser.add_argument(
        "--serve", action="store_true", help="serve a search page to this machine's browser"
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="of the page; 0 is any free one (default: 8000)"
    )
    args = parser.parse_intermixed_args()
    default = vars(parser.parse_intermixed_args(["--workdir=."]))
    given = {name for name, value in vars(args).items() if value != default[name]}
    with reported_in_one_line():
        for name, flag in NOT_SERVED.items() if args.serve else SERVED.items():
            if name in given:
                raise UserError(f"{flag} does not go {'with' if args.serve else 'without'} --serve")
        if args.serve:
            serve_runs(args)
        else:
            search_run(args)


if __name__ == "__main__":
    main()
