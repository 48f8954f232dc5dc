"""`gcl_jax.serve`: what the API answers and refuses, together and when it ends."""

import base64
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import processes
import pytest
from test_search import HostileSource, untrained_run
from werkzeug.test import Client

import gcl_jax
from gcl_jax.search import searcher as searching
from gcl_jax.search.searcher import Batcher, Searcher
from gcl_jax.serve import __main__ as door
from gcl_jax.serve import api

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(HostileSource(), tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def searcher(workdir):
    return Searcher(workdir, None, None, batch_sizes=api.BATCH_SIZES)


@pytest.fixture
def served(searcher):
    """The API, and what asks it: (status, headers, text)."""
    app = api.Api()
    app.open(searcher)
    return app, asker(app)


def asker(app, **common):
    client = Client(app)

    def ask(path, body=None, method=None, **options):
        options = {"base_url": "http://localhost:8000"} | common | options
        if body is not None:
            options |= {"data": body if isinstance(body, bytes | str) else json.dumps(body)}
        answer = client.open(
            path, method=method or ("POST" if body is not None else "GET"), **options
        )
        told = answer.json if answer.content_type.startswith("application/json") else answer.text
        return answer.status_code, answer.headers, told

    return ask


def base64_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_embeddings_are_those_of_the_model(served, searcher, workdir):
    model, documents = gcl_jax.load(workdir), searcher.store.documents
    texts = ["find 3", " cat ", "ö 猫"]
    status, _, told = served[1]("/embed", {"queries": [*texts, {"query": "find 3"}]})
    assert (status, told["step"], told["dimensions"]) == (200, 0, 16)
    asked = model.encode_text([*map(str.strip, texts), "find 3"])
    np.testing.assert_allclose(told["embeddings"], asked, atol=1e-6)
    records = [
        {"image": documents[5]["image"], "title": documents[5]["title"]},
        {"title": "a title alone"},
        {"image": documents[6]["image"]},
    ]
    sent = [{f: v if isinstance(v, str) else base64_of(v) for f, v in r.items()} for r in records]
    sent[1]["image"] = None
    status, _, told = served[1]("/embed", {"documents": sent})
    np.testing.assert_allclose(told["embeddings"], model.encode(records), atol=1e-6)


def test_search_finds_what_the_page_finds(served):
    _, ask = served
    _, _, page = ask("/api/search?q=find+3&k=7")
    expected = [(one["id"], one["score"]) for one in page["runs"][0]["results"]]
    status, _, one = ask("/search?query=find+3&k=7")
    assert status == 200
    _, _, posted = ask("/search", {"query": "find 3", "k": 7})
    _, _, several = ask("/search", {"queries": ["cat", "find 3", {"query": "find 3"}], "k": 7})
    assert one == posted
    for found in (*one["results"], *several["results"][1:]):
        assert found["ids"] == [id_ for id_, _ in expected]
        np.testing.assert_allclose(found["scores"], [score for _, score in expected], atol=2e-6)
    assert several["results"][0] != several["results"][1]
    assert len(ask("/search", {"query": "x"})[2]["results"][0]["ids"]) == 10


REFUSED = [
    ("/search", {"query": "a", "hybrid": True}, 400, "start it with --hybrid"),
    ("/search", {"query": "a", "hybrid": None}, 400, "hybrid is neither true nor false"),
    ("/embed", b"", 400, "the body is no JSON"),
    ("/embed", b"\xff", 400, "the body is no JSON"),
    ("/embed", b"[" * 100_000, 400, "the body is no JSON"),
    ("/embed", [], 400, "no JSON object"),
    ("/embed", {}, 400, "write {"),
    ("/embed", {"queries": ["a"], "documents": []}, 400, "write {"),
    ("/embed", {"texts": ["a"]}, 400, "'texts' is unknown here; there are queries, documents"),
    ("/embed", {"queries": "cat"}, 400, "queries must be a list of 1 to 256"),
    ("/embed", {"queries": []}, 400, "queries must be a list of 1 to 256"),
    ("/embed", {"queries": ["a"] * 257}, 400, "queries must be a list of 1 to 256"),
    ("/embed", {"queries": ["a", 3]}, 400, "queries[1] must be a text or an object of query"),
    ("/embed", {"queries": ["a", " "]}, 400, "queries[1] is empty"),
    ("/embed", {"queries": ["a" * 10_001]}, 400, "queries[0] has 10,001 characters"),
    ("/embed", b'{"queries": ["\\ud83d"]}', 400, "queries[0] is no Unicode"),
    ("/embed", {"queries": [{"title": "a"}]}, 400, "queries[0] has a field 'title'; the model"),
    ("/embed", {"queries": [{}]}, 400, "queries[0] has no query"),
    ("/embed", {"documents": ["a"]}, 400, "documents[0] must be an object of"),
    ("/embed", {"documents": [{"title": 3}]}, 400, "documents[0], field 'title' is no text"),
    ("/embed", {"documents": [{"title": "a", "image": "ö"}]}, 400, "a file in base64"),
    ("/embed", {"documents": [{"title": "a", "image": [1]}]}, 400, "a file in base64"),
    ("/embed", {"documents": [{"image": base64_of(b"no")}]}, 400, "field 'image': unreadable"),
    ("/embed", b"\0" * (2**25 + 1), 413, "the body has more than 32 MiB"),
    ("/search", {}, 400, 'write {"query": ...} or {"queries": [...]}'),
    ("/search", {"query": "a", "queries": ["a"]}, 400, 'write {"query"'),
    *(("/search", {"query": "a", "k": k}, 400, "k is not") for k in (0, 101, "1", 1.0, True, None)),
    ("/search?k=1", None, 400, 'write {"query"'),
    ("/search?query=cat&k=1e1", None, 400, "k is not"),
    ("/search?q=cat", None, 400, "'q' is unknown here; there are query, k"),
    ("/nothing", None, 404, "not found"),
    ("/embed", None, 405, "not allowed"),
    ("/health", {}, 405, "not allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_what_is_refused_is_told_in_one_line(served, path, body, status, message):
    found, headers, told = served[1](path, body)
    assert (found, [*told]) == (status, ["error"])
    assert message in told["error"]
    assert "\n" not in told["error"]
    assert ("Allow" in headers) == (status == 405)


def test_a_full_queue_is_429(served, searcher, monkeypatch):
    monkeypatch.setattr(searching, "PLACES", 2)
    status, _, told = served[1]("/embed", {"queries": ["a", "b", "c"]})
    assert (status, told) == (429, {"error": "too many wait for an answer; ask again later"})
    assert served[1]("/embed", {"queries": ["a", "b"]})[0] == 200


def test_health_and_what_is_not_ready(served, workdir):
    app, ask = served
    known = {"model": str(workdir), "step": 0, "documents": 24, "dimensions": 16}
    known["hybrid"] = False
    assert ask("/health")[::2] == (200, {"status": "ready"} | known)
    status, headers, told = asker(api.Api())("/search?query=cat")
    assert (status, told) == (503, {"error": "not ready: the model is loading"})
    assert headers["Retry-After"] == "1"
    assert asker(api.Api())("/health")[::2] == (503, {"status": "loading"})
    app.closing = True
    assert ask("/search?query=cat")[::2] == (503, {"error": "shutting down"})
    assert ask("/health")[0] == 503


def test_a_token_is_asked_for(searcher):
    app = api.Api(TOKEN)
    app.open(searcher)
    ask = asker(app, base_url="http://any.example")
    for given in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {TOKEN}"}):
        for path in ("/search?query=cat", "/metrics", "/", "/api/info", "/nothing"):
            status, headers, told = ask(path, headers=given)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert "Authorization: Bearer TOKEN" in told["error"]
        assert ask("/health", headers=given)[::2] == (200, {"status": "ready"})
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert ask("/search?query=cat", headers=right)[0] == 200
    assert ask("/health", headers=right)[2]["documents"] == 24
    assert ask("/", headers=right)[0] == 404, "no page"


def test_without_a_token_it_answers_this_machine_alone(served):
    _, ask = served
    assert ask("/search?query=cat", base_url="http://evil.example")[0] == 400
    assert ask("/embed", {"queries": ["a"]}, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert ask("/")[0] == ask("/api/info")[0] == 200, "and the page is there"


def test_metrics(served):
    _, ask = served
    ask("/search", {"queries": ["a"] * 3})
    ask("/search?k=0")
    ask("/made/up")
    status, headers, text = ask("/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert lines['gcl_jax_requests_total{path="/search",status="200"}'] == "1"
    assert lines['gcl_jax_requests_total{path="/search",status="400"}'] == "1"
    assert lines['gcl_jax_requests_total{path="other",status="404"}'] == "1"
    seconds = 'gcl_jax_request_seconds_bucket{path="/search",le="'
    counts = [int(lines[f'{seconds}{bound:g}"}}']) for bound in api.SECONDS]
    assert counts == sorted(counts)
    assert (
        lines[f'{seconds}+Inf"}}'] == "2" == lines['gcl_jax_request_seconds_count{path="/search"}']
    )
    assert int(lines['gcl_jax_batch_size_bucket{le="4"}']) >= 1
    assert lines["gcl_jax_queue_length"] == "0"


def test_a_batch_is_of_one_form_and_in_order():
    """While the first is answered, the others gather."""
    begun, go_on, batches = threading.Event(), threading.Event(), []

    def answer(form, questions):
        batches.append((form, questions))
        begun.set()
        assert go_on.wait(60)
        if "bad" in questions:
            raise ValueError("bad")
        return [f"{form}{question}" for question in questions]

    batcher = Batcher(answer, 3)
    first = batcher.submit("a", [0])
    assert begun.wait(60)
    futures = (
        batcher.submit("a", [1, 2]) + batcher.submit("b", ["bad"]) + batcher.submit("a", [3, 4])
    )
    assert len(batcher) == 5
    go_on.set()
    batcher.close()
    assert batches == [("a", [0]), ("a", [1, 2, 3]), ("b", ["bad"]), ("a", [4])]
    assert [f.result() for f in first + futures if not f.exception()] == [
        "a0",
        "a1",
        "a2",
        "a3",
        "a4",
    ]
    assert isinstance(futures[2].exception(), ValueError)
    assert batcher.sizes == {1: 3, 3: 1}
    with pytest.raises(queue.Full):
        batcher.submit("a", [5])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0 lets others in: give --token_file=FILE, or set GCL"),
        (["--token=short"], "--token must have 16 characters or more"),
        (["--token=0123456789 abcdef"], "without blanks"),
        (["--token_file=/no/such"], "--token_file=/no/such: No such file"),
        (["--port=65536"], "'65536' is no port"),
        (["--workdir=/no/such/run"], "/no/such/run"),
        (["--split=nowhere"], "nowhere"),
        (["--embed_dim=0"], "'0' is no whole number"),
    ],
)
def test_bad_arguments(workdir, args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve", f"--workdir={workdir}", *args])
    with pytest.raises(SystemExit) as stop:
        door.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert door.token_of(None, None) is None
    assert door.token_of(None, tmp_path / "token") == TOKEN
    monkeypatch.setenv("GCL_JAX_TOKEN", TOKEN[::-1])
    assert door.token_of(None, None) == TOKEN[::-1]
    assert door.token_of(TOKEN, None) == TOKEN


def test_command_with_64_clients_and_sigterm(workdir, tmp_path):
    """No error, the same answers as one by one; it ends with what is in flight, and 0."""
    (tmp_path / "token").write_text(TOKEN)
    command = [sys.executable, "-m", "gcl_jax.serve", f"--workdir={workdir}", "--port=0"]
    with subprocess.Popen(
        [*command, "--host=0.0.0.0", f"--token_file={tmp_path / 'token'}"],
        env=processes.ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as server:
        try:
            port = int(
                re.search(r"listening on http://0.0.0.0:(\d+)$", server.stdout.readline())[1]
            )

            def ask(query: str):
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/search",
                    json.dumps({"query": query}).encode(),
                    {"Authorization": f"Bearer {TOKEN}"},
                )
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)["results"]

            with pytest.raises(urllib.error.HTTPError, match="503"):
                ask("too early")
            assert server.stdout.readline().startswith("ready: 24 documents, step 0")
            queries = [f"find {i % 16}" for i in range(256)]
            alone = [ask(query) for query in queries[:16]]
            with ThreadPoolExecutor(64) as clients:
                together = list(clients.map(ask, queries))
                for one, other in zip(together, alone * 16, strict=True):
                    assert one[0]["ids"] == other[0]["ids"]
                    np.testing.assert_allclose(one[0]["scores"], other[0]["scores"], atol=3e-6)
                last = [clients.submit(ask, query) for query in queries[:64]]
                last[0].result()
                server.send_signal(signal.SIGTERM)
            for future in last:  # an answer, or told that it ends; never half of one
                error = future.exception()
                assert error is None or isinstance(error, OSError), error
            out, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, out) == (0, "")
    assert "Traceback" not in errors


LOADING = """
import concurrent.futures, time
from gcl_jax.serve import api

def load(*_):
    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600)  # as XLA's that compile
    print("loading", flush=True)
    time.sleep(600)

api.Searcher = load
api.serve(None, "newest", None, None, "127.0.0.1", 0, None)
"""


def test_sigterm_while_it_loads_ends_it_at_once():
    """Without a wait for the threads that compile, and with 0."""
    with subprocess.Popen(
        [sys.executable, "-c", LOADING],
        env=processes.ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as server:
        try:
            assert server.stdout.readline().startswith("listening on http://127.0.0.1:")
            assert server.stdout.readline() == "loading\n"
            server.send_signal(signal.SIGTERM)
            out, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, out) == (0, "")
    assert "Traceback" not in errors
