"""SLIP (Mu et al. 2021, arXiv:2112.12750): CLIP, and SimCLR between two augmented views of each picture."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image
from fastvlp.layers import segment_mean
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part
from fastvlp_kernels import similarity_logsumexp


class Slip(Clip):
    """CLIP plus ``weight`` times SimCLR's NT-Xent of the stream ``views``, two segments a sample.

    A view's candidates are all views of all samples but itself, as in the authors' SIMCLRLoss.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, hidden: int = 512, projection: int = 128,
                 temperature: float = 0.1, weight: float = 1.0) -> None:
        super().__init__(image, text, embed_dim)
        self.views_head = nn.Sequential(nn.Linear(image.width, hidden), nn.GELU(), nn.Linear(hidden, projection))
        self.temperature, self.weight = temperature, weight

    def encode(self, batch: Batch) -> Outputs:
        # Both views go through the image tower packed, as two segments of each sample.
        views = F.normalize(self.views_head(segment_mean(self.image(batch.views))), dim=-1)
        # A row a sample again, since outputs of ``encode`` are cut by samples.
        return {**super().encode(batch), "views": views.unflatten(0, (-1, 2))}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        one, two = losses.gather_batch(*out["views"].unbind(1))
        return {**super().objective(out, batch), "simclr": self.weight * nt_xent(one, two, self.temperature)}


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of unit features [N, D] of two views: the mean over 2N views of -log p(the other view | all views but itself)."""
    views, number, half = torch.cat([one, two]), torch.arange(2 * len(one), device=one.device), len(one)
    # Rolled by N, the other view of each stands on the diagonal (offset 0), and the view itself is left out by its number.
    rows, _, positive = similarity_logsumexp(views, views.roll(-half, 0), 1 / temperature, row_ids=number, col_ids=number.roll(-half),
                                             ids="exclude", offset=0)
    return (rows - positive).mean()


def recipe() -> Recipe:
    """CLIP and SimCLR on the shipped data: three encodings of each picture a step."""
    made = clip.recipe()
    fields = {"image": Image(), "text": Caption(max_captions=2), "views": Image(views=2, augment=1.0)}
    return replace(made, model=fdl.Config(Slip, shipped.image(), shipped.text()), data=replace(made.data, fields=fields))


def paper() -> Recipe:
    """SLIP ViT-B/16 on YFCC15M: 25 epochs, batch 4,096."""
    made = clip.paper()
    return replace(made, model=fdl.Config(Slip, clip.vit_b(16), clip.text_b(), embed_dim=512, hidden=4096, projection=256),
                   data=replace(made.data, batch_size=4096, fields={**made.data.fields, "views": Image(views=2, augment=1.0)}),
                   schedule=Schedule(samples=25 * 15_000_000, warmup=3660),
                   optim=Optim(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1))
