"""ProtoCLIP (Chen et al. 2022, arXiv:2206.10996): CLIP, and classification among prototypes that clusters of the other side give."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.recipe import Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part, Scale

SIDES = {"image": "text", "text": "image"}  # student: teacher


class ProtoClip(Clip):
    """CLIP plus ``weight`` times the mean of two prototype losses, of features that a head of each side projects.

    Every episode (``train.episode``) the projected features of each side are clustered. The clusters of one side are translated back into
    prototypes of the other, among which each feature's class is its partner's cluster, softened by that side's similarities of centroids
    over ``target_temperature``. Before the second episode there is CLIP's loss alone.

    Checked against the authors' code (megvii-research/protoclip). There a sample keeps the cluster it had when the episode began, here it
    has the one nearest to its partner's feature of this step; an episode there is 200,000 random samples, here all; heads there normalise
    over the batch, here over channels; there is an external teacher, too.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, clusters: int = 640, hidden: int = 512, projection: int = 128,
                 target_temperature: float = 0.01, weight: float = 1.0, restarts: int = 3) -> None:
        super().__init__(image, text, embed_dim)
        self.projections: nn.ModuleDict = nn.ModuleDict({side: nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, projection)) for side in SIDES})
        self.proto_scale = Scale()
        self.clusters, self.target_scale, self.weight, self.restarts = clusters, 1 / target_temperature, weight, restarts
        for side in SIDES:
            self.register_buffer(f"centroids_{side}", torch.zeros(clusters, projection))
            self.register_buffer(f"prototypes_{side}", torch.zeros(clusters, projection))
        self.register_buffer("episodes", torch.zeros((), dtype=torch.int64))  # so that a resumed run knows whether prototypes are real

    def encode(self, batch: Batch) -> Outputs:
        out = super().encode(batch)
        return {**out, **{f"projected_{side}": nn.functional.normalize(self.projections[side](out[side]), dim=-1) for side in SIDES}}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        weight = self.weight / 2 * (len(batch) * batch.world / batch.total) * (self.episodes > 1)
        return {**super().objective(out, batch), "proto": weight * sum(self._classified(out, *sides) for sides in SIDES.items())}

    def _classified(self, out: Outputs, student: str, teacher: str) -> Tensor:
        centroids, prototypes = self.get_buffer(f"centroids_{teacher}"), self.get_buffer(f"prototypes_{student}")
        cluster = losses.nearest_centroid(out[f"projected_{teacher}"], centroids)
        return losses.proto_clip_loss(out[f"projected_{student}"], prototypes, cluster, *self.proto_scale(), teacher=centroids,
                                      teacher_scale=self.target_scale)

    def before_episode(self, features: Outputs) -> None:
        for student, teacher in SIDES.items():
            mine, theirs = (features[f"projected_{side}"].to(self.episodes.device) for side in (student, teacher))
            centroids = losses.kmeans(theirs, self.clusters, restarts=self.restarts)
            self.get_buffer(f"centroids_{teacher}").copy_(centroids)
            cluster = losses.nearest_centroid(theirs, centroids)
            self.get_buffer(f"prototypes_{student}").copy_(losses.back_translate(mine, cluster, self.clusters))
        self.episodes += 1


def recipe() -> Recipe:
    """CLIP's recipe with an episode every 120 steps, ten samples a cluster as in the paper."""
    made = clip.recipe()
    return replace(made, model=fdl.Config(ProtoClip, shipped.image(), shipped.text()), train=Train(episode=120))


def paper() -> Recipe:
    """CC2.5M as published, 400 x 200,000 samples in batches of 512, but for a ViT-B/32 in place of ResNet-50."""
    made = clip.paper()
    return replace(made, model=fdl.Config(ProtoClip, clip.vit_b(32), clip.text_b(), embed_dim=1024, clusters=20_000, hidden=2048),
                   data=replace(made.data, batch_size=512), schedule=Schedule(samples=400 * 200_000, warmup=15_625),
                   optim=replace(made.optim, weight_decay=0.5, grad_clip=10.0), train=Train(amp="fp16", episode=4883))
