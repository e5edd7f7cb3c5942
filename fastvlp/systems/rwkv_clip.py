"""RWKV-CLIP (Gu et al. 2024, arXiv:2406.06973): CLIP whose towers mix tokens in linear time."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp.recipe import Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Part
from fastvlp.towers import RwkvImage, RwkvText


class RwkvClip(Clip):
    """CLIP with :class:`fastvlp.towers.RwkvImage` and :class:`fastvlp.towers.RwkvText`, both pooled by the mean.

    Blocks, shifts and the start of mixtures and decays were checked against the authors' code (deepglint/RWKV-CLIP). There the means are
    the features themselves, that of a caption over its padding, too, and of tokens of length 1; here they are projected as CLIP's. There
    the places of patches are one table for a fixed grid; here they are factorised, for any shape.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256) -> None:
        super().__init__(image, text, embed_dim)


def recipe() -> Recipe:
    """Towers of CLIP's widths and depths on the shipped data."""
    return replace(clip.recipe(), model=fdl.Config(RwkvClip, fdl.Config(RwkvImage, width=192, depth=6, heads=3),
                                                   fdl.Config(RwkvText, width=192, depth=4, heads=3, vocab_size=shipped.VOCABULARY)))


def paper() -> Recipe:
    """RWKV-CLIP-B/32 on YFCC15M: 32 epochs in batches of 4,096 (8 GPUs of 512)."""
    made = clip.paper()
    image = fdl.Config(RwkvImage, width=640, depth=12, heads=8, patch_size=32, image_size=224, grid=7, ratio=5.0)
    text = fdl.Config(RwkvText, width=640, depth=6, heads=10, vocab_size=49408, context_length=77)
    return replace(made, model=fdl.Config(RwkvClip, image, text, embed_dim=640), data=replace(made.data, batch_size=4096),
                   schedule=Schedule(samples=32 * 15_061_515, warmup=11_767), optim=Optim(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.2),
                   train=Train(amp="bf16"))
