"""FILIP (Yao et al. 2021, arXiv:2111.07783): every token looks for its nearest of the other modality."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.layers import segment_mean
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part
from fastvlp_kernels.packed import Packed


class Filip(Clip):
    """The similarity of a picture and a caption is the mean over tokens of their largest with a token of the other (late interaction).

    Args:
        keep: the share of each side's tokens that is compared and sent to other processes: those whose largest similarity to a token of
            their own pair is highest (25 % in section 3.1 of the paper; 1.0 compares all).
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 128, keep: float = 1.0) -> None:
        super().__init__(image, text, embed_dim)
        if not 0 < keep <= 1:
            raise ValueError(f"Filip: keep is {keep}; it is a share of the tokens, above 0 and at most 1")
        # Heads of single tokens in the place of CLIP's, which pool.
        self.image_head, self.text_head = nn.Linear(image.width, embed_dim, bias=False), nn.Linear(text.width, embed_dim, bias=False)
        self.keep = keep

    def encode(self, batch: Batch) -> Outputs:
        image, text = self.image_tokens(batch.image), self.text_tokens(batch.text)
        # Chosen within the pair, before anything travels: other processes get a quarter of the tokens.
        if self.keep < 1:
            image, text = losses.nearest_tokens(image, text, self.keep), losses.nearest_tokens(text, image, self.keep)
        return {"image": image, "text": text}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        return {"late_interaction": losses.filip_loss(*losses.gather_batch(out["image"], out["text"]), *self.scale())}

    def image_tokens(self, images: Packed) -> Packed:
        """Unit features of every patch."""
        return _unit(self.image(images), self.image_head)

    def text_tokens(self, texts: Packed) -> Packed:
        """Unit features of every word."""
        return _unit(self.text(texts), self.text_head)

    def embed_image(self, images: Packed) -> Tensor:
        # The mean token where one vector is asked for; the loss itself compares tokens.
        return F.normalize(segment_mean(self.image_tokens(images)), dim=-1)

    def embed_text(self, texts: Packed) -> Tensor:
        return F.normalize(segment_mean(self.text_tokens(texts)), dim=-1)


def _unit(tokens: Packed, head: nn.Module) -> Packed:
    return tokens.replace(x=F.normalize(head(tokens.x), dim=-1), pos=None)


def recipe() -> Recipe:
    """Late interaction of 16 patches and the words of a caption."""
    return replace(clip.recipe(), model=fdl.Config(Filip, shipped.image(), shipped.text()))


def paper() -> Recipe:
    """FILIP-base: ViT-B/32, 300 million pairs, batch 24,576, a quarter of the tokens sent."""
    base = clip.paper()
    return replace(base, model=fdl.Config(Filip, clip.vit_b(32), clip.text_b(), embed_dim=256, keep=0.25),
                   data=replace(base.data, batch_size=24576), schedule=Schedule(samples=30 * 300_000_000, warmup=2000),
                   optim=Optim(lr=6e-3, betas=(0.9, 0.98), weight_decay=3e-2))
