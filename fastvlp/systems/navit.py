"""NaViT (Dehghani et al. 2023, arXiv:2307.06304): CLIP over pictures of many sizes in one batch, each with its own share of patches."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp.data.fields import Resolutions
from fastvlp.recipe import Recipe
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Part


class NaVit(Clip):
    """CLIP whose image tokens are pooled by attention. What NaViT proposes is in its parts: packed patches at their own aspect ratio with
    factorised positions (``Vit``), sizes and shares drawn for each picture (``Resolutions``). The same weights serve any size afterwards.

    The authors' code is not public. Their tower normalises queries and keys, which ours does not; the distribution of shares is ours.
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
    """ViT-B/16 with sides from 64 to 256 pixels; batch, length and optimizer are CLIP's."""
    made = clip.paper()
    fields = {"image": Resolutions(size=256, smallest=64, least=0.15), "text": made.data.fields["text"]}
    model = fdl.Config(NaVit, clip.vit_b(16, image_size=256, grid=16), clip.text_b(width=768, heads=12), embed_dim=768, pool_text="last")
    return replace(made, model=model, data=replace(made.data, fields=fields))
