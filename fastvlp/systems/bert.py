"""BERT's masked words (Devlin et al. 2018, arXiv:1810.04805), without its next sentences: a text tower alone, and DistilBERT's teacher."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
from torch import nn

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption
from fastvlp.losses import word_nll
from fastvlp.losses.captions import IGNORE
from fastvlp.recipe import Eval, Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.system import Outputs, Part, System


class Bert(System):
    """A text tower that predicts the hidden words of ``masked``, which is ``text`` with whole words hidden."""

    def __init__(self, text: Part) -> None:
        super().__init__()
        self.text, self.words = text, nn.Linear(text.width, text.vocab_size)

    def encode(self, batch: Batch) -> Outputs:
        nll = word_nll(self.text(batch.masked), self.words, batch.text.x.masked_fill(batch.masked.x == batch.text.x, IGNORE))
        return {"words_loss": batch.per_token(nll, "hidden")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"hidden": int((batch.masked.x != batch.text.x).sum())}


def recipe() -> Recipe:
    """Eight layers on the shipped captions, 0.15 of the words hidden."""
    made, caption = clip.recipe(), Caption(max_captions=2)
    fields = {"text": caption, "masked": replace(caption, mask=0.15, mask_id=shipped.MASK)}
    return replace(made, model=fdl.Config(Bert, shipped.text(depth=8, vocab_size=shipped.MASK + 1)), eval=Eval(),
                   data=replace(made.data, fields=fields))


def paper() -> Recipe:
    """BERT-base: a million steps of 256 texts of 512 tokens."""
    made, caption = clip.paper(), Caption()
    fields = {"text": caption, "masked": replace(caption, mask=0.15, mask_id=30522)}
    text = clip.text_b(width=768, heads=12, vocab_size=30523, context_length=512, causal=False)
    return replace(made, model=fdl.Config(Bert, text), schedule=Schedule(steps=1_000_000, warmup=10_000),
                   data=replace(made.data, fields=fields, tokenizer="bert-base-uncased/tokenizer.json", batch_size=256),
                   optim=Optim(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01))
