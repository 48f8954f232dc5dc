"""What README.md, CONTRIBUTING.md and docs/ tell to type works, and their figures are those of
benchmarks/*.json.

A block of bash or Python is run here, unless its fence names what it needs: ```bash needs="a GPU".
Every command in a block must have the flags that it is given, whether it is run or not. Commands
run in `workplace`, where the files lie that the pages name, and are shortened by `SHORT` alone.
"""

import configparser
import functools
import glob
import io
import itertools
import json
import re
import shlex
import tarfile
from typing import NamedTuple

import commands
import numpy as np
import pytest
from conftest import png
from processes import ROOT

from benchmarks import figures
from gcl_jax.data.store import RankedStore

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file of its own
LANGUAGES = {"bash", "python", "text", "json", "{toctree}", "{include}", "{options}", "{eval-rst}"}

# Added to every training that a page tells to start: a few steps, images of one patch, one split.
SHORT = (
    "--config.optim.steps=2",
    "--config.optim.warmup_steps=1",
    "--config.optim.batch_size=16",
    "--config.model.vision.image_size=16",
    "--config.model.vision.layers=1",
    "--config.eval.every=0",
    "--config.eval.splits=('in_domain',)",
    "--config.eval.max_queries=20",
)
DEMO = "gcl_jax.train --config=configs/emoji_tiny.py --workdir=runs/demo"


class Block(NamedTuple):
    page: str
    language: str
    needs: str
    text: str


def blocks(page):
    name = str(page.relative_to(ROOT))
    return [Block(name, *found) for found in FENCE.findall(page.read_text("utf-8"))]


BLOCKS = [block for page in PAGES if page.exists() for block in blocks(page)]


def command_lines(text):
    """The commands of a block, each as its words: without comments, continued lines joined."""
    line = ""
    for more in text.replace("\\\n", " ").splitlines():
        line += more
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on
            line += " "
            continue
        line = ""
        if words:
            yield words


def module_of(words):
    """["gcl_jax.train", "--config=...", ...] of one of our commands, else None."""
    if words[:2] == ["python", "-m"] and words[2].startswith("gcl_jax"):
        return words[2:]
    return ["gcl_jax", *words[1:]] if words[0] == "gcl-jax" else None


def lay_out(folder):
    """The configs, and the blocks that are files of their own, each of another name."""
    (folder / "configs").symlink_to(ROOT / "configs")
    for block in BLOCKS:
        if named := FILE.match(block.text):
            with (folder / named[1]).open("x") as file:
                file.write(block.text)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a reader has it who has followed the pages: the repository's configs, a demo run,
    and small files of the names that the pages use."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"images/p{i:02}.jpg").write_bytes(png(rng))
    rows = [
        {
            "query": f"{['red', 'blue', 'green'][i % 3]} thing {i // 3}",
            "product_id": f"p{j:02}",
            "image": f"images/p{j:02}.jpg",
            "title": f"thing {j}",
            "score": 100 - j,
        }
        for i in range(30)
        for j in range(12)
    ]
    header = "query,product_id,image,title,score"
    lines = [",".join(str(value) for value in row.values()) for row in rows]
    (folder / "pairs.csv").write_text("\n".join([header, *lines]) + "\n")
    listed = [row | {"not": ["p11"], "other": ["red socks"]} for row in rows]
    listed = [row for row in listed if row["product_id"] != "p11"] + [rows[11]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    asked = ({"asked": f"thing {i}", "clicked": f"a thing, {i}"} for i in range(20))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "shards").mkdir()
    (folder / "pictures").mkdir()
    with tarfile.open(folder / "shards/0.tar", "w") as tar:
        for i in range(4):
            for suffix, content in {"png": png(rng), "txt": f"picture {i}".encode()}.items():
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                (folder / f"pictures/{i}.{suffix}").write_bytes(content)
    captions = [f"{i}.png,picture {i}" for i in range(4)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *captions]) + "\n")
    asked = [{"asked": f"thing {i}", "clicked": f"a thing, {i}"} for i in range(20)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "gt.json").write_text(json.dumps({"q1": {"d1": 3, "d2": 1}}))
    (folder / "results.trec.gz").write_text("q1 Q0 d1 1 0.9 mine\nq1 Q0 d2 2 0.8 mine\n")
    lay_out(folder)
    run_once(folder, *DEMO.split(), *SHORT)
    return folder


@functools.cache
def run_once(folder, *words):
    """What several pages tell to type need not run again."""
    commands.run(folder, *words)


def test_fences_name_their_language():
    odd = [f"{b.page}: ```{b.language}{b.needs}" for b in BLOCKS if b.language not in LANGUAGES]
    odd += [
        f"{b.page}: ```{b.language}{b.needs}: write needs=..."
        for b in BLOCKS
        if b.language in ("bash", "python") and b.needs and not b.needs.startswith(" needs=")
    ]
    assert odd == []


def test_commands_have_the_flags_that_they_are_given(tmp_path):
    lay_out(tmp_path)
    lines = {
        " ".join(words): [word.replace("/mine.py", "/emoji_tiny.py") for word in words]
        for block in BLOCKS
        if block.language == "bash"
        for line in command_lines(block.text)
        if (words := module_of(line)) and words[0] != "gcl_jax"
    }
    assert len(lines) > 40
    commands.parse(tmp_path, list(lines.values()))
    with pytest.raises(AssertionError, match="top_q"):
        commands.parse(tmp_path, [["gcl_jax.search", "--workdir=runs/demo", "cat", "--top_q=5"]])
    with pytest.raises(AssertionError, match="rate"):
        commands.parse(tmp_path, [[*DEMO.split(), "--config.optim.rate=1"]])


def pages_with(language):
    """Pages with blocks of `language` that need nothing special, as test parameters."""
    texts = {}
    for block in BLOCKS:
        if block.language == language and not block.needs:
            texts.setdefault(block.page, []).append(block.text)
    return [pytest.param(found, id=page) for page, found in texts.items()]


@pytest.mark.parametrize("texts", pages_with("bash"))
def test_commands_run(texts, workplace):
    for words in command_lines("".join(texts)):
        ours = module_of(words)
        assert ours, f"{' '.join(words)}: say what the block needs, or test it here"
        found = (sorted(glob.glob(word, root_dir=workplace)) or [word] for word in ours)
        short = SHORT if ours[0] == "gcl_jax.train" else ()
        run_once(workplace, *itertools.chain(*found), *short)


@pytest.mark.parametrize("texts", pages_with("python"))
def test_python_runs(texts, workplace):
    named = [FILE.match(text) for text in texts]
    imports = (f"import {name[1].removesuffix('.py')}" if name else "" for name in named)
    commands.execute(workplace, *(line or text for line, text in zip(imports, texts, strict=True)))


def test_captions_in_several_languages_become_stores(tmp_path):
    """Files as Multi30K and xFlickr&CO have them."""
    needed = [b for b in BLOCKS if b.needs == ' needs="captions in several languages"']
    line_by_line, by_image = (b.text for b in needed if b.language == "python")
    prepare, _train = command_lines("".join(b.text for b in needed if b.language == "bash"))
    for folder in ("images", "image_splits", "raw", "annotations"):
        (tmp_path / folder).mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        names = [f"{split}{i}.jpg" for i in range(3)]
        for name in names:
            (tmp_path / "images" / name).write_bytes(png(np.random.default_rng(len(name))))
        (tmp_path / f"image_splits/{split}.txt").write_text("".join(f"{n}\n" for n in names))
        for language in ("en", "de", "fr", "cs"):
            texts = [f'{language}, "{n}" \u2028 {split}\n' for n in names]
            (tmp_path / f"raw/{split}.{language}").write_text("".join(texts), "utf-8")
    for i, language in enumerate(("en", "de", "es", "id", "ja", "ru", "tr", "zh")):
        images = [(f"val{j}.jpg", [f"{language} {j}", "b"][: 1 + j]) for j in range(3 - (i > 3))]
        rows = [{"id": n, "img_path": n, "sentences": texts} for n, texts in images]
        (tmp_path / "annotations" / language).mkdir()
        file = tmp_path / "annotations" / language / "test.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands.execute(tmp_path, line_by_line, by_image)
    ours = module_of(prepare)
    commands.run(tmp_path, *ours)
    store = RankedStore(tmp_path / "stores/languages")
    assert store.kinds["query"] == dict.fromkeys(("en", "de", "fr", "cs"), "text")
    assert {split: len(store.pairs(split)) for split in store.splits} == {
        "train": 3,
        "val": 3,
        "test_2016_flickr": 3,
    }
    assert [json.loads(x)["image"] for x in (tmp_path / "xflickrco.jsonl").open()] == [
        "val0.jpg",
        "val1.jpg",
        "val1.jpg",
        "val2.jpg",
        "val2.jpg",
    ]


def test_figures_are_those_of_the_benchmarks():
    texts = {page: page.read_text("utf-8") for page in figures.pages()}
    outdated = [str(page) for page, text in texts.items() if figures.filled(text) != text]
    assert outdated == [], "python benchmarks/figures.py"


def test_figures_stand_within_their_lines():
    """Markdown takes a line that begins with a comment for HTML as a whole."""
    odd = [
        f"{page.name}: {line}"
        for page in figures.pages()
        for line in page.read_text("utf-8").splitlines()
        if line.lstrip(" -*").startswith("<!--") and figures.FIGURE.search(line)
    ]
    assert odd == []


def test_links_lead_somewhere():
    """Sphinx checks those within docs/."""
    gone = [
        f"{page.name}: {link}"
        for page in PAGES[:2]
        for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert gone == []


def test_extras_are_installed_from_a_clone():
    """No registry has the package; `errors.to_install` says how an extra of setup.cfg is had."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    paths = [*PAGES, *(ROOT / "docs/notebooks").glob("*")]
    for folder in ("gcl_jax", "configs", "benchmarks", "launch"):
        paths += [path for path in (ROOT / folder).rglob("*.[pmys]*") if path.is_file()]
    for path in paths:
        text = path.read_text("utf-8", "replace")
        assert not re.search(r"gcl[_-]jax\[(?!" + "'|\")", text), path
        assert set(re.findall(r"to_install\([\"'](\w+)", text)) <= extras, path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
