"""Pictures and masks give the pixels that diffusers' `VaeImageProcessor` gives, bit for bit."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffoundry.common.errors import RequestError
from diffoundry.runtime.pictures.preprocess import (
    crop_region,
    image_pixels,
    latent_mask,
    mask_pixels,
    open_image,
    open_originals,
    overlay,
)

RESIZE_MODES = ("default", "fill", "crop")
IMAGES = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True)
MASKS = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F")
SIZES = st.integers(1, 40)


def picture(mode: str = "RGB", size: tuple[int, int] = (53, 37), seed: int = 0) -> Image.Image:
    """Noise over a gradient, so that no two places and no two filters look alike."""
    rng = np.random.default_rng(seed)
    width, height = size
    ramp = np.linspace(0, 160, width * height * 4).reshape(height, width, 4)
    rgba = (ramp + rng.integers(0, 96, ramp.shape)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(rgba[..., 0].astype(np.uint16) * 3)
    if mode == "LAB":
        return Image.frombytes("LAB", size, rgba[..., :3].tobytes())
    if mode == "PA":
        image = Image.fromarray(np.ascontiguousarray(rgba[..., :2]), "LA")
        image.putpalette(bytes(rng.integers(0, 256, 768, np.uint8)))
        return image
    if mode in ("LA", "RGBa"):
        return Image.fromarray(rgba).convert(mode)
    return Image.fromarray(rgba if mode == "RGBA" else rgba[..., :3].copy()).convert(mode)


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def equal(ours, theirs: torch.Tensor):
    np.testing.assert_array_equal(ours, theirs.numpy()[0])
    assert ours.dtype == np.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_image_of_every_mode(mode, resize_mode):
    image = picture(mode)
    for width, height in ((64, 64), (24, 40), (53, 37)):
        expected = IMAGES.preprocess(image, height, width, resize_mode)
        assert expected.std() > 0.1
        equal(image_pixels(image, width, height, resize_mode=resize_mode), expected)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "LAB"])
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_mask_of_every_mode(mode, resize_mode):
    mask = picture(mode)
    expected = MASKS.preprocess(mask, 48, 32, resize_mode)
    assert 0 < expected.mean() < 1
    equal(mask_pixels(mask, 32, 48, resize_mode=resize_mode), expected)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from(RESIZE_MODES), st.booleans())
def test_any_size_and_crop(source_width, source_height, width, height, resize_mode, cropped):
    image = picture(size=(source_width, source_height))
    crop = (source_width // 3, source_height // 4, source_width, source_height - source_height // 5)
    crop = crop if cropped else None
    try:
        expected = (
            IMAGES.preprocess(image, height, width, resize_mode, crop),
            MASKS.preprocess(image, height, width, resize_mode, crop),
        )
    except ValueError:
        with pytest.raises(RequestError, match="too narrow to be scaled"):
            image_pixels(image, width, height, crop=crop, resize_mode=resize_mode)
        return
    equal(image_pixels(image, width, height, crop=crop, resize_mode=resize_mode), expected[0])
    equal(mask_pixels(image, width, height, crop=crop, resize_mode=resize_mode), expected[1])


def test_mask_threshold():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    ours = mask_pixels(grey, 16, 16)
    equal(ours, MASKS.preprocess(grey, 16, 16))
    assert ours.sum() == 128


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 80), st.integers(1, 80))
@example(62, 244, 14, 14)  # where float32 and float64 round to different sources
def test_latent_mask(height, width, rows, columns):
    mask = np.random.default_rng(0).integers(0, 2, (1, height, width)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask[None]), size=(rows, columns))
    equal(latent_mask(mask, rows, columns), expected)


@settings(max_examples=150, deadline=None)
@given(st.data(), SIZES, SIZES, SIZES, SIZES, st.integers(0, 60))
def test_crop_region(data, mask_width, mask_height, width, height, pad):
    x, y = data.draw(st.integers(0, mask_width - 1)), data.draw(st.integers(0, mask_height - 1))
    box = (x, y, data.draw(st.integers(x + 1, mask_width)), data.draw(st.integers(y + 1, mask_height)))
    mask = mask_of(box, (mask_width, mask_height))
    region = crop_region(mask, width, height, pad)
    assert region == VaeImageProcessor.get_crop_region(mask, width, height, pad)
    assert 0 <= region[0] <= box[0] < box[2] <= region[2] <= mask_width
    assert 0 <= region[1] <= box[1] < box[3] <= region[3] <= mask_height


def test_crop_region_of_an_empty_mask():
    with pytest.raises(RequestError, match="black throughout"):
        crop_region(Image.new("L", (20, 20)), 64, 64, 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("crop", [None, (4, 3, 45, 30), (0, 0, 53, 37), (7, 2, 20, 36)])
def test_overlay(mode, crop):
    original = picture(mode)
    generated = picture(size=(53, 37) if crop is None else (64, 64), seed=1)
    mask = VaeImageProcessor.blur(mask_of((10, 5, 40, 30), (53, 37)), 3)
    ours = overlay(mask, original, generated, crop)
    expected = IMAGES.apply_overlay(mask, original, generated, crop)
    assert ours.mode == expected.mode == "RGB"
    assert ours.tobytes() == expected.tobytes() != original.convert("RGB").tobytes()


def test_a_mask_of_another_size():
    image = Image.new("RGB", (20, 10))
    assert open_originals(image, Image.new("L", (20, 10)))[1].size == (20, 10)
    with pytest.raises(RequestError, match=r"mask is 10x20 and the image 20x10.*resize it to 20x10"):
        open_originals(image, Image.new("L", (10, 20)))


def same_as_load_image(value: str | Image.Image) -> Image.Image:
    ours, expected = open_image(value), load_image(value)
    assert (ours.mode, ours.size) == (expected.mode, expected.size)
    assert ours.tobytes() == expected.tobytes()
    return ours


@pytest.mark.parametrize("mode", [*MODES, "PA"])
def test_open_a_pil_image(mode):
    assert np.asarray(same_as_load_image(picture(mode))).std() > 10


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((mode, "tiff") for mode in ("1", "LAB", "CMYK", "F", "I", "I;16", "RGBA")),
        *((mode, "jpg") for mode in ("L", "RGB", "CMYK")),
        *((mode, "gif") for mode in ("1", "L", "P")),
        ("RGB", "bmp"),
        ("RGBA", "webp"),
    ],
)
def test_open_a_file(tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    picture(mode).save(path)
    ours = same_as_load_image(str(path))
    assert open_image(path).tobytes() == ours.tobytes()


def test_open_a_palette_with_transparency(tmp_path):
    path = tmp_path / "palette.png"
    picture("P").save(path, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = open_image(path)
    with pytest.warns(UserWarning, match="Transparency"):
        expected = load_image(str(path))
    assert ours.tobytes() == expected.tobytes()
    assert ours.mode == expected.mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, suffix):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif)
    ours = same_as_load_image(str(path))
    assert ours.size == ((37, 53) if orientation >= 5 else (53, 37))
    assert (ours.tobytes() == Image.open(path).convert("RGB").tobytes()) == (orientation == 1)
    assert same_as_load_image(Image.open(path)).tobytes() == ours.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_open_an_array(mode):
    image = picture(mode)
    array, expected = np.asarray(image), image.convert("RGB").tobytes()
    assert open_image(array).tobytes() == expected
    for dtype in (np.float16, np.float32, np.float64):
        assert open_image((array / 255).astype(dtype)).tobytes() == expected
    assert open_image(array.reshape(37, 53, -1)[:, ::-1][:, ::-1]).tobytes() == expected
    assert open_image(array > 128).tobytes() == open_image((array > 128).astype(np.uint8) * np.uint8(255)).tobytes()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 20, 20), np.uint8), r"\(height, width, 3\).*found \(3, 20, 20\)"),
        (np.zeros((20,), np.uint8), "found"),
        (np.zeros((1, 20, 20, 3), np.uint8), "found"),
        (np.zeros((0, 20, 3), np.uint8), "found"),
        (np.zeros((20, 20), np.int64), "uint8, bool or float, found int64"),
        (np.zeros((20, 20), np.complex64), "found complex64"),
        (np.array([[None]]), "found object"),
        (np.full((20, 20), 255.0), "from 0 to 1, found 255 to 255"),
        (np.linspace(-1, 1, 9).reshape(3, 3), "from 0 to 1, found -1 to 1"),
        (np.array([[0.5, np.nan]]), "found nan"),
        (np.array([[0.5, np.inf]]), "found 0.5 to inf"),
    ],
)
def test_arrays_that_are_no_picture(array, message):
    with pytest.raises(RequestError, match=message):
        open_image(array)


@pytest.mark.parametrize("value", [None, 7, b"picture.png", [[0]], torch.zeros(3, 8, 8)])
def test_what_is_no_picture(value):
    with pytest.raises(RequestError, match="the mask must be a path, a PIL image or an array, found"):
        open_image(value, "mask")


def test_files_that_are_no_picture(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, message in (
        (tmp_path / "missing.png", "missing.png' does not exist"),
        ("", "does not exist"),
        (tmp_path, "is no file"),
        (text, "no picture of a known format"),
        (empty, "no picture of a known format"),
        ("nul\0.png", "embedded null"),
        ("n" * 5000 + ".png", "cannot be read"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


def opened_or_refused(value: Path | Image.Image) -> Image.Image | str:
    """The picture, or the one line that says why there is none."""
    try:
        return open_image(value)
    except RequestError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_truncated_files(tmp_path, suffix):
    """Cut anywhere, a file is refused; or whole, where only what comes after the pixels is gone."""
    path = tmp_path / f"cut.{suffix}"
    picture(size=(20, 16)).save(path)
    whole, expected = path.read_bytes(), open_image(path).tobytes()
    refused = 0
    for length in range(0, len(whole), 1 + len(whole) // 60):
        path.write_bytes(whole[:length])
        opened = opened_or_refused(path)
        refused += isinstance(opened, str)
        assert isinstance(opened, str) or opened.tobytes() == expected
    assert refused > 30


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(["png", "jpeg", "gif", "tiff"]))
def test_damaged_images(data, suffix):
    """Bytes changed anywhere: a picture or a `RequestError`, nothing else."""
    file = io.BytesIO()
    picture(size=(20, 16)).save(file, suffix)
    changed = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = Image.open(io.BytesIO(bytes(changed)))
    except Exception:
        assume(False)
    assume(image.width * image.height < 1_000_000)
    opened = opened_or_refused(image)
    assert isinstance(opened, str) or opened.mode == "RGB"


def test_decompression_bomb(tmp_path):
    path = tmp_path / "bomb.png"
    picture().save(path)
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    with pytest.raises(RequestError, match=r"bomb.png' has too many pixels .178956970 are the most"):
        open_image(path)


def test_zero_size():
    with pytest.raises(RequestError, match="the mask has no pixels: it is 0x5"):
        open_image(Image.new("RGB", (0, 5)), "mask")
