"""ADEM-VL (Hao et al. 2024, arXiv:2410.17779): words of a frozen language model read pooled image tokens without new attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.fields import Caption, Image
from fastvlp.layers import AdaptiveAveragePool, ParameterFreeAttention, packed_attend
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped, simvlm
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Part, freeze
from fastvlp.towers import Joint
from fastvlp_kernels.packed import Packed


class AdemVl(Captioner):
    """-log p(word | picture, words before it). Each block of the language model becomes h + mlp(n) + alpha * attention(n), where h is what
    its self-attention left, n = norm(h), and the attention (``ParameterFreeAttention``) has keys beta * image + e1 and values beta * image
    + e2.

    The image tokens are those of the tower, pooled to each of ``grids``, through two thin layers; e1 and e2 are learned, one vector for
    each place, and shared by all blocks. As in github.com/Hao840/ADEM-VL, but for its class token as a word and its adapters in the tower.

    Args:
        lm: a system with ``text``, ``joint`` and ``words`` (``SimVlm``, trained on captions). grids: sides. hidden: width between the
            layers.
        drop: share of the image tokens that each word leaves out.
    """

    def __init__(
        self,
        image: Part,
        lm: Part,
        grids: Sequence[int] = (16, 8),
        hidden: int = 128,
        alpha: float = 0.1,
        beta: float = 0.01,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.image, self.lm, self.alpha, self.beta = freeze(image), freeze(lm), alpha, beta
        self.pools = [AdaptiveAveragePool((1, side, side)) for side in grids]
        self.to_lm = nn.Sequential(nn.Linear(image.width, hidden), nn.SiLU(), nn.Linear(hidden, lm.joint.width))
        places = sum(side**2 for side in grids)
        self.keys, self.values = nn.Parameter(torch.randn(places, lm.joint.width) * 0.02), nn.Parameter(torch.zeros(places, lm.joint.width))
        self.attention = ParameterFreeAttention(drop)

    @property
    def words(self) -> nn.Module:
        """The language model's head."""
        return self.lm.words

    def states(self, images: Packed, texts: Packed) -> Packed:
        seen = self._pooled(images)
        keys, values = (self.beta * self.to_lm(seen.x) + vectors.repeat(len(images), 1) for vectors in (self.keys, self.values))
        words = self.lm.text.embed(texts).replace(pos=None)
        for block in self.lm.joint.blocks:
            read: list[Tensor] = []

            def look(h: Tensor, block: Part = block, words: Packed = words, read: list[Tensor] = read) -> Tensor:
                read.append(self.attention(words.replace(x=block.norm2(h)), seen.replace(x=keys), values))
                return h

            x = block(words.x, packed_attend(words, causal=True), look)
            words = words.replace(x=x + self.alpha * read[0])
        return words.replace(x=self.lm.joint.norm_out(words.x))

    @torch.no_grad()
    def _pooled(self, images: Packed) -> Packed:
        """The tower's tokens on each grid, one behind the other: the same number of each picture."""
        tokens = self.image(images)
        sides = [pos.amax(0) + 1 for pos in tokens.pos.split(tokens.lengths.tolist())]
        sizes = torch.stack(sides).long().cpu()
        first, *others = (pool(tokens, sizes) for pool in self.pools)
        return first.join(*others)


def recipe() -> Recipe:
    """Grids of 4 and 2 between a frozen tower and a frozen captioner: ``run.start={image: runs/clip, lm: runs/simvlm}``."""
    model = fdl.Config(AdemVl, shipped.image(), simvlm.recipe().model, grids=(4, 2), hidden=64)
    return replace(
        clip.recipe(),
        model=model,
        data=shipped.captions("lm.text", keep=1.0),
        schedule=shipped.schedule(keep=1.0),
        eval=Eval(captions=("mini:val-openclipart",)),
    )


def paper() -> Recipe:
    """LLaMA-7B's sizes and a ViT-L/14: 5 epochs of COCO's captions in batches of 32 (the README's command)."""
    made = clip.paper()
    lm = fdl.Config(
        simvlm.SimVlm,
        clip.patches_b(14),
        clip.words(4096, 32000, 512),
        fdl.Config(Joint, width=4096, depth=32, heads=32, activation="gelu"),
    )
    model = fdl.Config(AdemVl, clip.vit_b(14, width=1024, depth=24, heads=16), lm)
    fields = {"image": Image(keep=1.0), "text": Caption(part="lm.text")}
    return replace(
        made,
        model=model,
        data=replace(made.data, fields=fields, batch_size=32),
        schedule=Schedule(samples=5 * 566_747, warmup=1_771),
        optim=Optim(lr=9e-3 * 32 / 256, betas=(0.9, 0.95), weight_decay=0.02),
        train=Train(amp="bf16"),
    )
