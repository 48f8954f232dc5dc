"""How fast training batches are made, from image files as they are and from a store with reduced
ones (`prepare --image_size`), against a plain PyTorch DataLoader with Pillow that does the same
work (decode, random resized crop, tokenise, stack) in the same run:

    python benchmarks/data.py --pairs=20000 --documents=2000 --images --pipeline

All run in this process, in turns. A rate is pairs per second of processor time, so per core,
whatever the number of threads. PyTorch is of the [parity] extra; without it, ours runs alone.
"""

import csv
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gcl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, VisionConfig
from gcl_jax.data.pipeline import train_batches
from gcl_jax.data.store import RankedStore
from gcl_jax.data.tokenizer import load_tokenizer

MIN_AREA = 0.9


try:
    import torch
    from torch.utils.data import DataLoader
except ImportError as error:
    torch = None
    print(f"no DataLoader to compare with: {error}")


class PlainPairs:
    """Pairs of `folder`/pairs.csv as anybody would read them."""

    def __init__(self, folder: Path, image_size: int, context_length: int):
        with (folder / "pairs.csv").open(encoding="utf-8") as file:
            self._rows = list(csv.DictReader(file))
        self._folder = folder
        self._tokenizer = load_tokenizer("clip", context_length)
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int):
        row = self._rows[index]
        with Image.open(self._folder / row["image"]) as file:
            image = self._crop(file.convert("RGB"))
        query, title = (self._tokenizer([row[name]])[0] for name in ("query", "title"))
        weight = np.float32(1 / (101 - float(row["score"])))
        return np.asarray(image), query, title, weight

    def _crop(self, image: Image.Image) -> Image.Image:
        """torchvision's `RandomResizedCrop`."""
        width, height = image.size
        for _ in range(10):
            area = width * height * random.uniform(MIN_AREA, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = random.randint(0, width - w), random.randint(0, height - h)
                image = image.crop((x, y, x + w, y + h))
                break
        size = (self._image_size, self._image_size)
        return image.resize(size, Image.Resampling.BICUBIC)


def settle() -> float:
    """Waits until nothing more is read ahead; seconds of processor time so far."""
    before = time.process_time()
    while True:
        time.sleep(0.1)
        now = time.process_time()
        if now - before < 0.005:
            return now
        before = now


def rate(batches: Iterator, count: int, batch_size: int) -> float:
    """Pairs a second of processor time over `count` batches: as many are made as are taken, when
    what is read ahead stands at the same level before and after."""
    began = settle()
    for _ in range(count):
        next(batches)
    return count * batch_size / (settle() - began)


def forever(loader) -> Iterator:
    while True:
        yield from loader


def compare(folder: Path, stores: dict[str, Path], image_size: int, repeats: int) -> dict:
    """Figures of all, and the median of the ratios to PyTorch's; batches of 64, `repeats` turns of
    4. Of `stores`, "gcl_jax" has the image files as they are."""
    batch_size, count = 64, 4
    model = ModelConfig(vision=VisionConfig(image_size=image_size))
    contestants = {}
    if torch:
        torch.set_num_threads(1)
        plain = PlainPairs(folder, image_size, model.text.context_length)
        contestants["torch"] = forever(DataLoader(plain, batch_size=batch_size, shuffle=True))
    for name, store in stores.items():
        cfg = TrainConfig(
            model=model,
            data=DataConfig(store=str(store), augmentation="crop", min_crop_area=MIN_AREA),
            optim=OptimConfig(batch_size=batch_size),
        )
        ranked = RankedStore(store)
        contestants[name] = train_batches(ranked.resolve(cfg), ranked)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, batches in contestants.items():
            measured = rate(batches, count, batch_size)
            if turn:  # The first one loads what is loaded once.
                rates[name].append(measured)
    figures: dict = {"image_size": image_size}
    if torch:
        figures["torch_pairs_per_core_second"] = round(statistics.median(rates["torch"]))
    for name in stores:
        contestants[name].close()
        figures[f"{name}_pairs_per_core_second"] = round(statistics.median(rates[name]))
        if not torch:
            continue
        ratios = [ours / plain for ours, plain in zip(rates[name], rates["torch"], strict=True)]
        figures["ratio" + name.removeprefix("gcl_jax")] = round(statistics.median(ratios), 2)
        extremes = [round(min(ratios), 2), round(max(ratios), 2)]
        figures["ratio_min_max" + name.removeprefix("gcl_jax")] = extremes
    return figures
