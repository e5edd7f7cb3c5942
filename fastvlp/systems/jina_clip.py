"""jina-clip-v2 (Koukounas et al. 2024, arXiv:2412.08802): contrast of every prefix of the features, so that they can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import fiddle as fdl

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part


class JinaClip(Clip):
    """CLIP whose loss is the mean over ``prefixes`` of that of the first so many features, each normalised by itself; one sweep for all."""

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, prefixes: Sequence[int] = (32, 64, 128, 256),
                 pool_image: str = "mean", pool_text: str = "mean") -> None:
        super().__init__(image, text, embed_dim, None, pool_image, pool_text)
        if not prefixes or sorted(set(prefixes)) != list(prefixes) or prefixes[-1] != embed_dim or prefixes[0] < 1:
            raise ValueError(f"JinaClip: prefixes is {list(prefixes)} with embed_dim {embed_dim}; rising widths are needed, the last all "
                             "of it")
        self.prefixes = tuple(prefixes)

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        # All prefixes from one sweep over the products, not one sweep each.
        loss = losses.contrastive_loss(out["image"], out["text"], *self.scale(), prefixes=self.prefixes,
                                       prefix_weights=[1 / len(self.prefixes)] * len(self.prefixes))
        return {"matryoshka": loss}


def recipe() -> Recipe:
    """Features of 256 numbers that can be cut to 128, 64 or 32 after training."""
    return replace(clip.recipe(), model=fdl.Config(JinaClip, shipped.image(), shipped.text()))


def paper() -> Recipe:
    """Stage 1 of table 6: EVA02-L/14 sized image tower, XLM-RoBERTa-L sized text tower, prefixes from 64 to 1,024."""
    base = clip.paper()
    image = clip.vit_b(14, width=1024, depth=24, heads=16)
    text = clip.text_b(width=1024, depth=24, heads=16, vocab_size=250002, causal=False)
    return replace(base, model=fdl.Config(JinaClip, image, text, embed_dim=1024, prefixes=(64, 128, 256, 512, 768, 1024)),
                   data=replace(base.data, batch_size=16384), schedule=Schedule(steps=100_000, warmup=1000),
                   optim=Optim(lr=1e-4, betas=(0.9, 0.98), weight_decay=0.02))
