"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): every pair of the batch is told from a match by itself, by a sigmoid."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl

from fastvlp import losses
from fastvlp.recipe import Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, own_data, shipped
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Part, Scale


class SigLip(Clip):
    """CLIP's towers; the sum over all pairs of -log sigmoid(z_ij (scale <x_i, y_j> + bias)), z = 1 for matches and -1 else, per image.

    The scale starts at 10 and the bias at -10, as in algorithm 1 of the paper, so that the first loss is that of "nothing matches".
    """

    def __init__(self, image: Part, text: Part, embed_dim: int = 256, pool_image: str = "mean", pool_text: str = "mean",
                 strategy: str = "ring", node_size: int | None = None) -> None:
        # CLIP's bound of 100 was made for a softmax; the sigmoid's scale may grow beyond.
        super().__init__(image, text, embed_dim, Scale(10.0, largest=1000.0, bias=-10.0), pool_image, pool_text)
        self.loss = losses.SigLipLoss(strategy=strategy, node_size=node_size)


def recipe() -> Recipe:
    """The default recipe with the sigmoid loss."""
    return replace(clip.recipe(), model=fdl.Config(SigLip, shipped.image(), shipped.text()))


def paper() -> Recipe:
    """SigLIP B/16 from scratch as in section 4: 9 billion samples of WebLI in batches of 32,768."""
    base = clip.paper()
    return replace(base, model=fdl.Config(SigLip, clip.vit_b(16), clip.text_b(width=768, heads=12, vocab_size=32000, context_length=64,
                                                                             causal=False), embed_dim=768, pool_image="attention",
                                          pool_text="last"),
                   schedule=Schedule(samples=9_000_000_000, warmup=20_000),
                   optim=Optim(lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4, grad_clip=1.0), train=Train(amp="bf16"))


def b_16() -> Recipe:
    """One's own pairs: SigLIP's B/16 towers (224 pixels in 196 patches) over 77 of CLIP's tokens."""
    text = clip.text_b(width=768, heads=12, causal=False)
    return own_data.trained(fdl.Config(SigLip, clip.vit_b(16), text, embed_dim=768, pool_image="attention", pool_text="last"))
