"""CLIP (Radford et al. 2021, arXiv:2103.00020): two towers, and each pair is the most similar of its row and of its column."""

from __future__ import annotations

import fiddle as fdl
from torch import Tensor, nn

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image
from fastvlp.layers import Pool
from fastvlp.recipe import Data, Optim, Recipe, Schedule, Train
from fastvlp.systems import own_data, shipped
from fastvlp.systems.published import joint_b as joint_b
from fastvlp.systems.published import text_b as text_b
from fastvlp.systems.published import vit_b as vit_b
from fastvlp.systems.system import Losses, Outputs, Part, Scale, System
from fastvlp_kernels.packed import Packed


class Clip(System):
    """Two towers whose pooled tokens are projected to ``embed_dim`` unit features, compared by the symmetric softmax loss.

    Args:
        image, text: towers, packed tokens in and out. scale: of the similarities; None is CLIP's, 1 / 0.07 at first, at most 100.
        pool_image, pool_text: see ``fastvlp.layers.Pool``.
        strategy, node_size: how the loss crosses processes (``fastvlp.losses.ClipLoss``).
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, scale: Part | None = None,
                 pool_image: str = "mean", pool_text: str = "mean", strategy: str = "gather", node_size: int | None = None) -> None:
        super().__init__()
        self.image, self.text, self.scale = image, text, scale or Scale()
        self.image_head: nn.Module = Pool(image.width, embed_dim, pool_image)
        self.text_head: nn.Module = Pool(text.width, embed_dim, pool_text)
        self.loss: nn.Module = losses.ClipLoss(strategy=strategy, node_size=node_size)

    def encode(self, batch: Batch) -> Outputs:
        return {"image": self.embed_image(batch.image), "text": self.embed_text(batch.text)}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        # Sizes that are told save the processes from asking one another in every step.
        return {"contrastive": self.loss(out["image"], out["text"], *self.scale(), local_sizes=batch.sizes or None)}

    def embed_image(self, images: Packed) -> Tensor:
        return self.image_head(self.image(images))

    def embed_text(self, texts: Packed) -> Tensor:
        return self.text_head(self.text(texts))


def recipe() -> Recipe:
    """Emoji and clip art with their names, from scratch on two CPU cores in about four minutes: 8 % zero-shot top-1 on an unseen style."""
    return Recipe(fdl.Config(Clip, shipped.image(), shipped.text()), shipped.schedule(), shipped.PAIRS, optim=shipped.OPTIM,
                  eval=shipped.EVAL)


def paper() -> Recipe:
    """ViT-B/32 as in tables 18 to 20 of the paper: 32 epochs of 400 million pairs in batches of 32,768."""
    return Recipe(
        fdl.Config(Clip, vit_b(32), text_b(), embed_dim=512, pool_text="last"),
        Schedule(samples=32 * 400_000_000, warmup=2000),
        Data(train=("SHARDS",), fields={"image": Image(), "text": Caption()}, tokenizer="clip", batch_size=32768, workers=8),
        optim=Optim(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2), train=Train(amp="fp16"))


def vit_b_32() -> Recipe:
    """One's own pairs: CLIP's ViT-B/32 (224 pixels in 49 patches, 77 tokens)."""
    return own_data.trained(fdl.Config(Clip, vit_b(32), text_b(), embed_dim=512, pool_text="last"))


def vit_b_16() -> Recipe:
    """One's own pairs: CLIP's ViT-B/16 (224 pixels in 196 patches, 77 tokens)."""
    return own_data.trained(fdl.Config(Clip, vit_b(16), text_b(), embed_dim=512, pool_text="last"))


def vit_s_16() -> Recipe:
    """One's own pairs: a ViT-S/16 (224 pixels in 196 patches, 77 tokens), a quarter of ViT-B/16's products."""
    small = {"width": 384, "heads": 6}
    return own_data.trained(fdl.Config(Clip, vit_b(16, **small), text_b(**small), embed_dim=384, pool_text="last"))
