"""The source `photos`: its relevance rule, and one store from wherever the photographs come."""

import collections
import colorsys
import functools
import io
import json
import math
import urllib.error
import urllib.request
from fractions import Fraction

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gcl_jax.data.store import CHECKSUMS, RankedStore
from gcl_jax.data.transforms import decode_image
from gcl_jax.errors import DataError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import photo_relevance as rule
from gcl_jax.prepare.stores import open_store

SIDE = rule.SIDE


def photographs(of_a_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Made-up ones: a middle in one of some colours, a rim in another, of random widths."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (12, 3))
    classes = np.repeat(np.arange(10), of_a_class)
    photos = np.empty((len(classes), SIDE, SIDE, 3), np.uint8)
    for number, photo in enumerate(photos):
        middle, rim = palette[rng.integers(0, len(palette), 2)]
        photo[:] = rim
        a, b, c, d = rng.integers(2, 14, 4)
        photo[a : SIDE - b, c : SIDE - d] = middle
        photo[0, 0] = number % 256, number // 256, 0  # no two are the same
    return photos, classes


@functools.cache
def colour_of(red: int, green: int, blue: int) -> str:
    """As the documentation says it, in fractions."""
    value = Fraction(max(red, green, blue), 255)
    chroma = value - Fraction(min(red, green, blue), 255)
    saturation = chroma / value if value else Fraction(0)
    if value < Fraction(1, 5):
        return "black"
    if value > Fraction(4, 5) and saturation < Fraction(15, 100):
        return "white"
    if saturation < Fraction(1, 5):
        return "grey"
    chroma *= 255
    if red == max(red, green, blue):
        hue = 60 * (green - blue) / chroma % 360
    elif green == max(red, green, blue):
        hue = 60 * (blue - red) / chroma + 120
    else:
        hue = 60 * (red - green) / chroma + 240
    assert math.isclose(hue, 360 * colorsys.rgb_to_hsv(red, green, blue)[0], abs_tol=1e-9)
    if hue < 45 and value < Fraction(65, 100) and saturation < Fraction(75, 100):
        return "brown"
    return next(name for up_to, name in rule.HUES.items() if hue < up_to)


def test_colours_are_those_of_a_pixel_at_a_time():
    rng = np.random.default_rng(1)
    some = rng.integers(0, 256, (3000, 3))
    ends = np.array([0, 38, 50, 51, 52, 102, 165, 166, 173, 204, 205, 216, 255])
    pixels = np.concatenate([some, np.stack(np.meshgrid(ends, ends, ends), -1).reshape(-1, 3)])
    found = [rule.COLOURS[k] for k in rule.colours(pixels.astype(np.uint8))]
    assert found == [colour_of(*pixel) for pixel in pixels.tolist()]
    assert set(found) == set(rule.COLOURS)


def test_rankings_are_those_of_a_photograph_at_a_time(monkeypatch):
    monkeypatch.setattr(rule, "MOST_FOUND", 50)
    photos, classes = photographs(30)

    def shares(photo, inside):
        """{colour: its share} of the pixels `inside`."""
        places = [(y, x) for y in range(SIDE) for x in range(SIDE) if inside(y, x)]
        hits = collections.Counter(colour_of(*photo[place].tolist()) for place in places)
        return {colour: Fraction(hits[colour], len(places)) for colour in rule.COLOURS}

    def in_middle(y, x):
        return 8 <= y < SIDE - 8 and 8 <= x < SIDE - 8

    def at_rim(y, x):
        return min(y, x) < 5 or max(y, x) >= SIDE - 5

    middle = [shares(photo, in_middle) for photo in photos]
    rim = [shares(photo, at_rim) for photo in photos]
    expected = {}
    for subject, names in rule.SUBJECTS.items():
        members = [i for i, k in enumerate(classes) if rule.CLASSES[k] in names]
        for colour in rule.COLOURS:
            asked = {
                f"{colour} {subject}": ({i: middle[i][colour] for i in members}, Fraction(1, 4)),
                f"{subject} on {colour}": ({i: rim[i][colour] for i in members}, Fraction(35, 100)),
            }
            for other in rule.COLOURS:
                product = {i: middle[i][colour] * rim[i][other] for i in members}
                asked[f"{colour} {subject} on {other}"] = product, Fraction(9, 100)
            for query, (of_query, least) in asked.items():
                enough = [i for i in members if of_query[i] >= least]
                if len(enough) >= 10:
                    expected[query] = sorted(enough, key=lambda i, of=of_query: -of[i])[:50]
    found = {query: ranked.tolist() for query, ranked in rule.rankings(photos, classes)}
    assert found == expected
    assert max(map(len, found.values())) == 50
    assert len(found) > 50


def write_archive(folder, photos, classes):
    for part in range(2):
        rows = photos[part::2].transpose(0, 3, 1, 2).reshape(-1, 3072)
        rows = np.concatenate([classes[part::2, None].astype(np.uint8), rows], 1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"data_batch_{part + 1}.bin").write_bytes(rows.tobytes())


def write_sheet(folder, photos, classes):
    folder.mkdir()
    sheet = Image.fromarray(photos.reshape(len(photos), SIDE * SIDE, 3))
    sheet.save(folder / "data_batch_1.png")
    (folder / "train_lables.json").write_text(json.dumps(classes.tolist()))


def write_folders(folder, photos, classes):
    for number, (photo, k) in enumerate(zip(photos, classes, strict=True)):
        path = folder / rule.CLASSES[k] / f"{-number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(path)


FORMS = {"archive": write_archive, "sheet": write_sheet, "folders": write_folders}


def prepared(out, data) -> RankedStore:
    flags = [f"--out={out}", "--source=photos", f"--data={data}"]
    return prepare.prepare(prepare.make_parser().parse_args(flags))


def test_the_same_photographs_make_the_same_store(tmp_path):
    photos, classes = photographs(12)
    stores = {}
    for form, write in FORMS.items():
        write(tmp_path / form, photos, classes)
        stores[form] = prepared(tmp_path / "stores" / form, tmp_path / form)
    files = {form: set(checksums(store).items()) for form, store in stores.items()}
    assert files["archive"] == files["sheet"] == files["folders"]
    infos = [store.info | {"plan": ""} for store in stores.values()]
    assert infos == [infos[0]] * len(FORMS)
    again = prepared(tmp_path / "again", tmp_path / "sheet")
    assert (again.directory / CHECKSUMS).read_bytes() == (
        stores["sheet"].directory / CHECKSUMS
    ).read_bytes()

    store = stores["archive"]
    assert store.splits == ["in_domain", "novel_query", "novel_document", "zero_shot"]
    pairs = {split: store.pairs(split) for split in store.splits}
    queries = {split: set(of.query.tolist()) for split, of in pairs.items()}
    assert queries["in_domain"].isdisjoint(queries["novel_query"] | queries["zero_shot"])
    for split, of in pairs.items():
        assert set(of.document.tolist()) <= set(store.corpus(split).tolist())
    halves = store.corpus("in_domain"), store.corpus("zero_shot")
    assert len(np.unique(np.concatenate(halves))) == len(store.documents) == len(photos)
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    scores = collections.defaultdict(set)
    for of in pairs.values():
        for query, score in zip(of.query.tolist(), of.score.tolist(), strict=True):
            scores[query].add(score)
    assert all({100.0, 99.0} <= found for found in scores.values())
    stored = {decode_image(document["image"]).tobytes() for document in store.documents}
    assert stored == {photo.tobytes() for photo in photos}


def checksums(store: RankedStore) -> dict[str, str]:
    """{file: checksum} but for store.json, which names what the store was made from."""
    lines = (store.directory / CHECKSUMS).read_text().splitlines()
    return {name: total for total, name in map(str.split, lines) if name != "store.json"}


def test_what_is_missing_or_broken_is_told_in_one_line(tmp_path):
    photos, classes = photographs(1)
    write_archive(tmp_path / "short", photos, classes)
    file = tmp_path / "short" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    write_archive(tmp_path / "eleven", photos, classes + 1)
    write_sheet(tmp_path / "unnamed", photos, classes)
    (tmp_path / "unnamed" / "train_lables.json").write_text("[1, 2]")
    write_sheet(tmp_path / "json", photos, classes)
    (tmp_path / "json" / "train_lables.json").write_text("[1, 2")
    write_folders(tmp_path / "no_ship", photos[classes != 8], classes[classes != 8])
    write_folders(tmp_path / "large", photos, classes)
    Image.new("RGB", (64, 64)).save(tmp_path / "large" / "ship" / "x.png")
    write_folders(tmp_path / "broken", photos, classes)
    (tmp_path / "broken" / "ship" / "x.png").write_bytes(b"no picture")
    for folder, words in {
        "nowhere": "nowhere holds no photographs of CIFAR-10; give --data",
        "short": "data_batch_2.bin is cut short",
        "eleven": "numbers from 0 to 9",
        "unnamed": "has 2 classes, too few for data_batch_1.png",
        "json": "train_lables.json: broken JSON",
        "no_ship": "ship holds no PNG file",
        "large": "x.png has 64 x 64 pixels; CIFAR-10 has 32 x 32",
        "broken": "x.png: unreadable image",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            prepared(tmp_path / "out", tmp_path / folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_they_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))

    def offline(url, timeout):
        assert url.endswith("cifar-10-binary.tar.gz")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"no network.*give --data"):
        open_store("photos")

    fetched = []

    def fetch(manager, url):
        fetched.append(url)
        write_archive(tmp_path / "got" / "cifar-10-batches-bin", *photographs(12))
        return tmp_path / "got"

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO())
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fetch)
    assert len(open_store("photos").documents) == len(open_store("photos").documents) == 120
    assert len(fetched) == 1
