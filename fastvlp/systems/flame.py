"""FLAME (Cao et al. 2024, arXiv:2411.11927): a frozen language model says one feature for each facet of a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import fiddle as fdl
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image, Vector
from fastvlp.data.tokenizer import load_tokenizer
from fastvlp.layers import segment_mean
from fastvlp.losses import multi_caption_loss
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.frozen_lm import small_lm
from fastvlp.systems.system import Losses, Outputs, Part, Scale, System, freeze
from fastvlp.towers import facet_features
from fastvlp_kernels.packed import Packed


class Flame(System):
    """An image tower and two linear layers against K features of each caption: the mean of K softmaxes over the batch in each direction.

    The features are a frozen language model's (``facet_features``), or the stream ``facets``, K * ``width`` numbers computed before.
    Projector and loss are those of github.com/MIV-XJTU/FLAME (MultiPositiveNCELoss; its README takes the sigmoid of the same pairs).

    Args:
        lm: a system with ``text`` and ``joint`` (``SimVlm``), or None. prompts: token ids. layer: the block whose tokens are taken.
        width: of the features, where there is no model. hidden: width between the linear layers.
    """

    def __init__(self, image: Part, lm: Part | None = None, prompts: Sequence[Sequence[int]] = (), layer: int = -2,
                 width: int | None = None, hidden: int = 4096) -> None:
        super().__init__()
        if (lm is None) != (not prompts) or (lm is None) != (width is not None):
            raise ValueError("Flame: give a language model and prompts, or neither and the width of the stream facets")
        self.image, self.lm, self.prompts, self.layer = image, None if lm is None else freeze(lm), [list(ids) for ids in prompts], layer
        self.width, self.scale = width or lm.joint.width, Scale()  # type: ignore[union-attr]  # one of both is given
        self.project = nn.Sequential(nn.Linear(image.width, hidden), nn.GELU(), nn.Linear(hidden, self.width), nn.LayerNorm(self.width))

    def encode(self, batch: Batch) -> Outputs:
        facets = batch.facets.unflatten(1, (-1, self.width)) if self.lm is None else self.facets(batch.text)
        return {"image": self.embed_image(batch.image), "text": F.normalize(facets, dim=-1)}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        return {"contrastive": multi_caption_loss(out["image"], out["text"].transpose(0, 1).contiguous(), *self.scale())}

    def embed_image(self, images: Packed) -> Tensor:
        return F.normalize(self.project(segment_mean(self.image(images))), dim=-1)

    def embed_text(self, texts: Packed) -> Tensor:
        return F.normalize(self.facets(texts).mean(1), dim=-1)

    def facets(self, texts: Packed) -> Tensor:
        """[n, K, width] of captions."""
        if self.lm is None:
            raise ValueError("Flame: it has no language model, only features that were computed before; give lm and prompts")
        blocks = self.lm.joint.blocks
        return facet_features(self.lm.text, blocks[:self.layer % len(blocks) + 1], texts, self.prompts)


def recipe() -> Recipe:
    """Three prompts behind each caption of a frozen captioner: ``run.start`` of a ``simvlm`` run with model.text.context_length=32."""
    prompts = tuple(load_tokenizer(shipped.PAIRS.tokenizer).words(text) for text in ("it is a", "its colour is", "it is used for"))
    fields = {"image": Image(), "text": Caption(length=24, max_captions=2, part="lm.text", ends=shipped.ENDS)}
    return replace(clip.recipe(), model=fdl.Config(Flame, shipped.image(), small_lm(context_length=32), prompts, hidden=384),
                   data=replace(shipped.PAIRS, fields=fields))


def paper() -> Recipe:
    """ViT-B/16 on CC3M, against ten features of 5,120 numbers that Mistral Nemo gave before: 32 epochs of batches of 3,072."""
    made = clip.paper()
    fields = {"image": Image(), "facets": Vector("facets", 10 * 5120)}
    return replace(made, model=fdl.Config(Flame, clip.vit_b(16), width=5120, hidden=5120),
                   data=replace(made.data, fields=fields, batch_size=3072), schedule=Schedule(samples=32 * 2_905_954, warmup=2000),
                   optim=Optim(lr=5e-4, betas=(0.9, 0.95), weight_decay=0.5))
