"""PyramidDrop (Xing et al. 2024, arXiv:2410.17247): a captioner whose deeper blocks see fewer and fewer image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import fiddle as fdl
from torch import nn

from fastvlp.layers import drop_least_read, packed_attend
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Part
from fastvlp_kernels.packed import Packed


class PyramidDrop(Captioner):
    """-log p(word | picture, words before it) of a tower, two linear layers and a causal transformer (LLaVA), which before some blocks
    drops image tokens: those that the last token before the answer, here a caption's start, attends to least (``drop_least_read``).

    Nothing is learned for it, so that a model trained without (``drop_before=()``) can be run with it.

    Args:
        drop_before: numbers of blocks. keep: share of the picture's tokens that remains at each of them, of those that remained before.
    """

    def __init__(self, image: Part, text: Part, joint: Part, drop_before: Sequence[int] = (), keep: float = 0.5) -> None:
        super().__init__()
        if not 0 <= keep <= 1 or not all(0 <= block < len(joint.blocks) for block in drop_before):
            raise ValueError(
                f"PyramidDrop: keep is {keep} and drop_before {list(drop_before)}; keep is a share, and blocks go from 0 to "
                f"{len(joint.blocks) - 1}"
            )
        # Sorted, since what a block keeps follows from its place in this list.
        self.image, self.text, self.joint, self.drop_before, self.keep = image, text, joint, sorted(drop_before), keep
        self.connector = nn.Sequential(nn.Linear(image.width, joint.width), nn.GELU(), nn.Linear(joint.width, joint.width))
        self.words = nn.Linear(joint.width, text.vocab_size, bias=False)

    def states(self, images: Packed, texts: Packed) -> Packed:
        seen = self.image(images)
        patches = seen.replace(x=self.connector(seen.x), pos=None)
        whole, tokens = patches.lengths, patches.join(self.text.embed(texts).replace(pos=None))
        for number, block in enumerate(self.joint.blocks):
            if number in self.drop_before:
                # Shares of the picture's own tokens, not of what was left: rounding does not add up.
                remain = (whole * self.keep ** (self.drop_before.index(number) + 1)).long()
                tokens = drop_least_read(block, tokens, texts.lengths, remain)
            tokens = tokens.replace(x=block(tokens.x, packed_attend(tokens, causal=True)))
        return tokens.replace(x=self.joint.norm_out(tokens.x)).last(texts)


def recipe() -> Recipe:
    """Half of the tokens left after the second block, a quarter after the fourth."""
    return replace(clip.recipe(), model=fdl.Config(PyramidDrop, shipped.image(), shipped.words(), shipped.joint(), drop_before=(2, 4)),
                   data=shipped.captions(), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """LLaVA-1.5-7B's sizes, second stage: half of the tokens dropped after layers 8, 16 and 24; 665,298 samples in batches of 128.

    Checked with v1_5/pdrop_train/finetune.sh of the authors, which names the 13B model, 16 samples a device and the tower's last layer but
    one; eight devices are LLaVA's.
    """
    made = clip.paper()
    image = clip.vit_b(14, width=1024, depth=23, heads=16, image_size=336, grid=24)
    text = shipped.embedding(clip.text_b(width=4096, vocab_size=32000, context_length=1472))
    joint = clip.joint_b(width=4096, depth=32, heads=32)
    return replace(made, model=fdl.Config(PyramidDrop, image, text, joint, drop_before=(8, 16, 24)),
                   data=replace(made.data, batch_size=128), schedule=Schedule(samples=665_298, warmup=156),
                   optim=Optim(lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0), train=Train(amp="bf16"))
