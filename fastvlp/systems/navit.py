"""NaViT (Dehghani et al. 2023, arXiv:2307.06304): CLIP over pictures of many sizes in one batch, each with its own share of patches."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp.data.fields import Caption, Resolutions
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Part


class NaVit(Clip):
    """CLIP whose image tokens are pooled by attention. What NaViT proposes is in its parts: packed patches at their own aspect ratio with
    factorised positions (``Vit``), sizes and shares drawn for each picture (``Resolutions``). The same weights serve any size afterwards.

    The authors' code is not public. Their towers normalise queries and keys and have no biases, ours do neither; the authors draw shares
    from a beta distribution or by size (appendix B.6), which here are uniform.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, pool_image: str = "attention", pool_text: str = "mean") -> None:
        super().__init__(image, text, embed_dim, None, pool_image, pool_text)


def recipe() -> Recipe:
    """Longest sides from 32 to 96 pixels and from a fourth of the patches on, in the last fifth of training all of them."""
    made = clip.recipe()
    fields = {"image": Resolutions(size=96, smallest=32, least=0.25), "text": made.data.fields["text"]}
    return replace(made, model=fdl.Config(NaVit, shipped.image(), shipped.text()), data=replace(made.data, fields=fields),
                   schedule=shipped.schedule(keep=0.75))


def paper() -> Recipe:
    """ViT-B/16, sides from 64 to 256 pixels, half of the patches left out, captions of 24 of T5's 32,000 words: appendix B.2, checked.

    It gives no length for pairs: batch, steps and cooldown are those of table 2 (230,000 steps for labels), warm-up and text tower are
    ours, "wsd" stands for the reciprocal square root, and the longest side for that of a square of equal area.
    """
    made = clip.paper()
    fields = {"image": Resolutions(size=256, smallest=64, least=0.15, keep=0.85), "text": Caption()}
    text = clip.text_b(width=768, heads=12, vocab_size=32000, context_length=24, causal=False)
    return replace(made, model=fdl.Config(NaVit, clip.vit_b(16, image_size=256, grid=16), text, embed_dim=768, pool_text="attention"),
                   data=replace(made.data, fields=fields, batch_size=19_968, tokenizer="t5/tokenizer.json"),
                   schedule=Schedule(steps=230_000, warmup=10_000, shape="wsd", cooldown=50 / 230),
                   optim=Optim(lr=3e-3, betas=(0.9, 0.999), weight_decay=1e-6))
