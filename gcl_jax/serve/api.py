"""The API as a WSGI application, its figures, and its life from a socket to a signal.

Requests check, decode and wait in threads of their own; one thread has the device, and takes up to
64 of what waits at a time (`gcl_jax.search.searcher.Batcher`).
"""

import base64
import binascii
import bisect
import collections
import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import (
    BadRequest,
    RequestEntityTooLarge,
    ServiceUnavailable,
    Unauthorized,
)
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from gcl_jax.errors import DataError
from gcl_jax.search.hybrid import text_of
from gcl_jax.search.searcher import MAX_K, Found, Searcher, probabilities
from gcl_jax.search.serve import (
    MAX_BYTES,
    App,
    LimitedServer,
    QuietHandler,
    SearchApp,
    as_json,
    check_image,
    listening,
    local_request,
    whole_number,
)

BATCH_SIZES = (1, 4, 16, 64)  # that are compiled; a batch is filled up to one of them
CONNECTIONS = 256
MAX_RECORDS = 256  # of a request
MAX_CHARACTERS = 10_000  # of a text
GRACE = 20  # seconds for what is in flight when a signal comes
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Images take memory while they are decoded, and a core is left for those who only send texts.
DECODING = threading.Semaphore(max(1, (os.cpu_count() or 1) - 1))
PATHS = ("/embed", "/search", "/health", "/metrics")


class Histogram:
    """Numbers counted up to given bounds, as Prometheus wants them."""

    def __init__(self, bounds: Iterable[float]):
        self._bounds = [*bounds, float("inf")]
        self._counts, self._sum = [0] * len(self._bounds), 0.0

    def add(self, x: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, x)] += times
        self._sum += times * x

    def lines(self, name: str, labels: str = "") -> Iterable[str]:
        for bound, count in zip(self._bounds, np.cumsum(self._counts), strict=True):
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'{name}_bucket{{{labels and labels + ","}le="{le}"}} {count}'
        yield f"{name}_sum{{{labels}}} {self._sum:.9g}"
        yield f"{name}_count{{{labels}}} {sum(self._counts)}"


class Api(App):
    """Answers 503 until `open` gives it a searcher, and from `closing` on."""

    def __init__(self, token: str | None = None):
        """With a `token` every request must bear it, but that for /health."""
        self._token, self.closing = token, False
        self._searcher: Searcher | None = None
        self._page: SearchApp | None = None
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._seconds = {path: Histogram(SECONDS) for path in PATHS}
        self._counting = threading.Lock()
        self._urls = Map(
            [
                Rule("/embed", endpoint=self._embed, methods=["POST"]),
                Rule("/search", endpoint=self._search, methods=["GET", "POST"]),
                Rule("/health", endpoint=self._health, methods=["GET"]),
                Rule("/metrics", endpoint=self._metrics, methods=["GET"]),
            ],
            merge_slashes=False,
        )

    def open(self, searcher: Searcher) -> None:
        """Answers with this from now on."""
        self._page = None if self._token else SearchApp([searcher])
        self._searcher = searcher

    def __call__(self, environ, start_response):
        start, path = time.perf_counter(), environ.get("PATH_INFO", "")

        def counted(status, *more):
            with self._counting:
                # Any other could be made up, without end.
                self._requests[path if path in PATHS else "other", int(status[:3])] += 1
                if path in PATHS:
                    self._seconds[path].add(time.perf_counter() - start)
            return start_response(status, *more)

        return super().__call__(environ, counted)

    def answer(self, environ) -> Response:
        if self._token is None:
            request = local_request(environ)
        else:
            request = Request(environ)
            request.max_content_length = MAX_BYTES
        if request.path != "/health":
            self._check_token(request)
        if self._page is not None and request.path not in PATHS:
            return self._page.answer(environ)
        endpoint, _ = self._urls.bind_to_environ(environ).match()
        return endpoint(request)

    def _check_token(self, request: Request) -> None:
        if self._token is not None and not self._bears_token(request):
            raise Unauthorized(
                "this needs the header Authorization: Bearer TOKEN",
                www_authenticate=WWWAuthenticate("bearer"),
            )

    def _bears_token(self, request: Request) -> bool:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        # In constant time: how long it takes says nothing of the token.
        same = hmac.compare_digest(given.strip().encode(), (self._token or "").encode())
        return kind.lower() == "bearer" and same

    def _ready(self) -> Searcher:
        if self.closing:
            raise ServiceUnavailable("shutting down", retry_after=1)
        if self._searcher is None:
            raise ServiceUnavailable("not ready: the model is loading", retry_after=1)
        return self._searcher

    def _health(self, request: Request) -> Response:
        searcher = self._searcher
        status = "shutting down" if self.closing else "ready" if searcher else "loading"
        known: dict[str, Any] = {"status": status}
        if searcher and (self._token is None or self._bears_token(request)):
            known |= {
                "model": searcher.name,
                "step": searcher.step,
                "documents": searcher.documents,
                "dimensions": searcher.dimensions,
                "hybrid": searcher.words is not None,
            }
        return as_json(known, 200 if status == "ready" else 503)

    def _embed(self, request: Request) -> Response:
        searcher, body = self._ready(), _body(request, ("queries", "documents"))
        if len(body) != 1:
            raise BadRequest('write {"queries": [...]} or {"documents": [...]}')
        ((name, records),) = body.items()
        found = self._ask(searcher, name, records, search=False)
        embeddings = np.stack([one.embedding for one in found]).astype(np.float64).round(8)
        known = {"step": searcher.step, "dimensions": searcher.dimensions}
        return as_json(known | {"embeddings": embeddings.tolist()})

    def _search(self, request: Request) -> Response:
        searcher = self._ready()
        if request.method == "POST":
            body = _body(request, ("query", "queries", "k", "hybrid"))
        else:
            body = _known(request.args.to_dict(), ("query", "k", "hybrid"))
            body["k"] = whole_number(body.get("k", "10"))
            if "hybrid" in body:
                body["hybrid"] = {"true": True, "false": False}.get(body["hybrid"])
        k = body.get("k", 10)
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_K:
            raise BadRequest(f"k is not a whole number from 1 to {MAX_K}")
        if ("query" in body) == ("queries" in body):
            raise BadRequest('write {"query": ...} or {"queries": [...]}')
        by_words = body.get("hybrid", searcher.words is not None)
        if not isinstance(by_words, bool):
            raise BadRequest("hybrid is neither true nor false")
        if by_words and searcher.words is None:
            raise BadRequest("this server searches by embeddings alone; start it with --hybrid")
        queries = body["queries"] if "queries" in body else [body["query"]]
        ids, results = searcher.store.documents.ids, []
        found = self._ask(searcher, "queries", queries, search=True)
        for query, one in zip(queries, found, strict=True):
            scores, rows = one.scores[:k], one.rows[:k]
            if by_words:
                text = query if isinstance(query, str) else text_of(searcher.store.queries, query)
                scores, rows = searcher.joined(text, one, k)
            scores = scores.astype(np.float64).round(6)
            result: dict[str, Any] = {"ids": [ids[row] for row in rows], "scores": scores.tolist()}
            if searcher.calibration and not by_words:
                result["probabilities"] = probabilities(searcher.calibration, scores)
            results.append(result)
        return as_json({"step": searcher.step, "results": results})

    def _ask(self, searcher: Searcher, name: str, records: Any, search: bool) -> list[Found]:
        """What `searcher` finds of the "queries" or "documents" of a request, in their order.

        Raises:
            BadRequest: they are no such records.
        """
        if not isinstance(records, list) or not 1 <= len(records) <= MAX_RECORDS:
            raise BadRequest(f"{name} must be a list of 1 to {MAX_RECORDS}")
        checked = [
            _record(searcher, name, f"{name}[{i}]", record) for i, record in enumerate(records)
        ]
        answers: dict[int, Found] = {}
        for form in dict.fromkeys(form for form, _ in checked):
            places = [i for i, (own, _) in enumerate(checked) if own == form]
            found = searcher.ask(form, [checked[i][1] for i in places], search)
            answers |= zip(places, found, strict=True)
        return [answers[i] for i in range(len(checked))]

    def _metrics(self, request: Request) -> Response:
        with self._counting:
            lines = ["# TYPE gcl_jax_requests_total counter"]
            lines += [
                f'gcl_jax_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self._requests.items())
            ]
            lines += ["# TYPE gcl_jax_request_seconds histogram"]
            for path, seconds in self._seconds.items():
                lines += seconds.lines("gcl_jax_request_seconds", f'path="{path}"')
        if self._searcher is not None:
            batcher, sizes = self._searcher.batcher, Histogram(BATCH_SIZES)
            for size, times in sorted(batcher.sizes.copy().items()):
                sizes.add(size, times)
            lines += ["# TYPE gcl_jax_batch_size histogram", *sizes.lines("gcl_jax_batch_size")]
            lines += ["# TYPE gcl_jax_queue_length gauge", f"gcl_jax_queue_length {len(batcher)}"]
        return Response("\n".join(lines) + "\n", content_type="text/plain; version=0.0.4")


def _body(request: Request, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON of a request."""
    try:
        body = json.loads(request.get_data(cache=False))
    except RequestEntityTooLarge:
        raise RequestEntityTooLarge(f"the body has more than {MAX_BYTES / 2**20:g} MiB") from None
    except (ValueError, RecursionError):
        raise BadRequest("the body is no JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is no JSON object")
    return _known(body, keys)


def _known(given: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    if unknown := given.keys() - set(keys):
        raise BadRequest(f"{min(unknown)[:60]!r} is unknown here; there are {', '.join(keys)}")
    return given


def _record(
    searcher: Searcher, name: str, where: str, record: Any
) -> tuple[str, dict[str, str | np.ndarray]]:
    """Its form, and what the towers see of its fields; `where` is what errors call it.

    Raises:
        BadRequest: it is no record of the model's fields.
    """
    form = "query" if name == "queries" else "document"
    _, kinds, _ = searcher.forms[form]
    if isinstance(record, str) and form == "query":
        return "text", {"text": _text(where, record)}
    if not isinstance(record, Mapping):
        text = "a text or " if form == "query" else ""
        raise BadRequest(f"{where} must be {text}an object of {', '.join(kinds)}")
    if unknown := record.keys() - kinds.keys():
        field = min(unknown)[:60]
        raise BadRequest(f"{where} has a field {field!r}; the model has {', '.join(kinds)}")
    given = {field: value for field, value in record.items() if value not in (None, "")}
    if not given:
        raise BadRequest(f"{where} has no {' or '.join(kinds)}")
    seen: dict[str, str | np.ndarray] = {}
    for field, value in given.items():
        its = f"{where}, field {field!r}"
        seen[field] = _text(its, value) if kinds[field] == "text" else _image(searcher, its, value)
    if form == "query" and list(kinds.values()) == ["text"]:
        return "text", {"text": next(iter(seen.values()))}
    return form, seen


def _text(where: str, text: Any) -> str:
    if not isinstance(text, str):
        raise BadRequest(f"{where} is no text")
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{where} is no Unicode: half of a surrogate pair") from None
    if not text.strip():
        raise BadRequest(f"{where} is empty")
    return text.strip()


def _image(searcher: Searcher, where: str, encoded: Any) -> np.ndarray:
    try:
        data = base64.b64decode(encoded, validate=True)
        check_image(data)
        with DECODING:
            return searcher.pixels(data)
    except (TypeError, ValueError, binascii.Error) as error:
        reason = error if isinstance(error, DataError) else "an image is a file in base64"
        raise BadRequest(f"{where}: {reason}") from None


class _Stopped(BaseException):
    """A signal came."""


def serve(
    workdir: Path,
    checkpoint: str,
    split: str | None,
    embed_dim: int | None,
    host: str,
    port: int,
    token: str | None,
    by_words: bool = False,
) -> None:
    """Serves a checkpoint of a run until SIGTERM or Ctrl-C, then finishes what is in flight, and
    ends the process with 0. `port` 0 takes a free one; the address is printed, and "ready" when it
    is.

    Raises:
        ConfigError, DataError, UserError: as `Searcher`; the port is in use.
    """
    stopped = threading.Event()

    def stop(*_) -> None:
        stopped.set()
        for number in signals:  # a second one ends it at once
            signal.signal(number, signal.SIG_DFL)
        raise _Stopped

    api, signals = Api(token), (signal.SIGTERM, signal.SIGINT)
    with listening(host, port) as listener:
        server = LimitedServer(
            host, port, api, QuietHandler, fd=listener.fileno(), connections=CONNECTIONS
        )
        server.start()
        searcher = None
        try:
            for number in signals:
                signal.signal(number, stop)
            print(f"listening on http://{host}:{server.port}", flush=True)
            searcher = Searcher(workdir, split, embed_dim, checkpoint, BATCH_SIZES, by_words)
            api.open(searcher)
            print(
                f"ready: {searcher.documents} documents, step {searcher.step} (Ctrl-C ends it)",
                flush=True,
            )
            # A signal that another thread received is acted upon when this one wakes.
            while not stopped.wait(1):
                pass
        except _Stopped:
            pass
        api.closing = True
        server.drain(GRACE)
        if searcher is not None:
            searcher.batcher.close()
        # The interpreter may crash on what XLA compiles in its threads, or wait for them for ever.
        sys.stdout.flush()
        os._exit(0)
