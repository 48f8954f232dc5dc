"""tools/build_clipart.py and build_icons.py: which drawings, which queries, in which order."""

import collections
import itertools
import json
import math
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image
from processes import ROOT

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/">
 <metadata><rdf:RDF><cc:Work><dc:title> a  {0}
 </dc:title><dc:subject><rdf:Bag>{1}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>"""
KEYWORDS = {
    **{f"animals/cat{i}": ("animal", "Wild_Cat", "hash") for i in range(4)},
    **{f"animals/dog{i}": ("animal", "dog") for i in range(5)},
    "animals/all": ("animal", "dog", "wild cat"),
    "food/hot": ("food", "dog"),
    "plants/rose": ("rose",),
    "plants/none": ("hash",),
    "shapes/stars/star": ("animal", "dog"),
}


@pytest.fixture
def library(tmp_path):
    for number, (name, keywords) in enumerate(KEYWORDS.items()):
        svg, png = (
            tmp_path / "usr/share/openclipart" / kind / f"{name}.{kind}" for kind in ("svg", "png")
        )
        for file in (svg, png):
            file.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(SVG.format(name, "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)))
        Image.new("LA", (200, 100), (number, 255)).save(png)
    again = tmp_path / "usr/share/openclipart/png/animals/dog4.png"
    again.write_bytes(again.with_name("dog0.png").read_bytes())
    return tmp_path


def test_the_tables(library, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import build_clipart

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["build_clipart.py", f"--data={library}", f"--out={out}"])
    build_clipart.main()
    documents = pq.read_table(out / "documents.parquet").to_pylist()
    left_out = ("animals/dog4", "plants/none", "shapes/stars/star")
    assert [row["id"] for row in documents] == sorted(set(KEYWORDS) - set(left_out))
    assert documents[0]["title"] == "a animals/all"
    (out / "image.png").write_bytes(documents[0]["image"])
    image = Image.open(out / "image.png")
    assert (image.size, image.mode) == ((64, 64), "RGB")
    number = list(KEYWORDS).index("animals/all")
    assert [image.getpixel((32, y)) for y in (0, 32, 63)] == [(255,) * 3, (number,) * 3, (255,) * 3]

    found = collections.defaultdict(dict)
    for row in pq.read_table(out / "pairs.parquet").to_pylist():
        found[row["query"]][row["id"]] = row["score"]
    words_of = {
        row["id"]: {w.lower().replace("_", " ") for w in KEYWORDS[row["id"]]} - {"hash"}
        for row in documents
    }
    counts = collections.Counter(itertools.chain(*words_of.values()))
    weight = {word: math.log(len(documents) / count) for word, count in counts.items()}
    # A pair that is as wide as one of its words is no query: every cat here is an animal.
    queries = {"animal": {"animal"}, "animal dog": {"animal", "dog"}, "dog": {"dog"}}
    queries["wild cat"] = {"wild cat"}
    assert set(found) == set(queries)
    for query, asked in queries.items():
        cosine = {
            id: sum(weight[w] ** 2 for w in words & asked)
            / math.hypot(*map(weight.get, words))
            / math.hypot(*map(weight.get, asked))
            for id, words in words_of.items()
        }
        cosine = {id: round(x, 9) for id, x in cosine.items() if x}
        levels = sorted(set(cosine.values()), reverse=True)
        assert found[query] == {id: 100 - levels.index(x) for id, x in cosine.items()}
        assert list(found[query].values()) == sorted(found[query].values(), reverse=True)


def test_the_words_of_icons(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from build_icons import read_icons

    said = [
        {"name": "home-off", "aliases": ["house-off-2"], "tags": ["Home / Rooms"], "deprecated": 0},
        {"name": "account", "aliases": [], "tags": [], "deprecated": 0},
        {"name": "brand-x", "aliases": [], "tags": [], "deprecated": 1},
    ]
    (tmp_path / "meta.json").write_text(json.dumps(said))
    icons = read_icons(tmp_path)
    assert list(icons) == ["account", "home-off"]
    assert icons["home-off"].title == "home off"
    assert icons["home-off"].keywords == {"home", "off", "house", "rooms"}
    assert icons["account"].file == tmp_path / "svg" / "account.svg"
