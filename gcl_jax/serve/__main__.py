"""A JSON API to embed and to search with a run: `python -m gcl_jax.serve --workdir=runs/demo`.

POST /embed     {"queries": [...]} or {"documents": [...]}: their embeddings
POST /search    {"queries": [...], "k": 10}: ids and cosines of the best documents; one query also
                as GET /search?query=sad+cat&k=10; of a server with --hybrid fused with those by
                words, unless a request says "hybrid": false
GET  /health    what is served, and whether it is ready
GET  /metrics   for Prometheus

Without a token it listens on this machine alone, and serves the search page, too. With one any
--host goes; requests then need the header `Authorization: Bearer TOKEN`, and there is no page.
docs/search.md has it all.
"""

import argparse
import os
from pathlib import Path

from gcl_jax import runs
from gcl_jax.errors import ArgumentParser, UserError, reported_in_one_line
from gcl_jax.paths import local_path
from gcl_jax.runs import one_store
from gcl_jax.search import hybrid

LOCAL = "127.0.0.1"
VARIABLE = "GCL_JAX_TOKEN"
LEAST = 16  # characters of a token


def token_of(token: str | None, file: Path | None) -> str | None:
    """The token that was given, by itself, in a file or by the environment.

    Raises:
        UserError: it is none, or the file cannot be read.
    """
    where = "--token"
    if file is not None:
        where = f"--token_file={file}"
        try:
            token = file.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "a token is ASCII"
            raise UserError(f"{where}: {reason}") from None
    elif token is None and VARIABLE in os.environ:
        where, token = f"the environment's {VARIABLE}", os.environ[VARIABLE]
    if token is None:
        return None
    if len(token) < LEAST or not all("!" <= letter <= "~" for letter in token):
        raise UserError(
            f"{where} must have {LEAST} characters or more, ASCII without blanks; "
            "`openssl rand -hex 32` makes one"
        )
    return token


def main() -> None:
    parser = ArgumentParser(
        prog="python -m gcl_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=local_path, required=True, help="directory of a training run")
    add("--split", help="search only the corpus of this split (default: all documents)")
    add("--embed_dim", type=runs.count, help="leading dimensions of embeddings (default: config)")
    add("--hybrid", action="store_true", help="/search ranks by words (BM25), too")
    add("--host", default=LOCAL, help=f"where to listen; another than {LOCAL} needs a token")
    add("--port", type=runs.port, default=8000, help="0 is any free one (default: 8000)")
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument("--token", help=f"that requests must bear (default: ${VARIABLE})")
    secret.add_argument("--token_file", type=local_path, metavar="FILE", help="that holds it")
    runs.add_checkpoint(parser)
    args = parser.parse_args()
    with reported_in_one_line():
        # Told before jax is loaded and anything is embedded.
        token = token_of(args.token, args.token_file)
        if token is None and args.host not in (LOCAL, "localhost"):
            raise UserError(
                f"--host={args.host} lets others in: give --token_file=FILE, or set {VARIABLE}"
            )
        store = one_store([args.workdir])
        cfg = store.resolve(runs.load_config(args.workdir))
        runs.set_embed_dim(cfg, args.embed_dim)
        if args.split is not None:
            store.pairs(args.split)
        if args.hybrid:
            hybrid.check(store, cfg.data.query_fields)

        from gcl_jax.serve.api import serve

        model = args.workdir, args.checkpoint, args.split, args.embed_dim
        serve(*model, args.host, args.port, token, args.hybrid)


if __name__ == "__main__":
    main()
