"""ALIGN (Jia et al. 2021, arXiv:2102.05918): CLIP with smoothed labels, for captions as the web has them, many of them wrong."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image, Noisy
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part, Scale


class Align(Clip):
    """CLIP whose target is 1 - ``label_smoothing`` for the pair, and the rest spread over all candidates.

    The authors' code is not public.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, label_smoothing: float = 0.1, pool_text: str = "mean",
                 scale: Part | None = None) -> None:
        super().__init__(image, text, embed_dim, scale, pool_text=pool_text)
        self.label_smoothing = label_smoothing

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        # Not ClipLoss: label smoothing needs the mean similarity of each row and column, which comes out of the same sweep.
        return {"contrastive": losses.contrastive_loss(out["image"], out["text"], *self.scale(), label_smoothing=self.label_smoothing)}


def recipe() -> Recipe:
    """The shipped data as it is; see ``noisy`` for the paper's claim."""
    return replace(clip.recipe(), model=fdl.Config(Align, shipped.image(), shipped.text()))


def noisy() -> Recipe:
    """The captions of three samples in ten are those of others."""
    fields = {"image": Image(), "text": Noisy(Caption(max_captions=2), 0.3)}
    return replace(recipe(), data=replace(shipped.PAIRS, fields=fields))


def paper() -> Recipe:
    """1.2 million steps of 16,384 pairs at 288 pixels (there 289), captions of 64 of 100,000 words, a temperature that starts at 1, and a
    linear fall; ViT-H stands for EfficientNet-L2 (1,376 features), AdamW for LAMB. Checked: sections 4.1, 5, 6.1."""
    made = clip.paper()
    image = clip.vit_b(16, width=1280, depth=32, heads=16, image_size=288, grid=18)
    text = clip.text_b(width=1024, depth=24, heads=16, vocab_size=100_000, context_length=64, causal=False)
    return replace(made, model=fdl.Config(Align, image, text, embed_dim=1376, pool_text="first", scale=fdl.Config(Scale, 1.0)),
                   data=replace(made.data, batch_size=16384),
                   schedule=Schedule(steps=1_200_000, warmup=10_000, shape="wsd", cooldown=1_190_000 / 1_200_000),
                   optim=Optim(lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-5))
