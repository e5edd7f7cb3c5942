"""SimVLM (Wang et al. 2021, arXiv:2108.10904): patches and the first words are a prefix, the rest is predicted. One objective."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.batch import Batch
from fastvlp.losses import word_nll
from fastvlp.losses.captions import IGNORE
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Outputs, Part
from fastvlp_kernels.packed import Packed


class SimVlm(Captioner):
    """One transformer over embedded patches and words; a prefix of ``prefix`` words at most is seen by all, what follows is causal.

    -log p(word | image, words before it), the mean over the words behind the prefix.

    Args:
        image, text: towers of which only the embeddings are used. prefix: the share of each caption's words that is given, rounded down.
    """

    def __init__(self, image: Part, text: Part, joint: Part, prefix: float = 0.0) -> None:
        super().__init__()
        if not 0 <= prefix < 1:
            raise ValueError(f"SimVlm: prefix is {prefix}; it is a share of the words, at least 0 and below 1")
        self.image, self.text, self.joint, self.prefix = image, text, joint, prefix
        self.words = nn.Linear(joint.width, text.vocab_size)

    def encode(self, batch: Batch) -> Outputs:
        texts, given = batch.text, self._given(batch.text)
        index = torch.arange(texts.total) - (texts.cu_seqlens[:-1].long().cpu()).repeat_interleave(texts.lengths)
        # No loss on the given words, nor on the last token, which has nothing behind it.
        silent = (index < given.repeat_interleave(texts.lengths)) | (index == texts.lengths.repeat_interleave(texts.lengths) - 1)
        targets = texts.x.roll(-1).masked_fill(silent.to(texts.x.device), IGNORE)
        return {"words_loss": batch.per_token(word_nll(self._states(batch.image, texts, given), self.words, targets), "words")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"words": int((batch.text.lengths - 1 - self._given(batch.text)).sum())}

    def states(self, images: Packed, texts: Packed) -> Packed:
        return self._states(images, texts, torch.zeros_like(texts.lengths))

    def _given(self, texts: Packed) -> Tensor:
        """How many words of each caption belong to the prefix, beside its first token: int64 [S] on the CPU."""
        # Rounded down, so that a caption of several tokens has at least one left to predict.
        return ((texts.lengths - 1) * self.prefix).long()

    def _states(self, images: Packed, texts: Packed, given: Tensor) -> Packed:
        joined = self.image.embed(images).replace(pos=None).join(self.text.embed(texts).replace(pos=None))
        prefix = (images.lengths + given).int().to(joined.x.device, non_blocking=True)
        return self.joint(joined, prefix=prefix).last(texts)


def recipe() -> Recipe:
    """A captioner of the shipped pictures from one objective."""
    model = fdl.Config(SimVlm, shipped.patches(), shipped.words(), shipped.joint())
    return replace(clip.recipe(), model=model, data=shipped.captions(), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """SimVLM-base: 12 layers of width 768, a million steps of 4,096 pairs."""
    made = clip.paper()
    text = clip.text_b(width=768, vocab_size=32000, context_length=256)
    model = fdl.Config(SimVlm, shipped.embedding(clip.vit_b(16)), shipped.embedding(text), clip.joint_b())
    return replace(made, model=model, data=replace(made.data, batch_size=4096), schedule=Schedule(steps=1_000_000, warmup=10_000),
                   optim=Optim(lr=5e-4, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=1.0), train=Train(amp="bf16"))
