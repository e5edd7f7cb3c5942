"""eP-ALM (Shukor et al. 2023, arXiv:2303.11403): one linear layer and one token, into the last layers of a frozen language model."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import nn

from fastvlp.data.fields import Caption, Image
from fastvlp.layers import packed_attend, segment_mean
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.frozen_lm import FrozenLmCaptioner, large_lm, small_lm
from fastvlp.systems.system import Part
from fastvlp_kernels.packed import Packed


class EpAlm(FrozenLmCaptioner):
    """-log p(word | picture, words before it). The tokens of the last ``layers`` blocks of a frozen image tower become, by one linear
    layer, the first token of as many later blocks of a frozen language model, each in the place of the one before.

    Order of layers, shared connector and prompt without places are those of github.com/mshukor/eP-ALM (ePALM_pt_L). There the picture's
    token is a class token, and sees all words; here it is the mean token, and causal like all.

    Args:
        layers: of the tower. prompt: learned tokens.
        first, last: blocks of the language model that get a token, from 0, ``last`` not among them.
    """

    def __init__(self, image: Part, lm: Part, layers: int = 6, first: int = 19, last: int = 31, prompt: int = 1) -> None:
        super().__init__(image, lm)
        if not (0 <= first and first + layers <= last <= len(lm.joint.blocks) and 1 <= layers <= len(image.blocks)):
            raise ValueError(
                f"EpAlm: {layers} layers of {len(image.blocks)} cannot go into blocks {first} to {last - 1} of "
                f"{len(lm.joint.blocks)}; there must be at least as many blocks as layers"
            )
        self.layers, self.first, self.last = layers, first, last
        self.to_lm = nn.Linear(image.width, lm.joint.width)
        self.prompt = nn.Parameter(torch.randn(prompt, lm.joint.width) * 0.02)

    def states(self, images: Packed, texts: Packed) -> Packed:
        seen, each = self._seen(images), (self.last - self.first) // self.layers
        words = self.embed_words(texts)
        # The prompt stands first, where the new tokens of later blocks will stand: words have one place throughout.
        tokens = Packed.from_padded(self.prompt.to(words.x.dtype).expand(len(texts), -1, -1)).join(words)
        language = tokens.lengths
        for number, block in enumerate(self.lm.joint.blocks):
            if self.first <= number < self.last:
                one = self.to_lm(seen[min((number - self.first) // each, self.layers - 1)])
                # The new token takes the place of the one before, so that the sequence does not grow.
                tokens = Packed.from_padded(one[:, None].to(words.x.dtype)).join(tokens.last(language))
            tokens = tokens.replace(x=block(tokens.x, packed_attend(tokens, causal=True)))
        return tokens.replace(x=self.lm.joint.norm_out(tokens.x)).last(texts)

    @torch.no_grad()
    def _seen(self, images: Packed) -> list[torch.Tensor]:
        """The mean tokens [n, C] behind each of the tower's last blocks."""
        tokens, found = self.image.embed(images), []
        for block in self.image.blocks:
            tokens = tokens.replace(x=block(tokens.x, packed_attend(tokens, causal=False)))
            found.append(segment_mean(tokens))
        return found[-self.layers:]


def recipe() -> Recipe:
    """Two layers of a frozen tower into four blocks of a frozen captioner: ``run.start={image: runs/clip, lm: runs/simvlm}``."""
    return replace(clip.recipe(), model=fdl.Config(EpAlm, shipped.image(), small_lm(), layers=2, first=2, last=6),
                   data=shipped.captions("lm.text"), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """ePALM_pt_L: ViT-L/16, OPT-6.7B sized, a prompt of 10 tokens, 35 epochs of COCO's 566,747 captions; the batch, 2 a GPU, is 16 here."""
    made = clip.paper()
    model = fdl.Config(EpAlm, clip.vit_b(16, width=1024, depth=24, heads=16), large_lm(50272, 64), prompt=10)
    fields = {"image": Image(), "text": Caption(part="lm.text")}
    return replace(made, model=model, data=replace(made.data, fields=fields, batch_size=16),
                   schedule=Schedule(samples=35 * 566_747, warmup=141_687),
                   optim=Optim(lr=2e-4, weight_decay=0.02, scales={"prompt": 5.0}), train=Train(amp="bf16"))
