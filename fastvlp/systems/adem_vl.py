"""ADEM-VL (Hao et al. 2024, arXiv:2410.17779): words of a frozen language model read pooled image tokens without new attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.fields import Caption, Image
from fastvlp.layers import ParameterFreeAttention, PyramidPool, packed_attend
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.frozen_lm import FrozenLmCaptioner, large_lm, small_lm
from fastvlp.systems.system import Part
from fastvlp_kernels.packed import Packed


class AdemVl(FrozenLmCaptioner):
    """-log p(word | picture, words before it). Each block of the language model becomes h + mlp(n) + alpha * attention(n), where h is what
    its self-attention left, n = norm(h), and the attention (``ParameterFreeAttention``) has keys beta * image + e1 and values beta * image
    + e2.

    The image tokens are those of the tower, pooled to each of ``grids``, through two thin layers; e1 and e2 are learned, one vector for
    each place, and shared by all blocks. As in github.com/Hao840/ADEM-VL, but for its class token as a word and its adapters in the tower.

    Args:
        grids: sides. hidden: width between the layers. drop: share of the image tokens that each word leaves out.
    """

    def __init__(self, image: Part, lm: Part, grids: Sequence[int] = (16, 8), hidden: int = 128, alpha: float = 0.1, beta: float = 0.01,
                 drop: float = 0.1) -> None:
        super().__init__(image, lm)
        self.alpha, self.beta, self.pool = alpha, beta, PyramidPool(grids)
        self.to_lm = nn.Sequential(nn.Linear(image.width, hidden), nn.SiLU(), nn.Linear(hidden, lm.joint.width))
        self.keys = nn.Parameter(torch.randn(self.pool.places, lm.joint.width) * 0.02)
        # Zeros, so that at the start attention reads nothing but the image.
        self.values = nn.Parameter(torch.zeros(self.pool.places, lm.joint.width))
        self.attention = ParameterFreeAttention(drop)

    def states(self, images: Packed, texts: Packed) -> Packed:
        seen = self.pool(self.image(images))
        keys, values = (self.beta * self.to_lm(seen.x) + vectors.repeat(len(images), 1) for vectors in (self.keys, self.values))
        words = self.embed_words(texts)
        for block in self.lm.joint.blocks:
            read: list[Tensor] = []

            # A place inside the block's own forward, which FSDP and checkpointing wrap: h is what self-attention left.
            def look(h: Tensor, block: Part = block, words: Packed = words, read: list[Tensor] = read) -> Tensor:
                read.append(self.attention(words.replace(x=block.norm2(h)), seen.replace(x=keys), values))
                return h

            x = block(words.x, packed_attend(words, causal=True), look)
            words = words.replace(x=x + self.alpha * read[0])
        return words.replace(x=self.lm.joint.norm_out(words.x))


def recipe() -> Recipe:
    """Grids of 4 and 2 between a frozen tower and a frozen captioner: ``run.start={image: runs/clip, lm: runs/simvlm}``."""
    return replace(clip.recipe(), model=fdl.Config(AdemVl, shipped.image(), small_lm(), grids=(4, 2), hidden=64),
                   data=shipped.captions("lm.text", keep=1.0), schedule=shipped.schedule(keep=1.0),
                   eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """LLaMA-7B's sizes and a ViT-L/14: 5 epochs of COCO's captions in batches of 32 (the README's command)."""
    made = clip.paper()
    model = fdl.Config(AdemVl, clip.vit_b(14, width=1024, depth=24, heads=16), large_lm(32000, 512))
    fields = {"image": Image(keep=1.0), "text": Caption(part="lm.text")}
    return replace(made, model=model, data=replace(made.data, fields=fields, batch_size=32),
                   schedule=Schedule(samples=5 * 566_747, warmup=1_771),
                   optim=Optim(lr=9e-3 * 32 / 256, betas=(0.9, 0.95), weight_decay=0.02), train=Train(amp="bf16"))
