"""FIBER (Dou et al. 2022, arXiv:2206.07643), its first stage: fusion in the backbone, which can be switched off."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image
from fastvlp.layers import FusedBlocks, segment_mean
from fastvlp.losses import hidden_words, masked_word_nll
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.albef import Albef
from fastvlp.systems.system import Losses, Outputs, Part
from fastvlp_kernels.packed import Packed


class Fiber(Albef):
    """Contrast of the two towers without fusion; matching (with ALBEF's hard negatives) and hidden words with it, in their last blocks.

    Streams: ``image``; ``text``; ``masked``, the same caption with words hidden. Gates, order of reading and losses are those of
    github.com/microsoft/FIBER, whose towers are a Swin and RoBERTa (post-norm) and which draws the negatives by similarity; the second,
    fine-grained stage (boxes) is left out.

    Args:
        image, text: towers with as many heads. fused: so many last blocks of each read the other tower.
    """

    def __init__(self, image: Part, text: Part, fused: int = 2, embed_dim: int = 256) -> None:
        super().__init__(image, text, FusedBlocks(image.width, text.width, text.blocks[0].heads, fused), embed_dim)
        self.hidden_words = nn.Linear(text.width, text.vocab_size)

    def encode(self, batch: Batch) -> Outputs:
        # Up to here a tower is the same with and without fusion: computed once, used by all three losses.
        patches, words = self.fusion.below(self.image, batch.image), self.fusion.below(self.text, batch.text)
        _, read = self.fusion.together(self.image, self.text, patches, self.fusion.below(self.text, batch.masked))
        nll = masked_word_nll(read, self.hidden_words, batch.text, batch.masked)
        image, text = self.fusion.alone(self.image, patches), self.fusion.alone(self.text, words)
        return {"image": self.image_head(image), "text": self.text_head(text), "patches": patches, "words": words,
                "words_loss": batch.per_token(nll, "hidden")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"hidden": int(hidden_words(batch.text, batch.masked).sum())}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        return {**super().objective(out, batch), **self.means(out, batch)}

    def fused(self, patches: Packed, words: Packed) -> Tensor:
        return torch.cat([segment_mean(side) for side in self.fusion.together(self.image, self.text, patches, words)], 1)

    def score(self, images: Packed, texts: Packed) -> Tensor:
        return self.match(self.fused(self.fusion.below(self.image, images), self.fusion.below(self.text, texts))).log_softmax(-1)[:, 1]


def recipe() -> Recipe:
    """The last two blocks of each tower read the other."""
    made = clip.recipe()
    fields = {"image": Image(), **shipped.masked(Caption(max_captions=2))}
    model = fdl.Config(Fiber, shipped.image(), shipped.text(vocab_size=shipped.VOCABULARY + 1))
    return replace(made, model=model, data=replace(made.data, fields=fields), eval=replace(made.eval, pairs=("mini:val-openclipart",)))


def paper() -> Recipe:
    """The coarse stage: 100,000 steps of 4,096 pairs at 384 pixels, six fused layers; a ViT-B/16 stands for the Swin-B."""
    made = clip.paper()
    fields = {"image": Image(), **shipped.masked(Caption(length=40), 50264)}
    model = fdl.Config(Fiber, clip.vit_b(16, image_size=384, grid=24),
                       clip.text_b(width=768, heads=12, vocab_size=50265, context_length=40, causal=False), fused=6, embed_dim=768)
    return replace(made, model=model, data=replace(made.data, batch_size=4096, fields=fields, tokenizer="roberta-base/tokenizer.json"),
                   schedule=Schedule(steps=100_000, warmup=10_000),
                   optim=Optim(lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01, scales={"fusion": 5.0, "match": 5.0, "hidden_words": 5.0}))
