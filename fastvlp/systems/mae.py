"""MAE (He et al. 2021, arXiv:2111.06377): the pixels of the patches that were left out, from a quarter that was kept."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Image
from fastvlp.data.patches import kept_and_left
from fastvlp.layers import segment_mean
from fastvlp.losses import pixel_error, segment_sum
from fastvlp.recipe import Data, Eval, Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.system import Outputs, Part, System
from fastvlp.towers import Joint
from fastvlp_kernels.packed import Packed


class Mae(System):
    """The tower sees the kept patches alone; a small decoder sees its tokens and mask tokens at the places of the others, whose normalised
    pixels it predicts. The loss is the mean square error over the patches that were left out.

    Streams: ``image``, all patches; ``kept``, some of them.
    """

    def __init__(self, image: Part, decoder: Part) -> None:
        super().__init__()
        self.image, self.decoder = image, decoder
        self.narrow = nn.Linear(image.width, decoder.width)
        self.mask = nn.Parameter(torch.randn(decoder.width) * 0.02)
        # The decoder has a width of its own, and so needs its own tables of places.
        self.rows, self.columns = (nn.Parameter(torch.randn(image.grid, decoder.width) * decoder.width**-0.5) for _ in range(2))
        self.pixels = nn.Linear(decoder.width, 3 * image.patch_size**2)

    def encode(self, batch: Batch) -> Outputs:
        kept, whole = batch.kept, batch.image
        seen, left = kept_and_left(kept, whole, self.image.grid)
        tokens = self.narrow(self.image(kept).x)
        places = self.rows[whole.pos[:, 1].long()] + self.columns[whole.pos[:, 2].long()]
        # The mask token everywhere, then the seen tokens over it; places are added to both.
        x = places + self.mask.expand_as(places).index_copy(0, seen, tokens.to(places.dtype))
        error = pixel_error(self.pixels(self.decoder(whole.replace(x=x, pos=None)).x[left]), whole.x[left])
        of_each = segment_sum(error, Packed.of(error, whole.lengths - kept.lengths))
        return {"pixels_loss": batch.per_token(of_each, "left")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"left": batch.image.total - batch.kept.total}

    def embed_image(self, images: Packed) -> Tensor:
        return F.normalize(segment_mean(self.image(images)), dim=-1)


def recipe() -> Recipe:
    """Three quarters of 64 patches of 8 pixels left out; nearest neighbours among the features afterwards."""
    model = fdl.Config(Mae, shipped.image(patch_size=8), fdl.Config(Joint, width=96, depth=2, heads=3))
    data = Data(fields={"image": Image(keep=1.0), "kept": Image(keep=0.25)}, batch_size=128)
    return replace(clip.recipe(), model=model, data=data, schedule=shipped.schedule(keep=1.0),
                   eval=Eval(knn=("mini:val-emoji",), probe_train=("mini:train",)))


def paper() -> Recipe:
    """ViT-B/16 on ImageNet-1K: 800 epochs, batch 4,096, a decoder of 8 blocks of width 512."""
    made = clip.paper()
    model = fdl.Config(Mae, clip.vit_b(16), fdl.Config(Joint, width=512, depth=8, heads=16, activation="gelu"))
    data = replace(made.data, fields={"image": Image(keep=1.0), "kept": Image(keep=0.25)}, batch_size=4096)
    return replace(made, model=model, data=data, schedule=Schedule(samples=800 * 1_281_167, warmup=12_512),
                   optim=Optim(lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05))
