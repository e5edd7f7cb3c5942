"""LexLIP (Luo et al. 2023, arXiv:2302.02908): features are sparse weights of words, which an inverted index can search."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part
from fastvlp_kernels import segment_pool
from fastvlp_kernels.packed import Packed


class LexLip(Clip):
    """Weights of words are max over tokens of log(1 + relu(logits)); contrast of them, and a FLOPS penalty that keeps few.

    Args:
        sparse: weight of the penalty, the sum over words of the squared mean weight (Paria et al. 2020), for each side.
    """

    def __init__(self, image: Part, text: Part, sparse: float = 2e-3) -> None:
        super().__init__(image, text, embed_dim=text.vocab_size)
        # Heads of single tokens in the place of CLIP's, which pool before they project.
        self.image_head, self.text_head = nn.Linear(image.width, text.vocab_size), nn.Linear(text.width, text.vocab_size)
        self.sparse = sparse

    def encode(self, batch: Batch) -> Outputs:
        return {"image": self.image_weights(batch.image), "text": self.text_weights(batch.text)}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        image, text = losses.gather_batch(out["image"], out["text"])
        # The penalty squares means over the whole batch, and so compares samples: it cannot be a mean over processes.
        flops = sum(side.float().mean(0).square().sum() for side in (image, text))
        unit = F.normalize(out["image"], dim=-1), F.normalize(out["text"], dim=-1)
        return {"contrastive": self.loss(*unit, *self.scale(), local_sizes=batch.sizes or None), "flops": self.sparse * flops}

    def image_weights(self, images: Packed) -> Tensor:
        """Weights [n, V] of words, not negative."""
        return _lexicon(self.image(images), self.image_head)

    def text_weights(self, texts: Packed) -> Tensor:
        """Weights [n, V] of words, not negative."""
        return _lexicon(self.text(texts), self.text_head)

    def embed_image(self, images: Packed) -> Tensor:
        return F.normalize(self.image_weights(images), dim=-1)

    def embed_text(self, texts: Packed) -> Tensor:
        return F.normalize(self.text_weights(texts), dim=-1)


def _lexicon(tokens: Packed, head: nn.Module) -> Tensor:
    # log(1 + relu) rises, so that it may come after the maximum: [n, V] instead of [T, V].
    return segment_pool(head(tokens.x), tokens.cu_seqlens, "max", lengths=tokens.lengths).relu().log1p()


def recipe() -> Recipe:
    """Sparse features over the shipped tokenizer's 4,096 words."""
    return replace(clip.recipe(), model=fdl.Config(LexLip, shipped.image(), shipped.text()))


def paper() -> Recipe:
    """LexLIP: BEiT-B image tower, BERT-base text tower, 4.3 million pairs."""
    made = clip.paper()
    model = fdl.Config(LexLip, clip.vit_b(16), clip.text_b(width=768, heads=12, vocab_size=30522, context_length=32, causal=False))
    return replace(made, model=model, data=replace(made.data, batch_size=2048), schedule=Schedule(samples=20 * 4_300_000, warmup=2000),
                   optim=Optim(lr=5e-5, weight_decay=0.01))
