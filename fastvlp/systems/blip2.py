"""BLIP-2's second stage (Li et al. 2023, arXiv:2301.12597): a Q-Former's queries are the prefix of a frozen language model."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import nn

from fastvlp.data.fields import Caption, Image
from fastvlp.layers import QFormer
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.frozen_lm import FrozenLmCaptioner, large_lm, small_lm
from fastvlp.systems.system import Part
from fastvlp_kernels.packed import Packed


class Blip2(FrozenLmCaptioner):
    """-log p(word | queries, words before it), the mean over words; image tower and language model are frozen.

    Args:
        queries: so many tokens stand for the picture.
    """

    def __init__(self, image: Part, qformer: Part, lm: Part, queries: int = 8) -> None:
        super().__init__(image, lm)
        self.qformer = qformer
        self.queries = nn.Parameter(torch.randn(queries, qformer.hidden_size) * 0.02)
        self.to_lm = nn.Linear(qformer.hidden_size, lm.joint.width)

    def states(self, images: Packed, texts: Packed) -> Packed:
        # Queries of all pictures are equally many, so that they are packed without a mask.
        prefix = Packed.from_padded(self.to_lm(self.qformer(self.queries, self.image(images).replace(pos=None))))
        # Queries see one another, words see all queries and the words before them: the mask of a prefix.
        joined = prefix.join(self.embed_words(texts))
        return self.lm.joint(joined, prefix=prefix.cu_seqlens.diff()).last(texts)


def recipe() -> Recipe:
    """Eight queries between a frozen tower and a frozen captioner: ``run.start={image: runs/clip, lm: runs/simvlm}``."""
    bridge = fdl.Config(QFormer, encoder_width=192, hidden_size=192, num_layers=4, num_heads=3, intermediate_size=768, dropout=0.0)
    return replace(clip.recipe(), model=fdl.Config(Blip2, shipped.image(), bridge, small_lm()), data=shipped.captions("lm.text"),
                   eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """Stage 2 with ViT-g/14 and OPT-2.7B sized parts: 80,000 steps of 1,920 pairs."""
    made = clip.paper()
    image = clip.vit_b(14, width=1408, depth=39, heads=16, mlp_ratio=4.3637)
    fields = {"image": Image(), "text": Caption(part="lm.text")}
    return replace(made, model=fdl.Config(Blip2, image, fdl.Config(QFormer), large_lm(50272, 32, width=2560), queries=32),
                   data=replace(made.data, fields=fields, batch_size=1920), schedule=Schedule(steps=80_000, warmup=2000, final_lr=0.5),
                   optim=Optim(lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05), train=Train(amp="fp16"))
