"""SOLO (Chen et al. 2024, arXiv:2407.06438): one causal decoder over the patches of a picture at its own aspect ratio, and over words."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import nn

from fastvlp.data.patches import with_row_marks
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Part
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
        order, lengths = with_row_marks(images)
        # Patches and the three marks in one table, from which one lookup makes the sequence.
        patches = torch.cat([self.image.embed(images).x, self.marks.to(self.image.patch.weight.dtype)])
        framed = Packed.of(patches.index_select(0, order.to(patches.device, non_blocking=True)), lengths)
        return self.joint(framed.join(self.text.embed(texts).replace(pos=None)), causal=True).last(texts)


def recipe() -> Recipe:
    """A captioner without an image tower."""
    model = fdl.Config(Solo, shipped.patches(), shipped.words(), shipped.joint())
    return replace(clip.recipe(), model=model, data=shipped.captions(), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """Mistral-7B's sizes and 1,031 new words, over patches of 32 pixels of pictures up to 1,024; the second of three stages.

    Checked with create_solo.py and the stages' scripts in the authors' repository, which say no betas (those are Megatron's). 4,096 pairs
    of about 1,000 tokens stand for their 128 sequences of 32,768 tokens.
    """
    made = clip.paper()
    image, text = (shipped.embedding(tower) for tower in (clip.vit_b(32, width=4096, image_size=1024, grid=32),
                                                          clip.text_b(width=4096, vocab_size=33_031, context_length=1024)))
    # 4.5 gives a block as many weights as Mistral's, whose feed-forward layer is gated, 14,336 wide, and whose keys have 8 heads.
    return replace(made, model=fdl.Config(Solo, image, text, clip.joint_b(width=4096, depth=32, heads=32, mlp_ratio=4.5)),
                   data=replace(made.data, batch_size=4096), schedule=Schedule(steps=3_481, warmup=200, final_lr=0.1),
                   optim=Optim(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.1, grad_clip=1.0), train=Train(amp="bf16"))
