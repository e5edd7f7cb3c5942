"""LlamaFusion (Shi et al. 2024, arXiv:2412.15188), its understanding half: a frozen language model and a trained copy for patches."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.layers import RoutedBlock, packed_attend
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.frozen_lm import large_lm, small_lm
from fastvlp.systems.system import Part, freeze
from fastvlp_kernels.packed import Packed


class LlamaFusion(Captioner):
    """-log p(word | picture, words before it). Patches go through norms, projections and feed-forward layers of their own, words through
    the language model's, and all attend together: patches see one another, words what is before them. What the model says of text alone
    stays as it was, to the bit.

    The paper (later: LMFusion) also makes pictures, by a diffusion loss over the patches of a latent space; that half is not here. No code
    of the authors was found: the routing is the paper's section 3.

    Args:
        image: a tower of which the embedding is used. lm: a system with ``text``, ``joint`` and ``words`` (``SimVlm``).
    """

    def __init__(self, image: Part, lm: Part) -> None:
        super().__init__()
        self.image, self.text, self.words, self.norm_out = image, freeze(lm.text), freeze(lm.words), freeze(lm.joint.norm_out)
        self.blocks = nn.ModuleList(RoutedBlock([freeze(block), copied]) for block, copied in
                                    zip(lm.joint.blocks, copy.deepcopy(lm.joint.blocks), strict=True))

    def states(self, images: Packed, texts: Packed) -> Packed:
        tokens = self.image.embed(images).replace(pos=None).join(self.text.embed(texts).replace(pos=None))
        number = tokens.replace(x=torch.arange(tokens.total, device=tokens.x.device))
        rows, attend = (number.last(texts).x, number.first(images).x), packed_attend(tokens, causal=True, prefix=images.lengths)
        x = tokens.x
        for block in self.blocks:
            x = block(x, attend, rows)
        words = tokens.replace(x=x).last(texts)
        return words.replace(x=self.norm_out(words.x))

    def weights_from(self, theirs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A captioner's blocks are those of words and, as a start, those of patches."""
        here = dict[str, Tensor]()
        for name, tensor in theirs.items():
            if match := re.match(r"joint\.blocks\.(\d+)\.(.+)", name):
                here |= {f"blocks.{match[1]}.{kind}.{match[2]}": tensor for kind in cast(RoutedBlock, self.blocks[0]).kinds}
            else:
                here[name.removeprefix("joint.")] = tensor
        return here


def recipe() -> Recipe:
    """Patches beside a frozen captioner of six blocks: ``run.start=runs/simvlm``."""
    return replace(clip.recipe(), model=fdl.Config(LlamaFusion, shipped.patches(), small_lm()), data=shipped.captions(),
                   eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """Llama-3 8B's sizes, 256 patches a picture, and 0.25 trillion tokens of pictures and captions.

    Checked with section 4 of the paper, and with Transfusion's for decay, clipping and steps, which it follows. 3,333 pairs of about 300
    tokens stand for a million tokens a step; there four of five captions come before their picture, to make it.
    """
    made = clip.paper()
    image = shipped.embedding(clip.vit_b(16, width=4096, image_size=256, grid=16))
    # 4.5 gives a block as many weights as Llama's, whose feed-forward layer is gated, 14,336 wide, and whose keys have 8 heads.
    return replace(made, model=fdl.Config(LlamaFusion, image, large_lm(128256, 1024, mlp_ratio=4.5)),
                   data=replace(made.data, batch_size=3333), schedule=Schedule(steps=250_000, warmup=4000, final_lr=0.15),
                   optim=Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, grad_clip=1.0), train=Train(amp="bf16"))
