"""BriVL (Huo et al. 2021, arXiv:2103.06561): momentum towers fill queues of negatives, so that a small batch is contrasted with many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fiddle as fdl
from torch import nn

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Momentum, Outputs, Part


class BriVl(Clip):
    """Pictures look for the momentum feature of their caption among those of a queue, captions likewise; afterwards the queues take the
    batch's momentum features.

    Args:
        queue: negatives kept of each side. momentum: of the towers' copies. batch_negatives: the rest of the batch are negatives, too.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, queue: int = 4096, momentum: float = 0.99,
                 batch_negatives: bool = True) -> None:
        super().__init__(image, text, embed_dim)
        followed = ("image", "text", "image_head", "text_head")
        # Heads are followed, too: the queue holds features, which have to come from slow weights throughout.
        self.followers: Any = nn.ModuleDict({name: Momentum(getattr(self, name), momentum) for name in followed})
        self.queues: Any = nn.ModuleDict({name: losses.NegativeQueue(queue, embed_dim) for name in ("image", "text")})
        self.batch_negatives = batch_negatives

    def encode(self, batch: Batch) -> Outputs:
        keys = {f"{name}_key": self.followers[f"{name}_head"](self.followers[name](batch.streams[name])) for name in ("image", "text")}
        return {**super().encode(batch), **keys}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        image, text, image_key, text_key = losses.gather_batch(out["image"], out["text"], out["image_key"], out["text_key"])
        return {"queue": losses.queue_contrastive_loss(image, text, image_key, text_key, self.queues["image"], self.queues["text"],
                                                       *self.scale(), batch_negatives=self.batch_negatives)}

    def after_step(self, out: Outputs, batch: Batch) -> None:
        # Of all processes, so that the queues stay the same on each of them.
        for name, keys in zip(("image", "text"), losses.gather_batch(out["image_key"], out["text_key"]), strict=True):
            self.queues[name].enqueue(keys)


def recipe() -> Recipe:
    """Batches of 32 with queues of 4,096, against batches of 32 and of 512 without (``python -m benchmarks recipes brivl``)."""
    made = clip.recipe()
    return replace(made, model=fdl.Config(BriVl, shipped.image(), shipped.text()), data=replace(made.data, batch_size=32))


def paper() -> Recipe:
    """BriVL: 30 million pairs, 7 machines of 8 GPUs, 16 pairs each, queues of 13,440."""
    made = clip.paper()
    return replace(made, model=fdl.Config(BriVl, clip.vit_b(16), clip.text_b(width=768, heads=12), embed_dim=2560, queue=13440),
                   data=replace(made.data, batch_size=896), schedule=Schedule(samples=15 * 30_000_000, warmup=1000),
                   optim=Optim(lr=1e-5, weight_decay=1e-5))
