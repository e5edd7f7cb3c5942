"""DLIP (Kuang et al. 2023, arXiv:2308.12956), CLIP-KD: a small pair of towers learns the similarities of a large one."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.recipe import Recipe
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part, freeze


class Dlip(Clip):
    """CLIP plus the cross-entropy of its similarities with those of a frozen teacher, of any width.

    Args:
        teacher: a system with ``embed_image`` and ``embed_text`` of the same streams, such as ``fastvlp.load`` gives.
        teacher_scale: of the teacher's similarities, as it was trained. weight: of the distillation.
    """

    def __init__(self, image: Part, text: Part, teacher: Part, embed_dim: int = 256, teacher_scale: float = 14.3,
                 weight: float = 1.0) -> None:
        super().__init__(image, text, embed_dim)
        self.teacher, self.teacher_scale, self.weight = freeze(teacher), teacher_scale, weight
        self.distill = losses.DistillClipLoss()

    def encode(self, batch: Batch) -> Outputs:
        with torch.no_grad():
            taught = {"taught_image": self.teacher.embed_image(batch.image), "taught_text": self.teacher.embed_text(batch.text)}
        return {**super().encode(batch), **taught}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        contrastive, distilled = self.distill(out["image"], out["text"], *self.scale(), out["taught_image"], out["taught_text"],
                                              self.teacher_scale, local_sizes=batch.sizes or None)
        return {"contrastive": contrastive, "distilled": self.weight * distilled}


def recipe() -> Recipe:
    """Towers of 128 channels and 4 blocks from a teacher of the default size (``run.start=runs/clip`` fills it)."""
    student = fdl.Config(Dlip, shipped.image(width=128, depth=4, heads=2), shipped.text(width=128, depth=2, heads=2),
                         teacher=fdl.Config(Clip, shipped.image(), shipped.text()))
    return replace(clip.recipe(), model=student)


def paper() -> Recipe:
    """A student of half the layers of ViT-B/16 and BERT-base."""
    made = clip.paper()
    student = fdl.Config(Dlip, clip.vit_b(16, width=384, heads=6), clip.text_b(depth=6, width=768, heads=12),
                         teacher=fdl.Config(Clip, clip.vit_b(16), clip.text_b(width=768, heads=12), embed_dim=256))
    return replace(made, model=student, data=replace(made.data, batch_size=1024))
