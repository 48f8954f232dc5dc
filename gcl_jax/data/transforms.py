"""Encoded images to uint8 pixels, those of open_clip; the model normalises them on the device.

open_clip resizes and crops an image in the mode of its file and converts the result to RGB, which
matters: transparent pixels, palettes and CMYK would be resized to other colours after conversion.
"""

import base64
import contextlib
import errno
import functools
import io
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from gcl_jax.config import PreprocessConfig
from gcl_jax.errors import DataError

try:
    import cykooz_resizer as simd
except ImportError:  # There is no wheel for this machine; Pillow does it, four times as slowly.
    simd = None

try:
    import simplejpeg
except ImportError:  # Pillow makes the same pixels in half as much time again.
    simplejpeg = None

# What Pillow may try to read, by the file's ending: others call programs (EPS) or are no pictures.
ENDINGS = {"PNG": ("png",), "JPEG": ("jpg", "jpeg"), "WEBP": ("webp",), "GIF": ("gif",)}
ENDINGS |= {"BMP": ("bmp",), "TIFF": ("tif", "tiff"), "PPM": ("ppm", "pgm")}
if "avif" in features.get_supported():
    ENDINGS |= {"AVIF": ("avif",)}
FORMATS = tuple(ENDINGS)
IMAGE_ENDINGS = tuple(ending for endings in ENDINGS.values() for ending in endings)
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**27
MAX_RESIZED = 2**24
MAX_BYTES = int(os.environ.get("GCL_JAX_MAX_BYTES", 2**28))  # of an encoded image, or of a cell
# A profile or a text in a PNG may be as large as all its texts together: by default 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
JPEG_QUALITY = 90  # of images that a store has smaller than they were
JPEG_SIDE = 65_500  # pixels that a JPEG may have on a side
THUMBNAIL = 160  # pixels of the longer side
_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CROP_RATIO = (3 / 4, 4 / 3)


class ImageError(DataError):
    """An image that cannot be used; `label` is the kind of reason, `detail` what it has."""

    def __init__(self, label: str, detail: object):
        super().__init__(f"{label}: {detail}")
        self.label, self.detail = label, str(detail)


def read_file(path: Path, *, any_size: bool = False) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`, or of `any_size`: reading a device, or
    a pipe that nobody writes to, would never end.

    Raises:
        OSError: there is none, or it is something else.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > MAX_BYTES and not any_size:
        more = f"more than {MAX_BYTES} bytes; set the environment variable GCL_JAX_MAX_BYTES"
        raise OSError(errno.EFBIG, more)
    return path.read_bytes()


def most_unpacked(packed: int) -> int:
    """The most bytes that so many `packed` ones may become: `MAX_BYTES`, or a hundred times as
    many, to which nothing that is worth reading is packed."""
    return max(MAX_BYTES, 100 * packed)


@contextlib.contextmanager
def open_image(data: bytes, deep: bool = True) -> Iterator[Image.Image]:
    """An image of which only the header has been read: the one door to Pillow for a stranger's
    bytes.

    Raises:
        ImageError: here or inside the context: not an image of one of `FORMATS`, broken, so large
            that it may be a decompression bomb, or, unless `deep`, of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            # Pillow cuts the channels of some 16-bit modes at 255, others it divides.
            stored = [str(tile[3]) for tile in image.tile]
            if not deep and (image.mode[0] in "IF" or any(";16" in x for x in stored)):
                raise ImageError("16-bit image", f"mode {image.mode}, not 8 bits a channel")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        detail = f"this is not an image ({', '.join(FORMATS)})"
        raise ImageError("unreadable image", detail) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("decompression bomb", error) from None
    # Pillow's decoders raise whatever their libraries do; each of it means the same to the caller.
    except Exception as error:
        raise ImageError("unreadable image", error) from None


def decode_image(
    data: bytes, crop_size: int = 0, min_area: float = 1.0, *, deep: bool = True
) -> Image.Image:
    """Decodes in the mode of the file, without what else the file holds (EXIF rotation is ignored,
    as in open_clip).

    Given a `crop_size`, a JPEG comes at 1/2, 1/4 or 1/8 of its size, which costs less, if every
    crop of `random_resized_crop` with that size and `min_area` then still has twice as many pixels
    on either side as are asked for (docs/data.md has the difference in pixels).

    Images of more than 8 bits a channel come as white as open_clip sees them, if `deep`.

    Raises:
        ImageError: as `open_image`, or truncated.
    """
    with open_image(data, deep) as image:
        if crop_size and image.format == "JPEG":
            image.draft(None, _draft_size(image.size, crop_size, min_area))
        image.load()
        image.info.clear()
        # A copy lets go of the file, which may hold further frames.
        return image.copy()


def _draft_size(image_size: tuple[int, int], crop_size: int, min_area: float) -> tuple[int, int]:
    """Of the whole image, when the smallest crop has twice `crop_size` pixels on its short side."""
    width, height = image_size
    shortest = min(width, height, math.sqrt(min_area * width * height * CROP_RATIO[0]))
    scale = 2 * crop_size / shortest
    return math.ceil(scale * width), math.ceil(scale * height)


def decode_for_crops(
    data: bytes, size: int, min_area: float
) -> Image.Image | UInt8[np.ndarray, "height width 3"]:
    """`decode_image(data, size, min_area, deep=False)`, as an array of the same pixels where that
    is faster: of an RGB JPEG that is decoded at its full size."""
    if simplejpeg is not None and data.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):  # what it warns of, Pillow may read
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            least = _draft_size((width, height), size, min_area)
            scaled = width >= 2 * least[0] and height >= 2 * least[1]
            if colors in ("YCbCr", "RGB") and not scaled and width * height <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data)
    return decode_image(data, size, min_area, deep=False)


def reduced_image(data: bytes, edge: int) -> bytes:
    """An encoded image as it is, or, if its shorter side has more than `edge` pixels, a JPEG of the
    RGB image that open_clip makes of it: resized in its own mode to that many, then converted.

    Raises:
        ImageError: as `decode_image`.
    """
    with open_image(data, deep=False) as image:
        shorter, longer = sorted(image.size)
        if shorter <= edge or edge * longer > JPEG_SIDE * shorter:
            return data
    image = decode_image(data)  # Loading may turn a TIFF.
    width, height = (int(edge * side / shorter) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def thumbnail(encoded: bytes) -> str:
    """A small version of an encoded image as a data URI; empty if the image is missing.

    Raises:
        DataError: it cannot be read.
    """
    if not encoded:
        return ""
    image = decode_image(encoded)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


class ImageTransform:
    """Callable: decoded image -> uint8 (size, size, 3), open_clip's `preprocess_val` up to its
    normalisation.

    "shortest" resizes the shorter side to `size` and cuts out the centre, "squash" resizes both
    sides, "longest" resizes the longer one and fills up with `fill_color`. Palette and 1-bit images
    are resized to the nearest pixel, as Pillow does; `fill_color` is in the image's own mode
    (for a palette its index).
    """

    def __init__(self, size: int, cfg: PreprocessConfig):
        self._size, self._cfg = size, cfg

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        size, resample = self._size, INTERPOLATIONS[self._cfg.interpolation]
        match self._cfg.resize_mode:
            case "squash":
                image = image.resize((size, size), resample)
            case "longest":
                scale = max(image.size) / size
                # A side that would vanish, where open_clip fails, keeps one pixel.
                width, height = (max(1, round(side / scale)) for side in image.size)
                x, y = size - width, size - height
                border = (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2)
                fill = (self._cfg.fill_color,) * len(image.getbands())
                image = image.resize((width, height), resample)
                image = ImageOps.expand(image, border, fill if len(fill) > 1 else fill[0])
            case _:
                image = _resize_and_center_crop(image, size, resample)
        return np.asarray(image.convert("RGB"))


def _resize_and_center_crop(
    image: Image.Image, size: int, resample: Image.Resampling
) -> Image.Image:
    """The central square of `image` resized to `size` on its shorter side."""
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if width * height <= MAX_RESIZED or (width, height) == image.size:
        resized = image.resize((width, height), resample)
        return resized.crop((left, top, left + size, top + size))
    # Of a very long image only the square is made. Pillow's box is float32: cut out what the
    # square and the filter's support see, and the coordinates are small, so exact enough.
    x, y = left * image.width / width, top * image.height / height
    w, h = size * image.width / width, size * image.height / height
    margin = 2 * math.ceil(max(1, shorter / size)) + 1
    x0, y0 = max(0, int(x) - margin), max(0, int(y) - margin)
    x1 = min(image.width, math.ceil(x + w) + margin)
    y1 = min(image.height, math.ceil(y + h) + margin)
    part, x, y = image.crop((x0, y0, x1, y1)), x - x0, y - y0
    # Columns first, as for the whole; for one square Pillow may choose rows first, and each pass
    # rounds. Transparency is multiplied in and out once, as Pillow does in one call.
    part = part.convert(_PREMULTIPLIED.get(image.mode, image.mode))
    part = part.resize((size, part.height), resample, box=(x, 0, x + w, part.height))
    part = part.resize((size, size), resample, box=(0, y, size, y + h))
    return part.convert(image.mode)


def random_resized_crop(
    image: Image.Image | UInt8[np.ndarray, "height width 3"],
    size: int,
    rng: np.random.Generator,
    min_area: float,
) -> UInt8[np.ndarray, "size size 3"]:
    """A box of random area (from `min_area` to 1 of the image) and aspect ratio, resized
    bicubically: the augmentation that open_clip trains with, in every resize mode. A pixel of an
    RGB image that shrinks may be one off Pillow's (two off next to black or white)."""
    whole = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    left, top, width, height = _random_box(whole, rng, min_area, CROP_RATIO)
    shrinks = simd is not None and size <= min(width, height)
    if isinstance(image, np.ndarray):
        part = image[top : top + height, left : left + width]
        if shrinks:
            return _resize_rgb(part.tobytes(), width, height, size)
        image = Image.fromarray(part)
    else:
        image = image.crop((left, top, left + width, top + height))
        if shrinks and image.mode == "RGB":
            return _resize_rgb(image.tobytes(), width, height, size)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


def _resize_rgb(
    data: bytes, width: int, height: int, size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Catmull and Rom's is Pillow's bicubic filter. By way of bytes: sharing memory with Pillow, as
    the library can, would depend on how a version of Pillow lays out its structures."""
    pixels = simd.PixelType.U8x3
    target = simd.ImageData(size, size, pixels)
    simd.Resizer().resize(simd.ImageData(width, height, pixels, data), target, _bicubic())
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


@functools.cache
def _bicubic():
    kernel = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)
    return simd.ResizeOptions(resize_alg=kernel, use_alpha=False)


def _random_box(
    image_size: tuple[int, int],
    rng: np.random.Generator,
    min_area: float,
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(left, top, width, height); the largest central box of an allowed ratio when ten draws do
    not fit into the image."""
    width, height = image_size
    low, high = map(math.log, ratio)
    for _ in range(10):
        area = width * height * (min_area + (1 - min_area) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h
