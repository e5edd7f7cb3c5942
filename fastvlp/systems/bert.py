"""BERT's masked words (Devlin et al. 2018, arXiv:1810.04805), without its next sentences: a text tower alone, and DistilBERT's teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption
from fastvlp.losses import hidden_words, masked_word_nll, word_nll
from fastvlp.losses.captions import IGNORE
from fastvlp.recipe import Eval, Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.system import Outputs, Part, System
from fastvlp_kernels.packed import Packed


class Bert(System):
    """A text tower that predicts the hidden words of ``masked``: ``text`` with whole words hidden by the last id of the vocabulary."""

    def __init__(self, text: Part) -> None:
        super().__init__()
        self.text, self.words = text, nn.Linear(text.width, text.vocab_size)

    def encode(self, batch: Batch) -> Outputs:
        nll = masked_word_nll(self.text(batch.masked), self.words, batch.text, batch.masked)
        return {"words_loss": batch.per_token(nll, "hidden")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"hidden": int(hidden_words(batch.text, batch.masked).sum())}

    def caption_nll(self, images: Any, texts: Packed) -> Tensor:
        """The pseudo-likelihood, without pictures: each token but the first is hidden in turn (Salazar et al. 2020, arXiv:1910.14659)."""
        # An empty caption has nothing to hide, and not minus one word.
        hidden = (texts.lengths - 1).clamp_min(0)
        owner = torch.arange(len(texts)).repeat_interleave(hidden)
        # A caption of n words becomes n - 1 copies, each with another word hidden: one packed pass for all.
        copies = texts.take(owner)
        inside = torch.arange(copies.total) - (copies.lengths.cumsum(0) - copies.lengths).repeat_interleave(copies.lengths)
        which = 1 + torch.arange(len(owner)) - (hidden.cumsum(0) - hidden)[owner]
        here = (inside == which.repeat_interleave(copies.lengths)).to(texts.x.device)
        states = self.text(copies.replace(x=copies.x.masked_fill(here, self.text.vocab_size - 1)))
        nll = word_nll(states, self.words, copies.x.masked_fill(~here, IGNORE))
        return nll.new_zeros(len(texts)).index_add(0, owner.to(nll.device), nll)


def recipe() -> Recipe:
    """Eight layers on the shipped captions, 0.15 of the words hidden."""
    return replace(clip.recipe(), model=fdl.Config(Bert, shipped.text(depth=8, vocab_size=shipped.MASK + 1)),
                   data=replace(shipped.PAIRS, fields=shipped.masked(Caption(max_captions=2))),
                   eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """BERT-base: a million steps of 256 texts of 512 tokens."""
    made = clip.paper()
    text = clip.text_b(width=768, heads=12, vocab_size=30523, context_length=512, causal=False)
    data = replace(made.data, fields=shipped.masked(Caption(), 30522), tokenizer="bert-base-uncased/tokenizer.json", batch_size=256)
    return replace(made, model=fdl.Config(Bert, text), schedule=Schedule(steps=1_000_000, warmup=10_000), data=data,
                   optim=Optim(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01))
