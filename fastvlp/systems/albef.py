"""ALBEF (Li et al. 2021, arXiv:2107.07651): contrast, and matching of each pair against its hardest negatives by a fusion encoder."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.layers import segment_mean
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part
from fastvlp.towers import Joint
from fastvlp_kernels.packed import Packed


class Albef(Clip):
    """CLIP's loss, plus matching: each picture with its caption, with the most similar other caption, and each caption with the most
    similar other picture, of the whole batch. Negatives are known only after the contrast, so that tokens are outputs, too.

    The paper draws negatives in proportion to their similarity and also predicts masked words; this takes the hardest and is the part of
    it that compares samples.
    """

    def __init__(self, image: Part, text: Part, fusion: Part, embed_dim: int = 256) -> None:
        super().__init__(image, text, embed_dim)
        self.fusion, self.match = fusion, nn.Linear(fusion.width, 2)

    def encode(self, batch: Batch) -> Outputs:
        image, text = self.image(batch.image).replace(pos=None), self.text(batch.text).replace(pos=None)
        return {"image": self.image_head(image), "text": self.text_head(text), "patches": image, "words": text}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        image, text, patches, words, ids = losses.gather_batch(out["image"], out["text"], out["patches"], out["words"], batch.ids)
        # Choosing is no part of the gradient. Pairs that show the same thing are no negatives.
        with torch.no_grad():
            similarity = (image @ text.T).masked_fill(ids[:, None] == ids[None], -torch.inf)
            of_image, of_text = similarity.argmax(1).cpu(), similarity.argmax(0).cpu()
        # Every process judges its own pairs and its own negatives, wherever in the batch these lie.
        own = torch.arange(batch.first, batch.first + len(batch))
        rows = torch.cat([own, own, of_text[own]]), torch.cat([own, of_image[own], own])
        truth = (rows[0] == rows[1]).long().to(image.device)
        logits = self.match(self.fused(patches.take(rows[0]), words.take(rows[1])))
        # Each sample brings three pairs, its own and two negatives, hence the 3.
        match = F.cross_entropy(logits, truth, reduction="sum") * batch.world / (3 * batch.total)
        return {**super().objective(out, batch), "match": match}

    def fused(self, patches: Packed, words: Packed) -> Tensor:
        """One feature [n, C] of each pair of a picture's tokens and a caption's."""
        return segment_mean(self.fusion(patches.join(words)))

    def score(self, images: Packed, texts: Packed) -> Tensor:
        fused = self.fused(self.image(images).replace(pos=None), self.text(texts).replace(pos=None))
        return self.match(fused).log_softmax(-1)[:, 1]


def recipe() -> Recipe:
    """Contrast and matching on the shipped data."""
    made = clip.recipe()
    model = fdl.Config(Albef, shipped.image(), shipped.text(), fdl.Config(Joint, width=192, depth=2, heads=3))
    return replace(made, model=model, eval=replace(made.eval, pairs=("mini:val-openclipart",)))


def paper() -> Recipe:
    """ALBEF: ViT-B/16, six BERT layers for text and six for fusion, 30 epochs of 14 million pairs."""
    made = clip.paper()
    text = clip.text_b(width=768, depth=6, heads=12, vocab_size=30522, context_length=30, causal=False)
    fusion = fdl.Config(Joint, width=768, depth=6, heads=12, activation="gelu")
    model = fdl.Config(Albef, clip.vit_b(16, image_size=256, grid=16), text, fusion)
    return replace(made, model=model, data=replace(made.data, batch_size=512), schedule=Schedule(samples=30 * 14_000_000, warmup=1000),
                   optim=Optim(lr=1e-4, weight_decay=0.02))
