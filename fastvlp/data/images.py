"""Encoded pictures to uint8 arrays: decoding that refuses what it should, fitting to the patch grid, cheap augmentation."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastvlp.data.headers import ORIENTATION, Picture, Unusable, inspect, orientation
from fastvlp.data.patches import mix

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26  # 67 megapixels, 268 MB as Pillow holds them
MAX_SIDE = (1 << 16) - 1  # JPEG's own; the weights of resizing grow with the side, not with the pixels
SPARE = 224 << 20  # bytes that decoding may take beside the pixels of the result
MAX_IMAGE = SPARE // 2  # bytes of a file, of which what the decoder is given is a copy
BLOCK = 1 << 20  # pixels that are converted at a time
BESIDE = {"WEBP": 12, "AVIF": 12}  # bytes a pixel that these decoders hold beside the picture (measured: 12.0 and 5.4 to 8)
MODES = {"RGB": 0, "1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}  # bytes a pixel that Pillow holds; 4 for all others
PLAIN_TIFF = ("raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "tiff_deflate", "packbits")
RUN_LENGTH = 1 << 22  # pixels of a BMP in run lengths, which Pillow unpacks in Python
TURNS = (0, 3, 1, 5, 4, 6, 2)  # Pillow's Transpose for EXIF's orientations 2 to 8
WHITE = (255, 255, 255)
ROUNDING = 0.5 / 255  # what a float may lie outside 0..1 and still be the same grey
_ALONE = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what Pillow thinks of a file goes to the terminal


def decode(data: bytes, max_pixels: int = MAX_PIXELS, wanted: int | None = None) -> Image.Image:
    """The first picture of a JPEG, PNG, WebP, GIF, AVIF, TIFF or BMP file: RGB, upright, transparency flattened on white.

    Beside the pixels of the result (4 bytes each, as Pillow holds them) it takes at most 256 MB, whatever the file says.

    Args:
        max_pixels: larger pictures are refused by their header, before they are unpacked.
        wanted: longest side in pixels that will be needed; JPEG is then decoded at the nearest larger eighth.

    Raises:
        Unusable: not a picture, cut short, too large, or more work for its decoder than any honest picture.
    """
    pil = _pil()
    if len(data) > MAX_IMAGE:
        raise Unusable("image file is too large")
    try:
        found = inspect(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes and of odd metadata; the size is checked below
            image = pil.open(io.BytesIO(found.data), formats=(found.format,))
            if image.width * image.height > max_pixels or max(image.size) > MAX_SIDE:
                raise Unusable("image has too many pixels")
            if wanted is not None:
                scale = wanted / max(image.size)
                image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            if _beside(image, found) + len(data) + len(found.data) > SPARE:
                raise Unusable("image takes too much memory")
            with _quiet() if found.format == "TIFF" else contextlib.nullcontext():
                image.load()
            image = _rgb(image)
            turned = found.orientation if found.format != "AVIF" else orientation(image.info.get("exif", b""))
            if turned > 1:
                image = image.transpose(pil.Transpose(TURNS[turned - 2]))
            image.info.clear()  # so that nobody turns it again
            return image
    except (Unusable, MemoryError):
        raise
    except pil.UnidentifiedImageError as error:
        raise Unusable("image is broken") from error
    except pil.DecompressionBombError as error:
        raise Unusable("image has too many pixels") from error
    except Exception as error:  # hostile bytes make decoders raise almost anything
        raise Unusable("image is broken") from error


def _beside(image: Image.Image, found: Picture) -> int:
    """Bytes that decoding, converting and turning a picture take beside the pixels of the result."""
    pixels = image.width * image.height
    copies = MODES.get(image.mode, 4)  # what is converted is there until the result is
    if found.orientation > 1 or "transparency" in image.info or found.format == "AVIF":  # which says late that it is turned
        copies = 4
    if found.format == "BMP" and image.info.get("compression") in (1, 2) and pixels > RUN_LENGTH:
        raise Unusable("image takes too much decoding")
    strip = 0
    if found.format == "TIFF":
        kind, tags = image.info.get("compression"), image.tag_v2  # type: ignore[attr-defined]  # of TIFF files alone
        if kind not in PLAIN_TIFF:
            raise Unusable("image has a compression that is not read")
        if tags.get(ORIENTATION, 1) != 1:  # Pillow turns it
            copies = 4
        if kind != "raw":  # libtiff unpacks a whole strip or tile at a time
            bits = max(8, *tags.get(258, (8,))) * max(1, tags.get(277, 1))
            strip = tags.get(322, image.width) * tags.get(323, min(image.height, tags.get(278, image.height))) * bits // 8
    return pixels * max(copies, BESIDE.get(found.format, 0)) + found.coefficients + strip


def fit(image: Image.Image, image_size: int, patch_size: int) -> np.ndarray:
    """Scale a picture so that its longest side is ``image_size`` and both sides are multiples of ``patch_size``: uint8 [h, w, 3] RGB."""
    width, height = fitted_size(image.width, image.height, image_size, patch_size)
    if image.size != (width, height):
        image = image.resize((width, height), _pil().Resampling.BICUBIC)
    return np.asarray(image)


def as_pixels(image: Image.Image | np.ndarray | Tensor, image_size: int, patch_size: int) -> Tensor:
    """One picture in any usual form as a model reads it: uint8 [h, w, 3] RGB, fitted as by ``fit``.

    Args:
        image: a PIL image of any mode (turned upright where its EXIF data say how it was held), uint8 [h, w, 3] (tensor or array), or a
            float tensor [3, h, w] with values in 0..1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(image, np.ndarray):
        image = torch.tensor(np.ascontiguousarray(image))
    if not isinstance(image, Tensor):
        pil = _pil()
        if not isinstance(image, pil.Image):
            raise TypeError(f"a picture is a {type(image).__name__}; pass a PIL image, uint8 [h, w, 3] or a float tensor [3, h, w]")
        from PIL import ImageOps

        try:
            return torch.from_numpy(fit(_rgb(ImageOps.exif_transpose(image)), image_size, patch_size).copy())
        except Unusable as error:
            raise ValueError(f"a picture of mode {image.mode} cannot be read: {error}; convert it to RGB first") from error
    shape = tuple(image.shape)
    if image.dtype == torch.uint8 and len(shape) == 3 and shape[2] == 3 and image.numel():
        pixels = image.cpu()
    elif image.is_floating_point() and len(shape) == 3 and shape[0] == 3 and image.numel():
        values = image.detach().cpu().float()
        low, high = values.min().item(), values.max().item()
        if not (-ROUNDING <= low and high <= 1 + ROUNDING):  # written so that NaN is refused too
            raise ValueError(f"a float picture has values from {low:.3g} to {high:.3g}; they must be in 0..1: divide by 255, undo the "
                             "normalisation, or clamp what resizing overshot")
        pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    else:
        raise ValueError(f"a picture is {image.dtype} {shape}; tensors are uint8 [h, w, 3] or float [3, h, w] with values in 0..1")
    if (pixels.shape[1], pixels.shape[0]) == fitted_size(pixels.shape[1], pixels.shape[0], image_size, patch_size):
        return pixels.contiguous()
    return torch.from_numpy(fit(_pil().fromarray(pixels.numpy()), image_size, patch_size).copy())


def fitted_size(width: int, height: int, image_size: int, patch_size: int) -> tuple[int, int]:
    """(width, height) after fitting: the native aspect ratio, rounded to the patch grid, at least one patch."""
    scale = image_size / max(width, height) / patch_size
    return max(1, round(width * scale)) * patch_size, max(1, round(height * scale)) * patch_size


def augmentations(seeds: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of the random changes of n pictures, each a function of its own seed.

    At strength 1: zoom by up to 1.3 either way, aspect ratio by up to 1.15, a shift by up to 10% of the side; saturation and each channel
    by up to 35% and 20%, hue turned by up to 15 degrees. White stays white. Pictures are not mirrored (they hold arrows and text).

    Args:
        seeds: uint64 [n].

    Returns:
        float64 [n, 4]: scale and shift of x, scale and shift of y, from the output to the input, in units of the side;
        float64 [n, 12]: rows of a 3 x 4 colour matrix.
    """
    words = mix(np.repeat(seeds, 9), np.tile(np.arange(100, 109), len(seeds))).reshape(-1, 9)
    u = (words >> np.uint64(11)).astype(np.float64) * (2.0 / (1 << 53)) - 1
    zoom, aspect = 1.3 ** (strength * u[:, 0]), 1.15 ** (strength * u[:, 1] / 2)
    scale = np.stack([1 / (zoom * aspect), aspect / zoom], 1)
    shift = (1 - scale) / 2 + 0.1 * strength * u[:, 2:4]
    place = np.stack([scale, shift], 2).reshape(-1, 4)

    saturation, gains = 1.35 ** (strength * u[:, 4]), 1.2 ** (strength * u[:, 5:8])
    angle = math.radians(15) * strength * u[:, 8]
    # a turn about the grey axis, the part across that axis stretched by the saturation (Rodrigues)
    across = np.eye(3) - 1 / 3
    turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    matrix = 1 / 3 + saturation[:, None, None] * (np.cos(angle)[:, None, None] * across + np.sin(angle)[:, None, None] * turn)
    matrix = gains[:, :, None] * matrix
    constant = 255 * (1 - matrix.sum(2, keepdims=True))
    return place, np.concatenate([matrix, constant], 2).reshape(-1, 12)


def augment(pixels: np.ndarray, place: Sequence[float], colour: Sequence[float]) -> np.ndarray:
    """Apply one row of each result of ``augmentations`` to uint8 [h, w, 3]; the size stays, what comes in from outside is white."""
    pil = _pil()
    height, width = pixels.shape[:2]
    (left, right), (x0, x1) = _visible(width, place[0], place[1] * width)
    (top, bottom), (y0, y1) = _visible(height, place[2], place[3] * height)
    image = pil.fromarray(pixels).resize((right - left, bottom - top), pil.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    image = image.convert("RGB", tuple(colour))
    if image.size == (width, height):
        return np.asarray(image)
    canvas = np.full_like(pixels, 255)
    canvas[top:bottom, left:right] = image
    return canvas


def _visible(size: int, scale: float, shift: float) -> tuple[tuple[int, int], tuple[float, float]]:
    """The whole output pixels that an input of ``size`` pixels covers under input = scale * output + shift, and the input they show."""
    low = min(max(0, round(-shift / scale)), size - 1)
    high = max(low + 1, min(size, round((size - shift) / scale)))
    return (low, high), (max(0.0, scale * low + shift), min(float(size), scale * high + shift))


def _rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB on white; large ones block by block, so that only the result is held beside the picture itself."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.width * image.height <= BLOCK:
        return _flat(image)
    whole, rows = _pil().new("RGB", image.size), max(1, BLOCK // image.width)
    for top in range(0, image.height, rows):
        whole.paste(_flat(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return whole


def _flat(image: Image.Image) -> Image.Image:
    pil = _pil()
    if image.mode[0] in "IF":  # 16 bits of grey; Pillow's own conversion would clip them at 255
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() >= 1 << 16:
            raise Unusable("image has pixels of 32 bits")
        return pil.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        ground = pil.new("RGBA", image.size, (*WHITE, 255))
        return pil.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard error goes nowhere meanwhile: libtiff writes what it thinks of a file there, past Python."""
    with _ALONE, contextlib.ExitStack() as after:
        try:
            kept = os.dup(2)
        except OSError:  # a process without standard error
            yield
            return
        after.callback(os.close, kept)
        after.callback(os.dup2, kept, 2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield


def _pil() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'fastvlp[train]'") from error
    return Image
