"""Shards, sound and broken, made by hand for the tests of the data part."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from fastvlp.data.tokenizer import train_tokenizer

WORDS = "red green blue yellow circle square triangle house tree dog".split()


def picture(seed=0, size=(20, 14), mode="RGB"):
    """A PIL picture of smooth random colours."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (3, 4, len(mode)), dtype=np.uint8)
    return Image.fromarray(low.squeeze(), mode).resize(size, Image.Resampling.BILINEAR)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def metadata(*captions, **fields):
    return json.dumps({"captions": captions, **fields}).encode()


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """Write (name, bytes) pairs in order."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def sound(number):
    """The members of one good sample."""
    return [(f"sample{number:04d}.png", encoded(picture(number))),
            (f"sample{number:04d}.json", metadata(f"{WORDS[number % 10]} {number}", f"a picture of {number}", f"number {number}"))]


def write_shards(folder, shards=4, samples=12):
    """Good shards whose samples are numbered through."""
    return [write_tar(folder / f"good-{s:03d}.tar", [m for i in range(samples) for m in sound(s * samples + i)]) for s in range(shards)]


def small_tokenizer():
    return train_tokenizer([f"{word} {i} a picture of number" for i, word in enumerate(WORDS * 3)], vocab_size=300)
