"""Which library decodes and resizes images fastest, and how far its pixels are from Pillow's:

    pip install simplejpeg opencv-python-headless imagecodecs
    python benchmarks/decode.py --image_size=224

Every library that is installed decodes JPEG, PNG and WebP of several sizes; then the ways from a
JPEG to a training crop are compared. Milliseconds of processor time in one thread, medians over
turns that alternate; differences are (mean, largest) of 255.
"""

import argparse
import functools
import importlib
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from gcl_jax.data import transforms
from gcl_jax.data.transforms import decode_for_crops, decode_image, random_resized_crop

SIZES = ((341, 256), (480, 480), (1000, 800), (2000, 1500))
FILES = {"JPEG": {"quality": 88}, "PNG": {}, "WEBP": {"quality": 85}}


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours, texture and noise."""
    rng = np.random.default_rng(0)
    noise = lambda w, h: Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
    enlarged = lambda image: np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    pixels = 0.7 * enlarged(noise(12, 9)) + 0.3 * enlarged(noise(width // 6, height // 6))
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def decoders() -> dict[str, Callable[[bytes], np.ndarray | Image.Image]]:
    """Those of the libraries that are installed; Pillow, the reference, comes first."""
    found: dict[str, Callable] = {"pillow": decode_image}
    makers = {
        "simplejpeg": lambda library: library.decode_jpeg,
        "imagecodecs": lambda library: library.imread,
        "cv2": lambda library: functools.partial(_opencv, library),
    }
    for name, make in makers.items():
        try:
            found[name] = make(importlib.import_module(name))
        except ImportError:
            print(f"{name} is not installed")
    return found


def _opencv(cv2, data: bytes) -> np.ndarray:
    cv2.setNumThreads(1)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flags), cv2.COLOR_BGR2RGB)


def crop(data: bytes, size: int, simd: bool, decode: Callable) -> np.ndarray:
    """A crop of 9/10 of the area, of the same part of the image on every call."""
    transforms.simd = SIMD if simd else None
    return random_resized_crop(decode(data), size, np.random.default_rng(0), 0.9)


SIMD = transforms.simd


def crops(size: int) -> dict[str, Callable[[bytes], np.ndarray]]:
    """Ways from a file to a crop; "now" is that of training, "any eighth" what libjpeg could do
    beyond it: decode at n/8 of the size, with as few pixels as the crop has."""
    scaled = functools.partial(decode_image, crop_size=size, min_area=0.9)
    ways: dict[str, tuple[bool, Callable]] = {"pillow": (False, decode_image)}
    ways["scaled"] = (False, scaled)
    if SIMD is not None:
        ways |= {"simd": (True, decode_image), "both": (True, scaled)}
        ways["now"] = (True, functools.partial(decode_for_crops, size=size, min_area=0.9))
        if simplejpeg := transforms.simplejpeg:
            least = round(1.1 * size)
            eighth = functools.partial(
                simplejpeg.decode_jpeg, min_height=least, min_width=least, min_factor=1
            )
            ways["any eighth"] = (True, eighth)
    return {
        name: functools.partial(crop, size=size, simd=simd, decode=decode)
        for name, (simd, decode) in ways.items()
    }


def measure(ways: dict[str, Callable[[bytes], np.ndarray | Image.Image]], data: bytes) -> dict:
    """{name: [milliseconds, mean difference, largest difference]}; the first is the reference."""
    pixels = {name: np.asarray(way(data)).astype(int) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    while sum(map(sum, times.values())) < 1.5 or len(times["pillow"]) < 5:
        for name, way in ways.items():
            began = time.process_time()
            way(data)
            times[name].append(time.process_time() - began)
    differences = {name: np.abs(found - pixels["pillow"]) for name, found in pixels.items()}
    return {
        name: [
            round(1e3 * statistics.median(times[name]), 2),
            round(float(d.mean()), 2),
            int(d.max()),
        ]
        for name, d in differences.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image_size", type=int, default=224, help="of the model")
    parser.add_argument("--out", type=Path, help="also write the figures there")
    args = parser.parse_args()
    figures = {}
    every = decoders()
    for size in SIZES:
        for kind, options in FILES.items():
            file = io.BytesIO()
            photo(*size).save(file, kind, **options)
            able = {n: f for n, f in every.items() if kind == "JPEG" or n != "simplejpeg"}
            name = f"{kind} {size[0]} x {size[1]}"
            figures[f"decode {name}"] = measure(able, file.getvalue())
            print(f"decode {name}", figures[f"decode {name}"], flush=True)
            ways = crops(args.image_size)
            if kind != "JPEG":
                ways.pop("any eighth", None)
            figures[f"crop {name}"] = measure(ways, file.getvalue())
            print(f"crop {name}", figures[f"crop {name}"], flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
