"""Encoded images to uint8 pixels; the model normalises them on the device."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from gcl_jax.errors import DataError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**27


def decode_image(data: bytes) -> Image.Image:
    """Decodes to RGB as open_clip does (no EXIF rotation, alpha dropped).

    Raises:
        DataError: not an image, truncated, or so large that it may be a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height <= MAX_PIXELS:
            return image.convert("RGB")
        reason = f"{image.width} x {image.height} pixels may be a decompression bomb"
    except UnidentifiedImageError:
        reason = "not an image"
    # Pillow's decoders raise whatever their libraries do; each of it means the same to the caller.
    except Exception as error:
        reason = str(error)
    raise DataError(f"unreadable image: {reason}")


def resize_and_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 3): bicubic resize of the shorter side, then the central square
    (open_clip's `preprocess_val`)."""
    width, height = image.size
    scale = size / min(width, height)
    width, height = (
        (size, int(size * height / width))
        if width <= height
        else (int(size * width / height), size)
    )
    if scale != 1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_area: float,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """uint8 (size, size, 3): a box of random area (from `min_area` to 1 of the image) and aspect
    ratio, resized bicubically: the augmentation that open_clip trains with."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            box = (left, top, left + w, top + h)
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return resize_and_center_crop(image, size)
