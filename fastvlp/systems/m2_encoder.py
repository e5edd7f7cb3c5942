"""M2-Encoder (Guo et al. 2024, arXiv:2401.15896): CLIP's loss over so many devices that features are aggregated by groups of nodes."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp.recipe import Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Part


class M2Encoder(Clip):
    """CLIP whose loss goes round by nodes of ``node_size`` processes (None: of one machine, as torchrun says): each text crosses the slow
    links once a node, and no process holds all features. The loss and its gradients are those of the whole batch.

    The authors' public code (Ant-Multi-Modal-Framework) has the sizes of their models and a setting ``aggregate_nodes``, not the training;
    their towers share attention and add three blocks over both, these are apart.
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, pool_image: str = "mean", pool_text: str = "mean",
                 node_size: int | None = None) -> None:
        super().__init__(image, text, embed_dim, None, pool_image, pool_text, "grouped", node_size)


def recipe() -> Recipe:
    """CLIP's recipe; on one process it is CLIP, on several (torchrun) they are grouped by machine."""
    return replace(clip.recipe(), model=fdl.Config(M2Encoder, shipped.image(), shipped.text()))


def paper() -> Recipe:
    """M2-Encoder-1B in the sizes of its public configuration, once over BM-6B; batch and optimizer, which it does not say, are CLIP's."""
    made = clip.paper()
    image = clip.vit_b(16, width=1024, depth=24, heads=16)
    text = clip.text_b(width=1024, depth=24, heads=16, vocab_size=115_244, context_length=52, causal=False)
    return replace(made, model=fdl.Config(M2Encoder, image, text, embed_dim=1024), schedule=Schedule(samples=6_000_000_000, warmup=2000),
                   train=Train(amp="bf16", shard="world"))
