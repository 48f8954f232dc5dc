"""The search page: `python -m gcl_jax.search --serve --workdir=RUN`; docs/search.md has its API.

It listens on 127.0.0.1 alone, and refuses what another page in the same browser could make of that:
requests under another host's name (DNS rebinding) or from another site. No request names a file.
Large images are decoded beside the searches of others, and connections are limited in number.
"""

import abc
import contextlib
import importlib.resources
import json
import os
import queue
import select
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from http.server import HTTPServer
from pathlib import Path

import numpy as np
from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    NotFound,
    RequestEntityTooLarge,
)
from werkzeug.routing import Map, Rule
from werkzeug.serving import (
    ThreadedWSGIServer,
    WSGIRequestHandler,
    select_address_family,
)
from werkzeug.wrappers import Request, Response

from gcl_jax.data.store import Records
from gcl_jax.data.transforms import open_image
from gcl_jax.errors import DataError, UserError, in_one_line
from gcl_jax.search.searcher import (
    MAX_K,
    Query,
    Searcher,
    as_results,
    fields_of_kind,
    image_type,
)

ADDRESS = "127.0.0.1"
HOSTS = ["localhost", ADDRESS]
CONNECTIONS = 64  # that are answered at a time
MAX_CHARACTERS = 1_000  # of a typed query
MAX_BYTES = 2**25  # of an image
MAX_PIXELS = 40_000_000  # of a query: less than a store may hold, since somebody waits for it
SHOWN = ("png", "jpeg", "webp", "gif", "bmp", "avif")
PAGE = {"search.html": "text/html", "search.css": "text/css", "search.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # another run may be served under this address later
}


class App(abc.ABC):
    """A WSGI application that says what it refuses, and what fails, as {"error": one line}."""

    @abc.abstractmethod
    def answer(self, environ) -> Response:
        """To the request that `environ` describes (PEP 3333). What it raises is told: an
        `HTTPException` as it says, `queue.Full` as 429, a `UserError` as 400."""

    def __call__(self, environ, start_response):
        try:
            response = self.answer(environ)
        except HTTPException as error:
            response = as_json({"error": error.description}, error.code)
            # Such as the methods that are allowed.
            more = (x for x in error.get_headers(environ) if x[0] != "Content-Type")
            response.headers.extend(more)
        except queue.Full:
            response = as_json({"error": "too many wait for an answer; ask again later"}, 429)
        except UserError as error:
            response = as_json({"error": in_one_line(error)}, 400)
        except Exception:
            traceback.print_exc()
            response = as_json({"error": "internal error; the terminal has its traceback"}, 500)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response(environ, start_response)


class SearchApp(App):
    """The page and its API."""

    def __init__(self, searchers: Sequence[Searcher]):
        """All searchers search the same store."""
        self._searchers = searchers
        self._store = searchers[0].store
        self._device = threading.Lock()
        # A core is left for those who only type.
        self._decoders = threading.Semaphore(max(1, (os.cpu_count() or 1) - 1))
        assets = importlib.resources.files("gcl_jax.search")
        self._assets = {name: assets.joinpath(name).read_bytes() for name in PAGE}
        get = ["GET"]
        self._urls = Map(
            [
                Rule("/", endpoint=lambda _: self._asset("search.html"), methods=get),
                Rule("/search.css", endpoint=lambda _: self._asset("search.css"), methods=get),
                Rule("/search.js", endpoint=lambda _: self._asset("search.js"), methods=get),
                Rule("/api/info", endpoint=self._info, methods=get),
                Rule("/api/search", endpoint=self._search, methods=["GET", "POST"]),
                Rule("/image/<row>/<field>", endpoint=self._image, methods=get),
            ],
            merge_slashes=False,
        )

    def answer(self, environ) -> Response:
        request = local_request(environ)
        endpoint, values = self._urls.bind_to_environ(environ).match()
        return endpoint(request, **values)

    def _asset(self, name: str) -> Response:
        return Response(self._assets[name], content_type=f"{PAGE[name]}; charset=utf-8")

    def _info(self, request: Request) -> Response:
        return as_json(
            {
                "store": self._store.name,
                "documents": self._searchers[0].documents,
                "runs": [{"name": s.name, "step": s.step} for s in self._searchers],
                "images": all(searcher.takes_images for searcher in self._searchers),
                "max_k": MAX_K,
                "max_bytes": MAX_BYTES,
                "examples": _examples(self._store.queries),
            }
        )

    def _search(self, request: Request) -> Response:
        top_k = whole_number(request.args.get("k", "10"))
        if top_k is None or not 1 <= top_k <= MAX_K:
            raise BadRequest(f"k is not a whole number from 1 to {MAX_K}")
        if request.method == "POST":
            queries = self._image_queries(request)
        else:
            queries = [_text_query(request)] * len(self._searchers)
        runs = []
        for searcher, query in zip(self._searchers, queries, strict=True):
            with self._device:
                start = time.perf_counter()
                scores, rows = searcher.search(query, top_k)
                milliseconds = round(1e3 * (time.perf_counter() - start), 1)
            results = as_results(self._store.documents, scores, rows, searcher.calibration)
            for result, row in zip(results, rows.tolist(), strict=True):
                result |= {"row": row, "images": self._image_addresses(row)}
            runs.append({"name": searcher.name, "milliseconds": milliseconds, "results": results})
        return as_json({"query": queries[0].get("text"), "k": top_k, "runs": runs})

    def _image_queries(self, request: Request) -> list[Query]:
        """What each searcher sees of the image."""
        for searcher in self._searchers:
            if not searcher.takes_images:
                raise BadRequest(f"the model of {searcher.name} has no image tower")
        try:
            encoded = request.get_data(cache=False)
        except RequestEntityTooLarge:
            raise RequestEntityTooLarge(
                f"the image has more than {MAX_BYTES / 2**20:g} MiB"
            ) from None
        check_image(encoded)
        with self._decoders:
            return [{"image": searcher.pixels(encoded)} for searcher in self._searchers]

    def _image_addresses(self, row: int) -> list[str]:
        documents = self._store.documents
        images = fields_of_kind(documents, documents[row], "image")
        return [f"/image/{row}/{field}" for field in images]

    def _image(self, request: Request, row: str, field: str) -> Response:
        documents, number = self._store.documents, whole_number(row)
        if number is None or number >= len(documents) or documents.fields.get(field) != "image":
            raise NotFound("there is no such image")
        encoded = fields_of_kind(documents, documents[number], "image").get(field)
        if encoded is None:
            raise NotFound("the document lacks this image")
        try:
            kind = image_type(encoded)
        except DataError as error:
            raise NotFound(str(error)) from None
        if kind not in SHOWN:
            raise NotFound(f"no browser shows {kind}")
        headers = {"Content-Security-Policy": "default-src 'none'; sandbox"}
        return Response(encoded, content_type=f"image/{kind}", headers=headers)


def local_request(environ) -> Request:
    """A request that somebody at this machine makes.

    Raises:
        BadRequest, Forbidden: another page in the same browser makes it, or it might.
    """
    request = Request(environ)
    request.max_content_length = MAX_BYTES
    request.trusted_hosts = HOSTS
    # Reading `host` compares it with the trusted ones; without a header it is our own.
    if not (request.host and request.headers.get("Host")):
        raise BadRequest("a request needs a Host header")
    # A link from elsewhere may open the page; nothing else may be asked from elsewhere.
    site = request.headers.get("Sec-Fetch-Site", "none")
    if request.path != "/" and site not in ("same-origin", "none"):
        raise Forbidden("asked by another site")
    return request


def _text_query(request: Request) -> Query:
    text = request.args.get("q", "").strip()
    if not text:
        raise BadRequest("the query is empty")
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"the query has {len(text):,} characters; at most {MAX_CHARACTERS:,}")
    return {"text": text}


def check_image(encoded: bytes) -> None:
    """Looks at the header of an encoded image.

    Raises:
        DataError: not an image, of no common format, or of more than `MAX_PIXELS` pixels.
    """
    with open_image(encoded) as image:
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"the image has {width} x {height} = {width * height / 1e6:.0f} million pixels; at "
            f"most {MAX_PIXELS / 1e6:.0f} million are searched for"
        )


def whole_number(text: str) -> int | None:
    """None if it is no whole number of a sensible length."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def as_json(value: object, status: int | None = 200) -> Response:
    body = json.dumps(value, ensure_ascii=False)
    return Response(body, status=status, content_type="application/json; charset=utf-8")


def _examples(queries: Records, count: int = 6) -> list[str]:
    """Short texts of queries at equal distances in the store."""
    rows = np.linspace(0, len(queries) - 1, count, dtype=int)
    texts = [next(iter(fields_of_kind(queries, queries[row], "text").values()), "") for row in rows]
    return [text for text in dict.fromkeys(texts) if 0 < len(text) <= 60]


class QuietHandler(WSGIRequestHandler):
    timeout = 30  # seconds of a client's silence

    def log(self, *_) -> None:
        """The terminal is for errors; what people search for is not written down."""


class LimitedServer(ThreadedWSGIServer):
    """Answers at most `connections` at a time (default: `CONNECTIONS`), the others with 503."""

    def __init__(self, *args, connections: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._connections = connections or CONNECTIONS
        self._places = threading.Semaphore(self._connections)

    def start(self) -> None:
        """Serves in another thread, until `drain`."""
        # Werkzeug's own closes the socket when it ends.
        threading.Thread(target=HTTPServer.serve_forever, args=(self,), daemon=True).start()

    def drain(self, seconds: float) -> None:
        """Takes no more connections; returns when all there are have been answered, or later than
        `seconds`."""
        self.shutdown()
        self.timeout = 0  # of `handle_request`, should one be gone again
        while select.select([self], [], [], 0)[0]:  # they are connected, and know nothing of it
            self.handle_request()
        end = time.monotonic() + seconds
        for _ in range(self._connections):
            self._places.acquire(timeout=max(0, end - time.monotonic()))
        self.server_close()

    def process_request(self, request, client_address) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address; `port` 0 takes a free one.

    Raises:
        UserError: there is no such address here, or it is in use.
    """
    with socket.socket(select_address_family(host, port)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            raise UserError(f"--port={port}: {error.strerror}; choose another one") from None
        yield listener


def serve(
    workdirs: Sequence[Path],
    checkpoints: Sequence[str],
    split: str | None,
    embed_dim: int | None,
    port: int,
) -> None:
    """Serves the page until Ctrl-C, for a checkpoint of each run, all over one store; `port` 0
    takes a free one, and the address is printed.

    Raises:
        ConfigError, DataError, UserError: as `Searcher`; the port is in use.
    """
    with listening(ADDRESS, port) as listener:
        runs = zip(workdirs, checkpoints, strict=True)
        app = SearchApp([Searcher(w, split, embed_dim, checkpoint) for w, checkpoint in runs])
        server = LimitedServer(ADDRESS, port, app, QuietHandler, fd=listener.fileno())
        print(f"search page: http://localhost:{server.port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
