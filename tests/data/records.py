"""Samples in memory, as fields see them."""

from types import SimpleNamespace

import numpy as np
from tar_files import picture, small_tokenizer

from fastvlp.data.images import fit

TOKENIZER = small_tokenizer()
MASK = TOKENIZER.vocab_size
MODEL = SimpleNamespace(image=SimpleNamespace(image_size=24, patch_size=8), text=SimpleNamespace(context_length=12, vocab_size=MASK + 1))
WORDS = np.random.default_rng(0).integers(0, 2**64, 40, dtype=np.uint64)


class Record(SimpleNamespace):
    """A sample in memory."""

    def picture(self, size, patch):
        return fit(self.pil, size, patch)

    def frames(self, size, patch):
        return [fit(frame, size, patch) for frame in self.moving]

    def npy(self, name):
        return self.files.get(name)


def record(number, captions=None, **more):
    captions = captions or tuple(f"red circle {number} a picture of tree dog {i}" for i in range(1 + number % 4))
    pil = picture(number, (20 + number % 5, 14 + number % 7))
    return Record(**{"key": str(number), "captions": captions, "pil": pil, "values": {}, "files": {}, "moving": [], **more})


RECORDS = [record(number, other=record(number + 100)) for number in range(40)]


def bound(field, tokenizer=TOKENIZER):
    return field.bind(MODEL, tokenizer)


def segments(packed):
    return [segment.tolist() for segment in packed.segments()]


def places(packed):
    return [[tuple(place) for place in pos.tolist()] for pos in packed.pos.split(packed.lengths.tolist())]
