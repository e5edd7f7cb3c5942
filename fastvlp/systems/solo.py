"""SOLO (Chen et al. 2024, arXiv:2407.06438): one causal decoder over the patches of a picture at its own aspect ratio, and over words."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Part
from fastvlp.towers import Joint
from fastvlp_kernels.packed import Packed


class Solo(Captioner):
    """-log p(word | picture, words before it): <vision>, the patches of a row, <row>, those of the next, ..., </vision>, the words. All of
    it is causal, and a patch is its pixels through one linear layer.

    Order and marks are those of github.com/Yangyi-Chen/SOLO (there the last mark is <vision> again). There rotary positions count all
    tokens; here patches know row and column, and words their place, by the embeddings of ``image`` and ``text``.

    Args:
        image, text: towers of which the embeddings are used.
    """

    def __init__(self, image: Part, text: Part, joint: Part) -> None:
        super().__init__()
        self.image, self.text, self.joint = image, text, joint
        self.marks = nn.Parameter(torch.randn(3, joint.width) * 0.02)  # <vision>, <row>, </vision>
        self.words = nn.Linear(joint.width, text.vocab_size, bias=False)

    def states(self, images: Packed, texts: Packed) -> Packed:
        order, lengths = _marked(images)
        patches = torch.cat([self.image.embed(images).x, self.marks.to(self.image.patch.weight.dtype)])
        framed = Packed.of(patches.index_select(0, order.to(patches.device, non_blocking=True)), lengths)
        return self.joint(framed.join(self.text.embed(texts).replace(pos=None)), causal=True).last(texts)


def _marked(images: Packed) -> tuple[Tensor, Tensor]:
    """Where the tokens of pictures with marks come from: numbers of patches, then T, T + 1 and T + 2 for the marks; and their lengths."""
    assert images.pos is not None  # the tower refuses patches without
    owner, row = torch.arange(len(images)).repeat_interleave(images.lengths), images.pos[:, 1].cpu()
    first = torch.ones(images.total, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    begins = first | (row != row.roll(1))  # a mark stands before the patch
    rows = torch.zeros(len(images), dtype=torch.int64).index_add(0, owner, begins.long())
    lengths = images.lengths + rows + 1
    place = torch.arange(images.total) + begins.long().cumsum(0) + owner
    order = torch.full((int(lengths.sum()),), images.total + 2)
    order[place] = torch.arange(images.total)
    order[place[begins] - 1] = images.total + (~first[begins]).long()
    return order, lengths


def recipe() -> Recipe:
    """A captioner without an image tower."""
    model = fdl.Config(Solo, shipped.patches(), shipped.words(), fdl.Config(Joint, width=192, depth=6, heads=3))
    return replace(clip.recipe(), model=model, data=shipped.captions(), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """Mistral-7B's sizes over patches of 32 pixels of pictures up to 1,024."""
    made = clip.paper()
    model = fdl.Config(
        Solo,
        clip.patches_b(32, width=4096, image_size=1024, grid=32),
        clip.words(4096, 32768, 1024),
        fdl.Config(Joint, width=4096, depth=32, heads=32, mlp_ratio=3.5, activation="gelu"),
    )
    return replace(
        made,
        model=model,
        data=replace(made.data, batch_size=128),
        schedule=Schedule(steps=2_000, warmup=200, final_lr=0.1),
        optim=Optim(lr=5e-5, betas=(0.9, 0.95), weight_decay=0.1, grad_clip=1.0),
        train=Train(amp="bf16"),
    )
