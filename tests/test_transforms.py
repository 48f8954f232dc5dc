"""Pixels: open_clip's, whatever the file; by Pillow itself where torch is missing."""

import concurrent.futures
import dataclasses
import importlib
import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from gcl_jax.config import ModelConfig, PreprocessConfig
from gcl_jax.data import transforms
from gcl_jax.data.transforms import (
    ImageTransform,
    decode_for_crops,
    decode_image,
    random_resized_crop,
    reduced_image,
    thumbnail,
)
from gcl_jax.errors import DataError
from gcl_jax.prepare.source import load_image
from gcl_jax.search.searcher import image_type
from gcl_jax.search.serve import check_image

SIZES = [(53, 37), (32, 32), (1, 1), (1, 1000), (1000, 1), (700, 31), (225, 223), (640, 427)]
# Sides whose resized image passes MAX_RESIZED at 224 pixels.
LONG = [(1, 1000), (2500, 3), (1200, 2)]


def photo(width, height, seed=0):
    """Like a photograph: smooth fields of colour, edges, sensor noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (min(height, 7), min(width, 9), 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) + rng.normal(0, 8, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 :] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return exif


def gray16(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257 // 200)


def with_alpha(image):
    """Alpha of every value; 0 in places, where the colour below still differs."""
    alpha = photo(*image.size, seed=1).convert("L").point(lambda value: max(0, value - 100))
    image = image.copy()
    image.putalpha(alpha)
    return image


FILES = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=85),
    "jpeg rotated by exif": lambda image: encoded(image, "JPEG", exif=rotated_exif()),
    "jpeg cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "jpeg gray": lambda image: encoded(image.convert("L"), "JPEG"),
    "png gray alpha": lambda image: encoded(with_alpha(image).convert("LA")),
    "png rgba": lambda image: encoded(with_alpha(image)),
    "png palette": lambda image: encoded(image.quantize(64)),
    "png palette, one transparent": lambda image: encoded(image.quantize(64), transparency=3),
    "png palette, alpha": lambda image: encoded(image.quantize(64), transparency=bytes(range(64))),
    "png 1 bit": lambda image: encoded(image.convert("1")),
    "png 16 bit": lambda image: encoded(gray16(image)),
    "gif": lambda image: encoded(image, "GIF"),
    "webp alpha": lambda image: encoded(with_alpha(image), "WEBP"),
    "tiff rotated by exif": lambda image: encoded(image, "TIFF", exif=rotated_exif()),
    "tiff lab": lambda image: encoded(image.convert("LAB"), "TIFF"),
    "tiff float": lambda image: encoded(image.convert("F"), "TIFF"),
}


def preprocess_val(open_clip, size, cfg):
    values = {"size": size, **dataclasses.asdict(cfg)}
    module = importlib.import_module("open_clip.transform")
    return module.image_transform_v2(module.PreprocessCfg(**values), is_train=False)


def to_pixels(tensor, cfg):
    """What open_clip normalised, back as float (height, width, 3) in 0..255."""
    return (tensor.numpy().transpose(1, 2, 0) * cfg.std + cfg.mean) * 255


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "cfg",
    [
        PreprocessConfig(),
        PreprocessConfig(interpolation="bilinear"),
        PreprocessConfig(resize_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
        PreprocessConfig(resize_mode="longest", fill_color=127),
    ],
    ids=lambda cfg: f"{cfg.resize_mode}-{cfg.interpolation}",
)
def test_pixels_equal_open_clips(open_clip, kind, cfg):
    ours, theirs = ImageTransform(32, cfg), preprocess_val(open_clip, 32, cfg)
    for size in SIZES:
        data = FILES[kind](photo(*size))
        pixels = ours(decode_image(data))
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        if cfg.resize_mode == "longest" and 1000 in size:
            continue  # open_clip fails: the other side would have no pixel
        expected = to_pixels(theirs(Image.open(io.BytesIO(data))), cfg)
        np.testing.assert_allclose(pixels, expected, atol=1e-3, err_msg=f"{size}")


@pytest.mark.parametrize("kind", ["jpeg", "png rgba", "png palette", "png 1 bit"])
@pytest.mark.parametrize("size", LONG)
def test_long_images_equal_open_clips(open_clip, kind, size):
    """Also where only the part that is kept is resized."""
    cfg = PreprocessConfig()
    data = FILES[kind](photo(*size))
    pixels = ImageTransform(224, cfg)(decode_image(data))
    expected = to_pixels(preprocess_val(open_clip, 224, cfg)(Image.open(io.BytesIO(data))), cfg)
    np.testing.assert_allclose(pixels, expected, atol=1.001)


def test_model_input_equals_open_clips(open_clip):
    """Normalised on the device as in the model, against the whole of open_clip's transform."""
    from flax import nnx

    from gcl_jax.models.clip import CLIP

    cfg = ModelConfig()
    cfg.vision.image_size, cfg.vision.width, cfg.vision.layers = 32, 16, 1
    cfg.vision.head_width, cfg.text.width, cfg.text.heads, cfg.text.layers = 8, 16, 2, 1
    cfg.preprocess = PreprocessConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = CLIP(cfg, rngs=nnx.Rngs(0))
    seen = []
    model.visual = lambda images, *_: seen.append(images) or images[:, 0, 0]
    data = FILES["jpeg"](photo(90, 60))
    model.encode_image(ImageTransform(32, cfg.preprocess)(decode_image(data))[None])
    expected = preprocess_val(open_clip, 32, cfg.preprocess)(Image.open(io.BytesIO(data)))
    np.testing.assert_allclose(seen[0][0], expected.numpy().transpose(1, 2, 0), atol=1e-5)


@pytest.fixture(params=["simd", "pillow"])
def resizer(request, monkeypatch):
    """With the library that resizes RGB images, and where there is none."""
    if request.param == "pillow":
        monkeypatch.setattr(transforms, "simd", None)
    elif transforms.simd is None:
        pytest.skip("needs cykooz-resizer")
    return request.param


@pytest.mark.parametrize("kind", ["jpeg", "jpeg cmyk", "png rgba", "png palette", "png 16 bit"])
def test_random_crops_equal_torchvisions(open_clip, resizer, kind):
    """The same box gives the same pixels; open_clip's training transform converts last."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    for size in SIZES:
        image = decode_image(FILES[kind](photo(*size)))
        left, top, width, height = transforms._random_box(
            size, np.random.default_rng(5), 0.5, (3 / 4, 4 / 3)
        )
        pixels = random_resized_crop(image, 32, np.random.default_rng(5), 0.5)
        expected = resized_crop(
            image, top, left, height, width, [32, 32], InterpolationMode.BICUBIC
        )
        exact = resizer == "pillow" or image.mode != "RGB" or min(width, height) < 32
        expected = np.asarray(expected.convert("RGB"))
        np.testing.assert_allclose(pixels.astype(int), expected, atol=0 if exact else 2)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (300, 7)])
def test_box_when_no_crop_fits_equals_torchvisions(open_clip, size):
    """The largest central box of an allowed ratio."""
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.9, 1.0), (3 / 4, 4 / 3)
    top, left, height, width = RandomResizedCrop.get_params(
        Image.new("L", size), list(scale), list(ratio)
    )
    ours = transforms._random_box(size, np.random.default_rng(0), 0.9, ratio)
    assert ours == (left, top, width, height)


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_becomes_rgb(kind):
    image = decode_image(FILES[kind](photo(30, 20)))
    assert image.info == {}, "profiles and comments would stay in memory with a cached record"
    for mode in ("shortest", "squash", "longest"):
        pixels = ImageTransform(16, PreprocessConfig(resize_mode=mode))(image)
        assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    pixels = random_resized_crop(image, 16, np.random.default_rng(0), 0.5)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)


def test_transparent_pixels_keep_the_weight_of_their_alpha():
    """Converted to RGB first, the hidden red would shine through."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, ::2] = (255, 0, 0, 0)
    pixels[:, 1::2] = (0, 0, 255, 255)
    image = decode_image(encoded(Image.fromarray(pixels)))
    resized = ImageTransform(4, PreprocessConfig())(image)
    assert resized[..., 0].max() == 0
    assert resized[..., 2].min() > 250


def test_exif_rotation_is_ignored():
    image = photo(40, 20)
    turned = decode_image(FILES["jpeg rotated by exif"](image))
    np.testing.assert_array_equal(turned, decode_image(encoded(image, "JPEG")))


@pytest.mark.parametrize("size", SIZES)
def test_shortest_is_resize_then_crop(size):
    image = photo(*size)
    scale = 16 / min(size)
    resized = image.resize(tuple(int(side * scale + 1e-9) for side in size), 3)
    left, top = ((side - 16) / 2 for side in resized.size)
    expected = resized.crop((round(left), round(top), round(left) + 16, round(top) + 16))
    np.testing.assert_array_equal(ImageTransform(16, PreprocessConfig())(image), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [(2, 700), (700, 2), (900, 30), (20, 333)])
def test_the_part_that_is_kept_equals_that_of_the_whole(mode, size, monkeypatch):
    image = photo(*size)
    image = gray16(image) if mode == "I;16" else image.convert(mode)
    whole = ImageTransform(24, PreprocessConfig())(image)
    monkeypatch.setattr(transforms, "MAX_RESIZED", 0)
    part = ImageTransform(24, PreprocessConfig())(image)
    np.testing.assert_allclose(part.astype(int), whole, atol=1)


def test_long_images_cost_no_memory():
    """Resized whole, this one would have 2e10 pixels."""
    image = Image.new("RGB", (80_000_000, 1), (1, 2, 3))
    pixels = ImageTransform(224, PreprocessConfig())(image)
    assert (pixels == (1, 2, 3)).all()


def test_longest_fills_up_and_squash_distorts():
    white = Image.new("RGB", (40, 20), "white")
    pixels = ImageTransform(16, PreprocessConfig(resize_mode="longest", fill_color=9))(white)
    assert (pixels[:4] == 9).all()
    assert (pixels[4:12] == 255).all()
    assert (pixels[12:] == 9).all()
    halves = ImageOps.expand(white, (0, 0, 40, 0), "black")
    pixels = ImageTransform(16, PreprocessConfig(resize_mode="squash"))(halves)
    assert (pixels[:, :6] == 255).all()
    assert (pixels[:, 10:] == 0).all()


def test_random_crop_keeps_at_least_the_area_asked_for():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=-1))
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(50):
        crop = random_resized_crop(image, 50, rng, 0.36).astype(float)
        areas.append(np.ptp(crop[..., 0]) * np.ptp(crop[..., 1]))
    assert min(areas) > 0.3 * 100**2
    assert max(areas) > 1.5 * min(areas)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (37, 53), (640, 427), (1500, 1100)])
def test_crops_differ_from_pillows_by_rounding(size, monkeypatch):
    """Of the whole and of parts, from many threads at once."""
    if transforms.simd is None:
        pytest.skip("needs cykooz-resizer")
    image = photo(*size)
    crop = lambda seed: random_resized_crop(image, 96, np.random.default_rng(seed), 0.3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ours = list(pool.map(crop, range(16)))
    monkeypatch.setattr(transforms, "simd", None)
    for seed, pixels in enumerate(ours):
        expected = crop(seed).astype(int)
        np.testing.assert_allclose(pixels, expected, atol=2)
        assert np.abs(pixels - expected).mean() < 0.3


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("size", "min_area", "scale"),
    [
        ((640, 480), 0.9, 4),
        ((641, 479), 0.9, 4),
        ((2001, 1500), 0.9, 8),
        ((2001, 1500), 0.08, 4),
        ((150, 1500), 0.9, 1),
        ((300, 281), 0.9, 2),
    ],
)
def test_jpegs_for_crops_are_decoded_at_a_smaller_scale(mode, size, min_area, scale):
    """The smallest crop keeps twice 48 pixels; no pixel of it is far from that of the whole."""
    data = encoded(photo(*size).convert(mode), "JPEG", quality=90)
    image = decode_image(data, crop_size=48, min_area=min_area)
    assert image.mode == mode
    assert image.size == tuple(-(-side // scale) for side in size)
    boxes = (
        transforms._random_box(image.size, np.random.default_rng(seed), min_area, (3 / 4, 4 / 3))
        for seed in range(200)
    )
    assert scale == 1 or min(min(box[2:]) for box in boxes) >= 2 * 48
    small, whole = (i.resize((48, 48), 3).convert("RGB") for i in (image, decode_image(data)))
    difference = np.abs(np.asarray(small).astype(int) - np.asarray(whole))
    assert difference.mean() < 2
    assert difference.max() <= 16


JPEGS = {
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "RGB inside": {"keep_rgb": True},
    "tables of its own": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "with a profile": {"icc_profile": b"profile" * 20_000},
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", [*FILES, *JPEGS])
def test_images_for_crops_are_pillows(kind):
    """Whichever library decodes them, and their crops are the same; whole and in part."""
    if kind in JPEGS:
        data = encoded(photo(131, 77), "JPEG", **JPEGS[kind])
    else:
        data = FILES[kind](photo(131, 77))
    damaged = bytearray(data)
    damaged[-len(data) // 3 :: 97] = bytes(len(damaged[-len(data) // 3 :: 97]))
    for content in (data, data + b"more", bytes(damaged), data[:-2], data[: len(data) // 2], b""):
        try:
            expected = decode_image(content, deep=False)
        except DataError as error:
            same = re.escape(str(error).partition(" at 0x")[0])
            with pytest.raises(DataError, match=same):
                decode_for_crops(content, 64, 0.5)
            continue
        image = decode_for_crops(content, 64, 0.5)
        np.testing.assert_array_equal(image, expected)
        for size in (24, 100):
            crop, pillows = (
                random_resized_crop(one, size, np.random.default_rng(size), 0.5)
                for one in (image, expected)
            )
            np.testing.assert_array_equal(crop, pillows)
        assert isinstance(image, np.ndarray) or kind not in ("jpeg", *JPEGS) or content != data


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    "kind", [kind for kind in FILES if kind not in ("png 16 bit", "tiff float")]
)
def test_reduced_images_are_what_open_clip_makes_of_them_but_for_jpeg(kind):
    transform = ImageTransform(32, PreprocessConfig())
    for size in ((97, 61), (61, 97), (33, 400)):
        data = FILES[kind](photo(*size))
        small = decode_image(reduced_image(data, 32))
        assert small.mode == "RGB"
        assert small.size == tuple(32 * x // min(size) for x in decode_image(data).size)
        # Of colours JPEG keeps half the resolution.
        bright = [
            np.asarray(Image.fromarray(transform(image)).convert("L"), int)
            for image in (small, decode_image(data))
        ]
        assert np.abs(bright[0] - bright[1]).mean() < 4
        assert reduced_image(data, min(size)) == data


@pytest.mark.parametrize("kind", ["png rgba", "webp alpha", "gif", "tiff lab"])
def test_other_files_are_decoded_whole(kind):
    assert decode_image(FILES[kind](photo(640, 480)), 48, 0.9).size == (640, 480)


def test_a_decoded_image_lets_go_of_its_file():
    frames = [photo(30, 20, seed) for seed in range(3)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    image = decode_image(data)
    assert type(image) is Image.Image
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)), frames[0])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused_not_read_white(mode):
    with pytest.raises(DataError, match=r"16-bit image: .*8 bits"):
        decode_image(encoded(Image.new(mode, (8, 8)), "TIFF"), deep=False)


def test_no_image_starts_a_program(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(args))
    data = encoded(Image.new("RGB", (8, 8)), "EPS")
    for read in (decode_image, thumbnail, image_type, check_image, load_image_of_a_table):
        with pytest.raises(DataError, match=r"this is not an image|something else"):
            read(data)
    assert not started


def load_image_of_a_table(data: bytes) -> bytes:
    return load_image(data, Path())


@pytest.mark.parametrize("crop_size", [0, 8])
def test_unreadable_images_say_so(crop_size):
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(DataError, match="unreadable image"):
        decode_image(whole[: len(whole) // 2], crop_size)
    with pytest.raises(DataError, match="unreadable image"):
        decode_image(b"<html>", crop_size)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DataError, match="bomb"):
            decode_image(encoded(Image.new("L", (30_000, 10_000)), kind), crop_size)
