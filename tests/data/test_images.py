"""Decoding, fitting and augmentation against Pillow and plain arithmetic."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tar_files import encoded, picture

from fastvlp.data.images import Unusable, as_pixels, augment, augmentations, decode, fit, fitted_size


@pytest.mark.parametrize("form, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {})])
def test_pixels_are_pillows(form, options):
    data = encoded(picture(1), form, **options)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_becomes_white(form):
    image = picture(2, mode="RGBA")
    data = encoded(image, form, lossless=True, exact=True)
    pixels = np.asarray(Image.open(io.BytesIO(data))).astype(float)
    alpha = pixels[..., 3:] / 255
    assert np.abs(np.asarray(decode(data)) - (pixels[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_other_modes():
    grey = picture(3, mode="L")
    assert np.array_equal(np.asarray(decode(encoded(grey))), np.asarray(grey)[..., None].repeat(3, 2))
    clear = Image.new("P", (4, 4), 1)
    clear.putpalette([0, 0, 0, 10, 20, 30])
    assert np.asarray(decode(encoded(clear, transparency=1))).min() == 255
    assert np.asarray(decode(encoded(clear))).reshape(-1, 3).tolist() == [[10, 20, 30]] * 16
    deep = Image.fromarray(np.array([[0, 256, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert np.asarray(decode(encoded(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(decode(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "JPEG"))).min() >= 250


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_pictures(form, share):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), form)
    with pytest.raises(Unusable, match="image is broken|not an image"):
        decode(data[:int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"<svg></svg>",
                                  b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"RIFF\x10\0\0\0WEBPVP8 " + b"\xff" * 20])
def test_what_is_no_picture(data):
    with pytest.raises(Unusable, match="not an image|image is broken"):
        decode(data)


def _bomb(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_000, 12_000, 60_000])  # below, at and above the sizes at which Pillow warns and raises
def test_decompression_bombs_are_refused_by_their_header(side):
    with pytest.raises(Unusable, match="image has too many pixels"):
        decode(_bomb(side, side))
    with pytest.raises(Unusable, match="image is broken"):  # small enough, so it is unpacked, and found empty
        decode(_bomb(500, 500))


def test_hostile_bytes_never_escape():
    rng = np.random.default_rng(5)
    for form in ("PNG", "WEBP", "JPEG", "GIF", "TIFF", "BMP"):
        data = encoded(picture(4), form)
        for _ in range(40):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                broken[place] = rng.integers(256)
            try:
                assert decode(bytes(broken), max_pixels=1 << 20).mode == "RGB"
            except Unusable:
                pass


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 512), st.integers(1, 32))
def test_fitted_sizes(width, height, image_size, patch):
    w, h = fitted_size(width, height, image_size, patch)
    assert w % patch == h % patch == 0 and min(w, h) >= patch
    scale = image_size / max(width, height)
    for got, side in ((w, width), (h, height)):
        assert abs(got - side * scale) <= patch / 2 + 1e-6 or got == patch  # the nearest multiple, or one patch
    if image_size % patch == 0:
        assert max(w, h) == image_size


def test_fit_is_pillows_bicubic():
    image = picture(6, size=(50, 20))
    assert np.array_equal(fit(image, 32, 8), np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC)))
    assert np.array_equal(fit(picture(6, size=(32, 16)), 32, 8), np.asarray(picture(6, size=(32, 16))))


def test_large_jpegs_are_decoded_small():
    big = picture(7, size=(1600, 1200))
    data = encoded(big, "JPEG", quality=95)
    small = decode(data, wanted=100)
    assert 100 <= max(small.size) <= 400
    difference = fit(small, 96, 16).astype(float) - fit(big, 96, 16)
    assert np.abs(difference).mean() < 2


def test_as_pixels_takes_every_usual_form():
    image = picture(8, size=(32, 16))
    array = np.asarray(image)
    for form in (image, array, torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).permute(2, 0, 1).double() / 255):
        assert np.array_equal(as_pixels(form, 32, 16).numpy(), array)
        assert as_pixels(form, 64, 16).shape == (32, 64, 3)
    assert as_pixels(Image.new("RGBA", (8, 8)), 16, 16).min() == 255
    for wrong in (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\] or float \[3, h, w\]"):
            as_pixels(wrong, 16, 16)
    with pytest.raises(TypeError, match="a picture is a str"):
        as_pixels("x.png", 16, 16)


def test_augmentation_of_strength_zero_changes_nothing():
    pixels = np.asarray(picture(9, size=(32, 48)))
    place, colour = augmentations(np.arange(3, dtype=np.uint64), 0.0)
    assert np.allclose(place, [1, 0, 1, 0])
    assert np.abs(augment(pixels, place[1], colour[1]).astype(int) - pixels).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.floats(0.01, 4), st.integers(1, 5), st.integers(1, 5))
def test_augmentation_keeps_size_and_white_and_repeats(seed, strength, rows, columns):
    place, colour = augmentations(np.array([seed], dtype=np.uint64), strength)
    white = np.full((16 * rows, 16 * columns, 3), 255, dtype=np.uint8)
    assert augment(white, place[0], colour[0]).min() >= 254
    pixels = np.asarray(picture(seed % 100, size=(16 * columns, 16 * rows)))
    out = augment(pixels, place[0], colour[0])
    assert out.shape == pixels.shape and out.dtype == np.uint8
    again = augmentations(np.array([7, seed], dtype=np.uint64), strength)
    assert np.array_equal(out, augment(pixels, again[0][1], again[1][1]))


def test_augmentation_ranges():
    place, _ = augmentations(np.arange(20_000, dtype=np.uint64), 1.0)
    zoom, aspect = 1 / np.sqrt(place[:, 0] * place[:, 2]), np.sqrt(place[:, 2] / place[:, 0]) ** 2
    assert zoom.min() > 1 / 1.3 - 1e-9 and zoom.max() < 1.3 + 1e-9 and zoom.max() > 1.29 and zoom.min() < 1 / 1.29
    assert aspect.max() < 1.15 + 1e-9 and aspect.max() > 1.14
    centre = place[:, 1] + place[:, 0] / 2 - 0.5
    assert np.abs(centre).max() < 0.1 + 1e-9 and np.abs(centre).max() > 0.099 and abs(centre.mean()) < 0.003


def test_a_shift_moves_the_picture():
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[8:16, 8:16] = 0
    same = np.concatenate([np.eye(3), np.zeros((3, 1))], 1).reshape(-1)
    moved = augment(pixels, np.array([1, 0.25, 1, -0.125]), same)  # input = output + 8 in x, output - 4 in y
    expected = np.full_like(pixels, 255)
    expected[12:20, 0:8] = 0
    assert np.array_equal(moved, expected)
    zoomed = augment(pixels, np.array([0.5, 0.0, 0.5, 0.0]), same)  # the upper left quarter, twice as large
    assert zoomed[18:30, 18:30].max() == 0 and zoomed[:14].min() == 255


def test_saturation_changes_by_up_to_its_range():
    """Gains taken out, the colour matrix is a turn about the grey axis times the saturation across it: its scale there is what is drawn."""
    _, colour = augmentations(np.arange(20_000, dtype=np.uint64), 1.0)
    matrix = colour.reshape(-1, 3, 4)[:, :, :3]
    across = matrix / matrix.sum(2, keepdims=True) - 1 / 3
    saturation = np.sqrt((across ** 2).sum((1, 2)) / 2)
    assert abs(saturation.max() - 1.35) < 0.001 and abs(saturation.min() - 1 / 1.35) < 0.001
    drawn = np.log(saturation) / np.log(1.35)  # uniform in -1..1
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1 / np.sqrt(3)) < 0.02


def test_saturation_shows_in_pictures():
    pixels = np.full((16, 16, 3), (180, 100, 100), dtype=np.uint8)
    place, colour = augmentations(np.arange(300, dtype=np.uint64), 1.0)
    ratio = [np.ptp(augment(pixels, [1, 0, 1, 0], row)[8, 8].astype(float)) / 80 for row in colour]
    assert min(ratio) < 0.85 and max(ratio) > 1.3


def test_colour_matrix_by_hand():
    """Turning the hue leaves greys alone and keeps the sum of the channels; saturation 0 would be grey."""
    _, colour = augmentations(np.arange(200, dtype=np.uint64), 1.0)
    matrix = colour.reshape(-1, 3, 4)
    ink = (matrix[:, :, :3] @ np.ones(3))  # of grey ink only the channels' gains are left
    assert (ink > 1 / 1.2 - 1e-9).all() and (ink < 1.2 + 1e-9).all()
    assert np.allclose(matrix[:, :, :3] @ np.full(3, 255.0) + matrix[:, :, 3], 255)
