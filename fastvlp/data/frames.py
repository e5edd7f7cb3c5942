"""The frames of animated pictures."""

from __future__ import annotations

import io
import warnings

import numpy as np

from fastvlp.data.images import MAX_PIXELS, Unusable, fit

ANIMATED = ("GIF", "WEBP", "PNG")
MOST_FRAMES, MOST_PIXELS = 256, 1 << 23  # of an animation, and of a frame, which is held as three copies of four bytes a pixel


def frames(data: bytes, size: int, patch: int, max_pixels: int = MAX_PIXELS) -> list[np.ndarray]:
    """The first 256 frames of an animated GIF, WebP or PNG, each fitted as by ``fit``: uint8 [h, w, 3]; none if there is no animation.

    Args:
        max_pixels: of all frames together; what moves longer is cut. A frame has at most 8 megapixels.

    Raises:
        Unusable: the picture is broken or too large.
    """
    from PIL import Image

    if not data.startswith((b"GIF8", b"RIFF", b"\x89PNG")):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked below, and of odd metadata
            image = Image.open(io.BytesIO(data), formats=ANIMATED)
            pixels = image.width * image.height
            if pixels > min(max_pixels, MOST_PIXELS):
                raise Unusable("image has too many pixels")
            if not getattr(image, "is_animated", False):
                return []
            found = []
            for number in range(min(MOST_FRAMES, max_pixels // pixels)):
                try:
                    image.seek(number)
                except EOFError:
                    break
                canvas = Image.new("RGBA", image.size, "white")
                canvas.alpha_composite(image.convert("RGBA"))
                found.append(fit(canvas.convert("RGB"), size, patch))
            return found
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # hostile bytes make decoders raise almost anything
        raise Unusable("image is broken") from error
