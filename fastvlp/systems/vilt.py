"""ViLT (Kim et al. 2021, arXiv:2102.03334): one transformer over raw patches and words; hidden words, and whether both belong together."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image, Other
from fastvlp.layers import segment_mean
from fastvlp.losses import hidden_words, masked_word_nll
from fastvlp.recipe import Eval, Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.system import Outputs, Part, System
from fastvlp_kernels.packed import Packed


class Vilt(System):
    """Masked words given the picture, and matching of the picture with its caption and with another sample's.

    Streams: ``image``; ``text``; ``masked``, the same caption with whole words hidden; ``other``, the caption of another sample. Matching
    reads the mean token, where the paper reads a class token.
    """

    def __init__(self, image: Part, text: Part, joint: Part) -> None:
        super().__init__()
        self.image, self.text, self.joint = image, text, joint
        # Patches and words pass through the same weights; this tells them apart.
        self.kinds = nn.Parameter(torch.randn(2, joint.width) * 0.02)
        self.match, self.words = nn.Linear(joint.width, 2), nn.Linear(joint.width, text.vocab_size)

    def encode(self, batch: Batch) -> Outputs:
        patches = self.image.embed(batch.image)
        # Patches are embedded once and fused twice: with the own caption, some words hidden, and with another's.
        pair, other = self.fuse(patches, batch.masked), self.fuse(patches, batch.other)
        yes, no = (-self.match(segment_mean(fused)).log_softmax(-1)[:, kind] for fused, kind in ((pair, 1), (other, 0)))
        nll = masked_word_nll(pair.last(batch.text.lengths), self.words, batch.text, batch.masked)
        return {"match_loss": (yes + no) / 2, "words_loss": batch.per_token(nll, "hidden")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"hidden": int(hidden_words(batch.text, batch.masked).sum())}

    def fuse(self, patches: Packed, texts: Packed) -> Packed:
        """Embedded patches and token ids through the transformer."""
        words = self.text.embed(texts)
        return self.joint(patches.replace(x=patches.x + self.kinds[0], pos=None).join(words.replace(x=words.x + self.kinds[1], pos=None)))

    def score(self, images: Packed, texts: Packed) -> Tensor:
        return self.match(segment_mean(self.fuse(self.image.embed(images), texts))).log_softmax(-1)[:, 1]


def recipe() -> Recipe:
    """Masked words and matching on the shipped data, without a feature extractor."""
    made = clip.recipe()
    caption = Caption(max_captions=2)
    fields = {"image": Image(), **shipped.masked(caption), "other": Other(caption)}
    model = fdl.Config(Vilt, shipped.patches(), shipped.words(vocab_size=shipped.VOCABULARY + 1), shipped.joint())
    return replace(made, model=model, data=replace(made.data, fields=fields), eval=Eval(pairs=("mini:val-openclipart",)))


def paper() -> Recipe:
    """ViLT-B/32 at 384 pixels on the longer side: 200,000 steps of 4,096 pairs."""
    made = clip.paper()
    caption = Caption(length=40)
    fields = {"image": Image(), **shipped.masked(caption, 30522), "other": Other(caption)}
    model = fdl.Config(Vilt, shipped.embedding(clip.vit_b(32, image_size=640, grid=20)),
                       shipped.embedding(clip.text_b(width=768, vocab_size=30523, context_length=40)),
                       clip.joint_b())
    return replace(made, model=model, data=replace(made.data, batch_size=4096, fields=fields, tokenizer="bert-base-uncased/tokenizer.json"),
                   schedule=Schedule(steps=200_000, warmup=20_000), optim=Optim(lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01))
