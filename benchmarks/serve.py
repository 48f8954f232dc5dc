"""How long the search page and the API take to answer:

    python benchmarks/serve.py --workdir=runs/demo

Serves the run in this process and asks one query after the other: over HTTP, texts and images, and
by typing into the page in Chromium where it is installed (Debian: chromium, chromium-driver; and
selenium from the `test` extra), from Enter to the results being in the page. Then a process of its
own asks the API of `gcl_jax.serve` for texts that it has not seen, by one client and by many at a
time, with batches and without. Prints medians and the slowest of all in milliseconds, and writes
JSON.
"""

import argparse
import concurrent.futures
import http.client
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from werkzeug.serving import make_server

from gcl_jax.search.searcher import Searcher
from gcl_jax.search.serve import ADDRESS, LimitedServer, QuietHandler, SearchApp
from gcl_jax.serve.api import BATCH_SIZES, CONNECTIONS, Api

# The page empties its status when it asks, and says how long it took when it is done.
DONE = """
const status = document.getElementById("status");
return document.title === arguments[0] && status.textContent && status.dataset.milliseconds;
"""


def figures(milliseconds: list[float]) -> dict[str, float]:
    median, slowest = statistics.median(milliseconds), max(milliseconds)
    return {"median": round(median, 1), "slowest": round(slowest, 1), "queries": len(milliseconds)}


def over_http(address: str, queries: list[str] | list[bytes], top_k: int) -> dict:
    """{"server": what the API says of embedding and search, "http": from request to answer}."""
    server, http = [], []
    for query in queries:
        given = {"k": top_k} | ({"q": query} if isinstance(query, str) else {})
        data = None if isinstance(query, str) else query
        request = urllib.request.Request(
            f"{address}/api/search?{urllib.parse.urlencode(given)}", data=data
        )
        start = time.perf_counter()
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        http.append(1e3 * (time.perf_counter() - start))
        server.append(sum(run["milliseconds"] for run in answer["runs"]))
    return {"server": figures(server), "http": figures(http)}


def in_browser(address: str, queries: list[str], top_k: int) -> dict | None:
    """The page's own clock, from Enter to the results in the page; None without a browser."""
    try:
        from selenium import webdriver
        from selenium.webdriver.support.wait import WebDriverWait
    except ImportError:
        return None
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        return None
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("headless", "no-sandbox", "disable-gpu", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
        browser.get(f"{address}/?k={top_k}")
        took = []
        for query in queries:
            field = browser.find_element("id", "query")
            field.clear()
            field.send_keys(query)
            field.submit()
            shown = WebDriverWait(browser, 30, poll_frequency=0.01).until(
                lambda browser, query=query: browser.execute_script(DONE, query)
            )
            took.append(float(shown))
        browser.quit()
    return figures(took)


def asked_by(clients: int, requests: int, port: int, top_k: int) -> dict[str, float]:
    """What so many clients see who ask again as soon as they are answered."""

    def ask(number: int) -> tuple[bool, float]:
        start = time.perf_counter()
        connection = http.client.HTTPConnection(ADDRESS, port, timeout=60)
        # No query twice.
        body = json.dumps({"query": f"query {number} of {clients}", "k": top_k})
        try:
            connection.request("POST", "/search", body)
            answer = connection.getresponse()
            found = json.loads(answer.read())
            good = answer.status == 200 and len(found["results"]) == 1
        except OSError:
            good = False
        connection.close()
        return good, 1e3 * (time.perf_counter() - start)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        good, took = zip(*pool.map(ask, range(requests)), strict=True)
    seconds = time.perf_counter() - start
    median, p99 = np.percentile(took, [50, 99])
    return {
        "clients": clients,
        "requests": requests,
        "errors": requests - sum(good),
        "per_second": round(requests / seconds, 1),
        "median": round(float(median), 1),
        "p99": round(float(p99), 1),
    }


def api_under_load(workdir: Path, clients: int, requests: int, top_k: int) -> dict:
    """{"one_by_one", "together": of many clients, "unbatched": of as many without batches}."""
    found = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as elsewhere:
        for sizes in (BATCH_SIZES, (1,)):
            api = Api()
            api.open(Searcher(workdir, None, None, batch_sizes=sizes))
            server = LimitedServer(ADDRESS, 0, api, QuietHandler, connections=CONNECTIONS)
            server.start()
            loads = (
                {"one_by_one": 1, "together": clients} if sizes != (1,) else {"unbatched": clients}
            )
            for name, at_once in loads.items():
                elsewhere.submit(asked_by, at_once, 4 * at_once, server.port, top_k).result()
                count = max(requests // 4, 1) if at_once == 1 else requests
                load = elsewhere.submit(asked_by, at_once, count, server.port, top_k)
                found[name] = load.result()
            server.drain(60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, action="append", required=True)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--clients", type=int, default=64, help="of the API, at a time")
    parser.add_argument("--requests", type=int, default=4000, help="that they make")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    searchers = [Searcher(workdir, None, None) for workdir in args.workdir]
    store = searchers[0].store
    app = SearchApp(searchers)
    server = make_server(ADDRESS, 0, app, threaded=True, request_handler=QuietHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.port}"
    # No query twice; words that no cache has seen.
    texts = [f"query number {i}" for i in range(args.queries)]
    field = next(iter(name for name, kind in store.documents.fields.items() if kind == "image"), "")
    rows = range(0, len(store.documents), max(1, len(store.documents) // args.queries))
    images = [image for row in rows if field and (image := store.documents[row][field])]
    result = {
        "documents": searchers[0].documents,
        "runs": len(searchers),
        "top_k": args.top_k,
        "text": over_http(address, texts, args.top_k),
        "image": over_http(address, images, args.top_k) if images else None,
        "browser": in_browser(address, texts, args.top_k),
    }
    server.shutdown()
    result["api"] = api_under_load(args.workdir[0], args.clients, args.requests, args.top_k)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
