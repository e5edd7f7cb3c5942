"""LiT (Zhai et al. 2022, arXiv:2111.07991), Chinese CLIP's first stage: only the text tower learns, towards a locked image tower."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Part, freeze


class Lit(Clip):
    """CLIP whose image tower is frozen; its head learns. A tower that was trained comes with ``run.start`` or as a pretrained one."""

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, pool_image: str = "mean", pool_text: str = "mean",
                 strategy: str = "gather") -> None:
        # Frozen before CLIP's head is made on top of it: the head learns.
        super().__init__(freeze(image), text, embed_dim, None, pool_image, pool_text, strategy)


def recipe() -> Recipe:
    """The text tower against a locked image tower: give one with ``run.start=runs/clip``. Without it the image features are random."""
    return replace(clip.recipe(), model=fdl.Config(Lit, shipped.image(), shipped.text()))


def paper() -> Recipe:
    """LiT B/16 with the settings of section 5: 16,384 pairs a batch, 55,000 steps."""
    base = clip.paper()
    return replace(base, model=fdl.Config(Lit, clip.vit_b(16), clip.text_b(width=768, heads=12, context_length=16, causal=False),
                                          embed_dim=768, pool_text="first"),
                   data=replace(base.data, batch_size=16384), schedule=Schedule(steps=55_000, warmup=10_000),
                   optim=Optim(lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, grad_clip=1.0))
