"""AIM (El-Nouby et al. 2024, arXiv:2401.08541): each patch from those before it, and the first ones see one another."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Image, Uniform
from fastvlp.layers import ResidualMlp, packed_attend, segment_mean
from fastvlp.losses import pixel_error, segment_sum
from fastvlp.recipe import Data, Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.system import Outputs, Part, System
from fastvlp_kernels.packed import Packed


class Aim(System):
    """Of n patches in reading order, the first s in 1..n-1 (drawn) see one another, the others those before them; the mean square error
    of the normalised pixels of patch i + 1, told from patch i, over the patches behind the first s.

    Streams: ``image``, all patches; ``draw``, a number in 0..1, which says s. Afterwards all patches see one another. The mask is that of
    PrefixCausalAttention in github.com/apple/ml-aim, whose training code is not public: the loss is the paper's (section 3.2).

    Args:
        image: a tower, all of which is trained. head: so many feed-forward layers, ``head_width`` wide, stand between tokens and pixels.
    """

    def __init__(self, image: Part, head: int = 2, head_width: int = 192) -> None:
        super().__init__()
        self.image = image
        self.head = nn.Sequential(nn.Linear(image.width, head_width), *(ResidualMlp(head_width) for _ in range(head)),
                                  nn.LayerNorm(head_width), nn.Linear(head_width, 3 * image.patch_size**2))

    def encode(self, batch: Batch) -> Outputs:
        patches, first = batch.image, _first(batch)
        tokens = self.image.embed(patches)
        attend, x = packed_attend(tokens, causal=True, prefix=first), tokens.x
        # Not the tower's own forward, in which all patches see one another.
        for block in self.image.blocks:
            x = block(x, attend)
        each = patches.cu_seqlens.diff()
        place = torch.arange(patches.total, device=x.device) - patches.cu_seqlens[:-1].repeat_interleave(each, output_size=patches.total)
        asked = place >= first.to(x.device).repeat_interleave(each, output_size=patches.total)
        # Each patch is told from the one before it; the first of a picture gets the last of another's, and is never asked for.
        error = pixel_error(self.head(self.image.norm_out(x)).roll(1, 0), patches.x) * asked
        return {"pixels_loss": batch.per_token(segment_sum(error, patches), "told")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"told": int((batch.image.lengths - _first(batch).cpu()).sum())}

    def embed_image(self, images: Packed) -> Tensor:
        return F.normalize(segment_mean(self.image(images)), dim=-1)


def _first(batch: Batch) -> Tensor:
    """How many patches of each picture see one another: 1 to n - 1 (1 of 1), int64 [n]."""
    spare = (batch.image.lengths - 1).to(batch.draw.device, non_blocking=True)
    return ((batch.draw * spare).long() + 1).minimum(spare.clamp_min(1))


def recipe() -> Recipe:
    """64 patches of 8 pixels in their order; neighbours among the features afterwards, and a linear probe."""
    data = Data(fields={"image": Image(keep=1.0), "draw": Uniform()}, batch_size=128)
    return replace(clip.recipe(), model=fdl.Config(Aim, shipped.image(patch_size=8)), data=data, schedule=shipped.schedule(keep=1.0),
                   eval=Eval(knn=("mini:val-emoji",), probe=("mini:val-emoji",), probe_train=("mini:train",)))


def paper() -> Recipe:
    """AIM-0.6B: 24 layers of width 1,536, a head of 12 of width 2,048; 500,000 steps of 4,096 pictures. Checked with table 1, section 5.2
    and the authors' aim_600M; warm-up, betas, weight decay and clipping (appendix D) could not be."""
    made = clip.paper()
    model = fdl.Config(Aim, clip.vit_b(14, width=1536, depth=24, heads=12), head=12, head_width=2048)
    data = replace(made.data, fields={"image": Image(keep=1.0), "draw": Uniform()}, batch_size=4096)
    return replace(made, model=model, data=data, schedule=Schedule(steps=500_000, warmup=31_250),
                   optim=Optim(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0), train=Train(amp="bf16"))
