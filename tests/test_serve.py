"""The search page's API: what it answers, and what it refuses."""

import base64
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from PIL import Image
from test_search import HOSTILE, HostileSource, untrained_run
from werkzeug.serving import make_server
from werkzeug.test import Client

from gcl_jax import config
from gcl_jax.data.transforms import FORMATS
from gcl_jax.errors import UserError
from gcl_jax.runs import load_run, one_store
from gcl_jax.search import __main__ as search
from gcl_jax.search import serve
from gcl_jax.search.searcher import Searcher, SearchIndex


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be so large, and is but a header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def encoded_as(kind: str, size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> list[Path]:
    """Two runs over one store: the second looks at little but images."""
    folder = tmp_path_factory.mktemp("served")
    first = untrained_run(HostileSource(), folder)
    second = folder / "second"
    shutil.copytree(first, second)
    cfg = config.load(first / "config.json")
    cfg.data.document_fields = {"image": 0.999, "title": 0.001}
    config.save(cfg, second / "config.json")
    return [first, second]


@pytest.fixture(scope="module")
def searchers(workdirs) -> list[Searcher]:
    return [Searcher(workdir, None, None) for workdir in workdirs]


@pytest.fixture(scope="module")
def client(searchers) -> Client:
    return Client(serve.SearchApp(searchers))


@pytest.fixture
def ask(client):
    """Asks for an address and returns (status, what the JSON answer says)."""

    def ask(address: str, image: bytes | None = None, **options) -> tuple[int, dict]:
        method = client.get if image is None else client.post
        options = {"base_url": "http://localhost:8000", "data": image} | options
        answer = method(address, **options)
        assert answer.content_type.startswith("application/json")
        return answer.status_code, json.loads(answer.text)

    return ask


def test_typed_query_is_searched_as_the_command_does(ask, workdirs):
    status, answer = ask("/api/search?q=%20find+3%20&k=24")
    assert (status, answer["query"], answer["k"]) == (200, "find 3", 24)
    assert [run["name"] for run in answer["runs"]] == [str(workdir) for workdir in workdirs]
    run = load_run(workdirs[0])
    store, index = run.store, SearchIndex(run, np.arange(24))
    scores, rows = index.search([{"query": "find 3"}], 24)
    results, others = (run["results"] for run in answer["runs"])
    assert [result["row"] for result in results] == rows[0].tolist()
    np.testing.assert_allclose([r["score"] for r in results], scores[0], atol=2e-6)
    assert [result["row"] for result in others] != rows[0].tolist()
    for result in results + others:
        record = store.documents[result["row"]]
        assert result["id"] == record["id"]
        assert result["fields"].get("title", "") == record["title"]
        images = [f"/image/{result['row']}/image"] if record["image"] else []
        assert result["images"] == images
    assert len(ask("/api/search?q=x")[1]["runs"][0]["results"]) == 10
    assert len(ask("/api/search?q=x&k=100")[1]["runs"][0]["results"]) == 24, "all there are"


def test_an_image_finds_itself(ask, searchers):
    """The query field of the training data is a text; both towers are there all the same."""
    documents = searchers[0].store.documents
    for row in (0, 11, 23):
        status, answer = ask("/api/search?k=3", documents[row]["image"])
        assert (status, answer["query"]) == (200, None)
        best = answer["runs"][1]["results"][0]
        assert best["row"] == row
        assert best["score"] > 0.999


def test_split_and_dimensions_are_those_asked_for(workdirs):
    searcher = Searcher(workdirs[0], "zero_shot", 1)
    scores, rows = searcher.search({"text": "find 3"}, 100)
    assert searcher.documents == 12
    assert sorted(rows) == list(range(12, 24))
    assert set(abs(scores).round(4)) <= {0.0, 1.0}


def test_images_are_those_of_the_store(client, searchers):
    documents = searchers[0].store.documents
    answer = client.get("/image/7/image", base_url="http://127.0.0.1:8000")
    assert answer.data == documents[7]["image"]
    assert answer.content_type == "image/png"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "address",
    [
        "/image/24/image",
        "/image/-1/image",
        "/image/1e1/image",
        f"/image/{'9' * 5000}/image",
        "/image/3/image",  # it is missing
        "/image/4/title",
        "/image/4/nothing",
        "/image/4/../../../../etc/passwd",
        "/image/4/%2e%2e%2f%2e%2e%2fsetup.cfg",
        "/../config.json",
        "//etc/passwd",
        "/search.html",
        "/api",
    ],
)
def test_unknown_addresses(ask, address):
    status, answer = ask(address)
    assert status == 404
    assert answer["error"].count("\n") == 0


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "something else"),
        (b"<html><script>alert(1)</script>", "something else"),
        (encoded_as("ICO"), "no browser shows"),
    ],
)
def test_what_the_store_holds_is_served_as_an_image_or_not_at_all(encoded, message):
    """An SVG would run its scripts; `prepare` lets none in, but a store may come from elsewhere."""
    documents = FakeRecords({"image": "image"}, [{"image": encoded}])
    store = types.SimpleNamespace(documents=documents, queries=documents)
    app = serve.SearchApp([types.SimpleNamespace(store=store)])
    answer = Client(app).get("/image/0/image", base_url="http://localhost")
    assert answer.status_code == 404
    assert message in answer.json["error"]


class FakeRecords(list):
    def __init__(self, fields, records):
        super().__init__(records)
        self.fields = fields


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/api/search", "the query is empty"),
        ("/api/search?q=%20%09", "the query is empty"),
        (f"/api/search?q={'long+' * 201}", "1,004 characters; at most 1,000"),
        ("/api/search?q=cat&k=0", "k is not a whole number from 1 to 100"),
        ("/api/search?q=cat&k=101", "k is not"),
        ("/api/search?q=cat&k=-1", "k is not"),
        ("/api/search?q=cat&k=", "k is not"),
        ("/api/search?q=cat&k=1e1", "k is not"),
        (f"/api/search?q=cat&k={'9' * 5000}", "k is not"),
    ],
)
def test_queries_that_are_refused(ask, address, message):
    status, answer = ask(address)
    assert status == 400
    assert message in answer["error"]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\0\x1b[31m", "🐱" * 1000, "%FF%FE"])
def test_odd_queries_are_answered(ask, text):
    status, answer = ask("/api/search", query_string={"q": text})
    assert (status, answer["query"]) == (200, text)
    assert ask("/api/search?q=%FF%FE")[0] == 200, "no UTF-8"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "this is not an image (PNG, "),
        (b"a text file\n" * 100, "this is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "this is not an image"),
        (png_header(10_000, 5_000), "10000 x 5000 = 50 million pixels; at most 40 million"),
        (png_header(2**31 - 1, 2**31 - 1), "pixels"),
        (png_header(100, 100), "unreadable image"),
    ],
)
def test_images_that_are_refused(ask, image, message):
    status, answer = ask("/api/search", image)
    assert status == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def test_large_body_is_refused(ask):
    status, answer = ask("/api/search", b"\0" * (serve.MAX_BYTES + 1))
    assert (status, answer) == (413, {"error": "the image has more than 32 MiB"})


def test_text_model_refuses_images(searchers, monkeypatch):
    monkeypatch.setattr(searchers[1], "takes_images", False)
    client = Client(serve.SearchApp(searchers))
    assert client.get("/api/info", base_url="http://localhost").json["images"] is False
    answer = client.post("/api/search", data=b"x", base_url="http://localhost")
    assert answer.json == {"error": f"the model of {searchers[1].name} has no image tower"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example"])
@pytest.mark.parametrize("address", ["/", "/api/search?q=cat", "/image/1/image"])
def test_other_names_of_this_machine_are_refused(ask, host, address):
    """DNS rebinding: a name that its owner points at 127.0.0.1."""
    assert ask(address, base_url=f"http://{host}")[0] == 400


def exchange(port: int, said: bytes) -> bytes:
    """What the server at `port` answers to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(said)
        return connection.makefile("rb").read()


@contextlib.contextmanager
def listening(searchers):
    """The port of a server."""
    server = serve.LimitedServer("127.0.0.1", 0, serve.SearchApp(searchers), serve.QuietHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_request_without_a_host_is_refused(searchers):
    with listening(searchers) as port:
        answer = exchange(port, b"GET /api/info HTTP/1.0\r\n\r\n")
    assert b" 400 " in answer.splitlines()[0]
    assert b"a request needs a Host header" in answer


def test_large_images_do_not_keep_others_waiting(searchers, client, ask, monkeypatch):
    """While images are decoded, typed queries are answered; there is a core that decodes none."""
    decoding, go_on, at_once = threading.Event(), threading.Event(), []
    decode = Searcher.pixels

    def slow(searcher, encoded):
        at_once.append(threading.get_ident())
        decoding.set()
        assert go_on.wait(60)
        return decode(searcher, encoded)

    monkeypatch.setattr(Searcher, "pixels", slow)
    image = searchers[0].store.documents[11]["image"]
    with ThreadPoolExecutor(8) as pool:
        uploads = [pool.submit(ask, "/api/search?k=3", image) for _ in range(8)]
        assert decoding.wait(60)
        assert ask("/api/search?q=cat")[0] == 200
        assert len(set(at_once)) <= max(1, os.cpu_count() - 1)
        go_on.set()
        answers = [upload.result() for upload in uploads]
    assert [status for status, _ in answers] == [200] * 8
    assert {answer["runs"][1]["results"][0]["row"] for _, answer in answers} == {11}


def test_connections_are_limited_and_silence_ends_them(searchers, monkeypatch):
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    monkeypatch.setattr(serve.QuietHandler, "timeout", 2)
    ask = b"GET /search.css HTTP/1.0\r\nHost: localhost\r\n\r\n"
    with listening(searchers) as port:
        silent = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(2)]
        assert b" 503 " in exchange(port, ask)
        for connection in silent:
            assert connection.recv(1) == b"", "the server hangs up"
            connection.close()
        ended = time.monotonic() + 60  # it hangs up a moment before the place is free
        while b" 503 " in (answer := exchange(port, ask)) and time.monotonic() < ended:
            time.sleep(0.01)
        assert b" 200 " in answer


def test_other_sites_are_refused(ask, client):
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert ask("/api/search?q=cat", headers=elsewhere)[0] == 403
    assert ask("/api/search", b"x", headers=elsewhere)[0] == 403
    assert ask("/image/1/image", headers=elsewhere)[0] == 403
    link = client.get("/?q=cat", base_url="http://localhost", headers=elsewhere)
    assert link.status_code == 200


def test_headers_and_methods(client):
    for address in ("/", "/search.js", "/search.css", "/api/info", "/image/1/image", "/nothing"):
        answer = client.get(address, base_url="http://localhost:8000")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert not any(name.startswith("Access-Control") for name, _ in answer.headers)
        assert client.put(address, base_url="http://localhost").status_code in (404, 405)
    page = client.get("/", base_url="http://localhost:8000").text
    assert not re.search(r"https?:|<script>|<style| style=| on\w+=", page), "all of it from here"


def test_internal_error_is_one_line(searchers, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("a\nb")

    monkeypatch.setattr(searchers[0], "search", broken)
    answer = Client(serve.SearchApp(searchers)).get("/api/search?q=x", base_url="http://localhost")
    assert answer.status_code == 500
    assert answer.json["error"].startswith("internal error")
    assert "RuntimeError: a" in capsys.readouterr().err


def test_no_query_compiles_anything(ask, searchers):
    """Queries of other lengths, other numbers of results, images of other sizes."""
    compiled = []

    def listen(event: str, *_, **__) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for text, k in (("a", 1), ("a much longer query than that", 7), ("🐱", 100)):
            assert ask("/api/search", query_string={"q": text, "k": k})[0] == 200
        for size in ((5, 5), (300, 7)):
            assert ask("/api/search", encoded_as("PNG", size))[0] == 200
        assert compiled == []
        jax.jit(lambda x: x + 1)(np.zeros(7))
        assert compiled, "the listener hears of compilations"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_queries_at_once(ask):
    """One device, one query at a time, and every answer is that of its query."""
    addresses = [f"/api/search?q=find+{i}&k=24" for i in range(4)] * 3
    alone = [ask(address)[1]["runs"] for address in addresses[:4]] * 3
    with ThreadPoolExecutor(6) as threads:
        together = [answer["runs"] for _, answer in threads.map(ask, addresses)]
    for answers in zip(alone, together, strict=True):
        first, second = ([run["results"] for run in runs] for runs in answers)
        assert first == second


def test_command(workdirs):
    """It says where it is, listens on 127.0.0.1 alone, and Ctrl-C ends it without a complaint."""
    command = [sys.executable, "-m", "gcl_jax.search", "--serve", "--port=0"]
    with subprocess.Popen(
        [*command, *[f"--workdir={workdirs[0]}"] * 2, "--checkpoint=0", "--checkpoint=newest"],
        env=processes.ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs, and what they start, would not hear of it.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as server:
        try:
            port = int(re.search(r"http://localhost:(\d+)/", server.stdout.readline())[1])
            with urllib.request.urlopen(f"http://localhost:{port}/api/info") as answer:
                info = json.load(answer)
            assert (info["documents"], [run["step"] for run in info["runs"]]) == (24, [0, 0])
            # Whoever listens on 0.0.0.0 is reached by all of 127.0.0.0/8.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=10)
            with pytest.raises(UserError, match=f"--port={port}: Address already in use; choose"):
                serve.serve(workdirs, ["newest", "newest"], None, None, port)
            server.send_signal(signal.SIGINT)
            out, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, out) == (0, "")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--serve", "cat"], "QUERY does not go with --serve"),
        (["--serve", "--json"], "--json does not go with --serve"),
        (["--serve", "--top_k=5"], "--top_k does not go with --serve"),
        (["--serve", "--port=65536"], "'65536' is no port"),
        (["cat", "--port=8001"], "--port does not go without --serve"),
        (["cat", "--workdir=elsewhere"], "several --workdir go with --serve only"),
        (["--serve", "--workdir=/no/such/run"], "/no/such/run"),
        (["cat", "--checkpoint=0", "--checkpoint=1"], "several --checkpoint go with --serve only"),
        (["--serve", "--checkpoint=0", "--checkpoint=1"], "2 --checkpoint for 1 --workdir"),
    ],
)
def test_bad_arguments(workdirs, args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search", f"--workdir={workdirs[0]}", *args])
    with pytest.raises(SystemExit) as stop:
        search.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_runs_of_two_stores_are_not_compared(workdirs, tmp_path):
    other = untrained_run(HostileSource(), tmp_path)
    with pytest.raises(UserError, match="side by side all need the same store"):
        one_store([workdirs[0], other])


@pytest.fixture(scope="module")
def address(searchers):
    """Where both runs are served."""
    server = make_server("127.0.0.1", 0, serve.SearchApp(searchers), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.port}"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the [test] extra")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"):
        options.add_argument(f"--{flag}")
    for what in ("background-networking", "component-update", "sync", "dev-shm-usage"):
        options.add_argument(f"--disable-{what}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.implicitly_wait(0)
    yield browser
    browser.quit()


class Page:
    """The page in the browser, as somebody sees it."""

    def __init__(self, browser, address: str):
        self.browser, self.address = browser, address

    def open(self, path: str) -> None:
        self.browser.get(self.address + path)
        self.wait(lambda: self.shown("#empty, #error, #runs li"))

    def wait(self, condition):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.browser, 30, poll_frequency=0.02).until(lambda _: condition())

    def find(self, selector: str):
        return self.browser.find_elements("css selector", selector)

    def shown(self, selector: str) -> list[str]:
        """The texts of the elements that are visible."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter((e) => e.checkVisibility()).map((e) => e.textContent)",
            selector,
        )

    def titles(self) -> list[list[str]]:
        """Those of the results, run by run."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('.run')]"
            ".map((run) => [...run.querySelectorAll('.title')].map((e) => e.textContent))"
        )

    def type(self, text: str) -> None:
        (query,) = self.find("#query")
        query.clear()
        query.send_keys(text)
        query.submit()

    def drop(self, data: bytes, zeros: int = 0) -> None:
        """Drops a file onto the page: `data`, then so many zeros."""
        self.browser.execute_script(
            """
            const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
            const files = new DataTransfer();
            const parts = [bytes, new Uint8Array(arguments[1])];
            files.items.add(new File(parts, "a.png", { type: "image/png" }));
            const how = { dataTransfer: files, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", how));
            """,
            base64.b64encode(data).decode(),
            zeros,
        )

    def complaints(self) -> list[str]:
        """What the browser's console says, but for refused requests."""
        entries = [entry["message"] for entry in self.browser.get_log("browser")]
        return [entry for entry in entries if "Failed to load resource" not in entry]


@pytest.fixture
def page(chromium, address) -> Page:
    page = Page(chromium, address)
    page.open("/")
    return page


def test_typed_query_shows_ranked_pictures_of_both_runs(page, searchers):
    assert page.find("#query")[0] == page.browser.switch_to.active_element
    assert "drop an image" in page.shown("#empty")[0]
    page.type("find 3")
    page.wait(lambda: len(page.find(".run")) == 2)
    documents = searchers[0].store.documents
    expected = [
        [documents[row]["title"] or documents[row]["id"] for row in rows]
        for _, rows in (searcher.search({"text": "find 3"}, 10) for searcher in searchers)
    ]
    assert page.titles() == expected
    assert expected[0] != expected[1]
    assert [name.split("step")[0] for name in page.shown("h2")] == [s.name for s in searchers]
    assert page.shown("#runs b") == [str(rank) for rank in range(1, 11)] * 2
    assert "10 of 24 documents in" in page.shown("#status")[0]
    images = page.find("#runs img")
    page.wait(lambda: all(image.get_property("complete") for image in images))
    assert {image.get_property("naturalWidth") for image in images} == {20}
    assert all(image.get_attribute("alt") for image in images)
    assert page.browser.current_url.endswith("/?q=find+3&k=10")
    assert page.complaints() == []


def test_movement_against_the_first_run(page, searchers):
    page.open("/?q=find+3&k=100")
    first, second = (list(s.search({"text": "find 3"}, 24)[1]) for s in searchers)
    moves = [first.index(row) - place for place, row in enumerate(second)]
    expected = [f"{'▲' if move > 0 else '▼'}{abs(move)}" if move else "=" for move in moves]
    assert page.shown(".moved") == expected


def test_an_address_can_be_shared_and_gone_back_to(page):
    page.open("/?q=find+3&k=5")
    assert list(map(len, page.titles())) == [5, 5]
    shared = page.titles()
    page.type("")
    page.wait(lambda: page.titles() == [])
    assert page.browser.title == "gcl_jax search"
    page.browser.back()
    page.wait(lambda: page.titles() == shared)
    assert page.find("#query")[0].get_property("value") == page.browser.title == "find 3"
    page.find("#k")[0].send_keys("20")
    page.wait(lambda: list(map(len, page.titles())) == [20, 20])
    assert page.browser.current_url.endswith("/?q=find+3&k=20")
    page.open("/?q=find+3&k=1000")
    assert page.shown("#error") == ["k is not a whole number from 1 to 100"]
    assert page.titles() == []


def test_scripts_are_shown_as_text(page):
    """In the query, and in a title of the store."""
    page.type("<script>alert(1)</script><img src=x onerror=alert(2)>")
    page.wait(lambda: page.titles())
    page.find("#k")[0].send_keys("50")
    page.wait(lambda: len(page.find("#runs li")) == 48)
    assert all(HOSTILE in titles for titles in page.titles())
    tags = "return document.querySelectorAll('script, #runs script, [onerror]').length"
    assert page.browser.execute_script(tags) == 1, "the page's own"
    assert "alert" in page.browser.current_url
    assert page.complaints() == [], "an alert would have ended the test, a refused script is here"


def test_browser_refuses_scripts_in_the_page(page):
    page.browser.execute_script(
        "const made = document.createElement('script');"
        "try { made.text = 'window.harmed = true'; document.body.append(made); } catch {}"
    )
    assert page.browser.execute_script("return window.harmed") is None
    assert page.complaints() != []


def test_dropped_image_is_searched_for(page, searchers):
    data = searchers[0].store.documents[11]["image"]
    page.drop(data)
    page.wait(lambda: page.titles())
    assert page.titles()[1][0] == "thing 11"
    assert page.shown("#asked") == ["Remove image"]
    page.wait(lambda: page.find("#preview")[0].get_property("naturalWidth") == 20)
    page.find("#clear")[0].click()
    page.wait(lambda: page.shown("#empty"))
    assert page.titles() == []
    assert page.complaints() == []


def test_chosen_image_is_searched_for(page, searchers, tmp_path):
    path = tmp_path / "b.png"
    path.write_bytes(searchers[0].store.documents[12]["image"])
    page.find("#file")[0].send_keys(str(path))
    page.wait(lambda: page.titles())
    assert page.titles()[1][0] == "thing 12"


@pytest.mark.parametrize(
    ("data", "zeros", "message"),
    [
        (b"only a text", 0, f"unreadable image: this is not an image ({', '.join(FORMATS)})"),
        (b"", 0, f"unreadable image: this is not an image ({', '.join(FORMATS)})"),
        (
            png_header(10_000, 5_000),
            0,
            "the image has 10000 x 5000 = 50 million pixels; at most 40 million are searched for",
        ),
        (b"", serve.MAX_BYTES + 2**20, "the image has 33.0 MiB; at most 32"),
    ],
    ids=("text", "empty", "50 megapixels", "33 MiB"),
)
def test_dropped_files_that_are_refused(page, data, zeros, message):
    page.type("find 3")
    page.wait(lambda: page.titles())
    page.drop(data, zeros)
    page.wait(lambda: page.shown("#error"))
    assert page.shown("#error") == [message]
    assert page.titles() == []
    page.type("find 3")
    page.wait(lambda: page.titles())
    assert page.shown("#error") == []
    assert page.complaints() == []


def test_keyboard_alone(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(page.browser).send_keys(*keys).perform()

    press("find 3", Keys.ENTER)
    page.wait(lambda: page.titles())
    press(Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB)
    focused = page.browser.switch_to.active_element
    assert focused.get_attribute("href").endswith("/image"), "image, number, button; first result"
    assert len(page.find("li.same")) >= 1, "the same document in the other run is marked"
    press("/", "thing")
    assert page.find("#query")[0].get_property("value") == "thing"
