"""Pix2Struct (Lee et al. 2022, arXiv:2210.03347): what is written on a page, from its patches at its own aspect ratio."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
from torch import nn

from fastvlp.data.fields import Caption, Pages
from fastvlp.recipe import Data, Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Part
from fastvlp.towers import Decoder
from fastvlp_kernels.packed import Packed


class Pix2Struct(Captioner):
    """-log p(word | page, words before it): an image tower, and a decoder with cross attention to all of its tokens.

    Streams: ``image``, a rendered page, of whose patches some may be missing; ``text``, what stands on it. As in the data of
    github.com/google-research/pix2struct a page keeps its aspect ratio, and patches know row and column by one table each; there pages are
    scaled to a budget of patches, here to a longest side. The paper's screenshots of web pages and their simplified HTML, of which half is
    masked, are not public; what is rendered here are captions.
    """

    def __init__(self, image: Part, decoder: Part) -> None:
        super().__init__()
        self.image, self.decoder = image, decoder
        self.words = nn.Linear(decoder.width, decoder.vocab_size, bias=False)

    def states(self, images: Packed, texts: Packed) -> Packed:
        return self.decoder(texts, self.image(images))


def recipe() -> Recipe:
    """Captions on pages of 96 pixels in letters of 12, with all their patches."""
    decoder = fdl.Config(Decoder, width=192, depth=4, heads=3, vocab_size=shipped.CAPTIONER)
    # No patch is left out and nothing is shifted: every letter counts.
    fields = {"image": Pages(height=12, keep=1.0, augment=0.0), "text": Caption(part="decoder", ends=shipped.ENDS)}
    model = fdl.Config(Pix2Struct, shipped.image(patch_size=8, image_size=96), decoder)
    return replace(
        clip.recipe(),
        model=model,
        data=Data(fields=fields, batch_size=128),
        schedule=shipped.schedule(keep=1.0),
        eval=Eval(captions=("mini:val-openclipart",)),
    )


def paper() -> Recipe:
    """Pix2Struct-Base: 12 + 12 layers of width 768, 2,048 patches of 16 pixels, 270,000 steps of 2,048 screenshots; AdamW at 1e-3 stands
    for Adafactor at 1e-2."""
    made = clip.paper()
    decoder = fdl.Config(
        Decoder, width=768, depth=12, heads=12, vocab_size=50244, context_length=128, mlp_ratio=2048 / 768, activation="gelu"
    )
    fields = {"image": Pages(keep=1.0, augment=0.0), "text": Caption(length=128, part="decoder")}
    model = fdl.Config(Pix2Struct, clip.vit_b(16, image_size=720, grid=64, mlp_ratio=2048 / 768), decoder)
    return replace(
        made,
        model=model,
        data=replace(made.data, fields=fields, batch_size=2048, tokenizer="pix2struct/tokenizer.json"),
        schedule=Schedule(steps=270_000, warmup=1_000),
        optim=Optim(lr=1e-3, weight_decay=0.0),
        train=Train(amp="bf16"),
    )
