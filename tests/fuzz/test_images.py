"""Images in every format and mode, damaged or whole, in a folder with captions.

An image is read or named as skipped; one that is read can be trained on, searched for and shown.
"""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from fuzz.fuzzing import damaged, run
from gcl_jax.config import PreprocessConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.data.transforms import (
    ENDINGS,
    ImageTransform,
    decode_image,
    random_resized_crop,
    thumbnail,
)

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK"),
    "WEBP": ("L", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "EPS": ("RGB",),  # this and what follows is refused
    "ICO": ("RGB",),
    "PDF": ("RGB",),
}
SIZES = (1, 2, 3, 7, 16, 33, 400)
IMAGES = 8


def encoded(rng: random.Random) -> bytes:
    kind = rng.choice(list(MODES))
    mode, size = rng.choice(MODES[kind]), (rng.choice(SIZES), rng.choice(SIZES))
    if kind == "ICO":
        size = (16, 16)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("L").convert(mode) if mode in ("I", "I;16", "F") else image.convert(mode)
    options = {}
    if kind in ("GIF", "WEBP", "TIFF") and rng.random() < 0.2:
        options = {"save_all": True, "append_images": [image.rotate(180)]}
    if kind == "PNG" and mode == "P" and rng.random() < 0.5:
        options["transparency"] = 0
    file = io.BytesIO()
    image.save(file, kind, **options)
    data = file.getvalue()
    return damaged(rng, data) if rng.random() < 0.7 else data


@pytest.mark.filterwarnings("ignore:::PIL")
def test_images_in_a_folder(rng, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "store"
    folder.mkdir()
    for i in range(IMAGES):
        ending = rng.choice(sum(ENDINGS.values(), ()))  # often a wrong one
        (folder / f"{i}.{ending}").write_bytes(encoded(rng))
        (folder / f"{i}.txt").write_text(f"caption {i}")
    outcome = run(
        "prepare", "--source=folder", f"--data={folder}", f"--out={out}", "--on_error=skip"
    )
    if outcome.error:
        assert "no documents left" in outcome.error
        return
    store = RankedStore(out)
    skips = out / "skipped.jsonl"
    lines = skips.read_text("utf-8").splitlines() if skips.exists() else []
    skipped = {json.loads(line)["row"] - 1 for line in lines}
    kept = {int(record["id"]): record["image"] for record in store.documents}
    assert {*kept} == {*range(IMAGES)} - skipped
    assert len(store.pairs("train")) == len(kept)
    for data in kept.values():
        for mode in ("shortest", "longest", "squash"):
            transform = ImageTransform(8, PreprocessConfig(resize_mode=mode))
            assert transform(decode_image(data)).shape == (8, 8, 3)
        cropped = random_resized_crop(decode_image(data, 8), 8, np.random.default_rng(0), 0.5)
        assert cropped.shape == (8, 8, 3)
        assert thumbnail(data)
