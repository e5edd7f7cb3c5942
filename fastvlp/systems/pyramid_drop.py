"""PyramidDrop (Xing et al. 2024, arXiv:2410.17247): a captioner whose deeper blocks see fewer and fewer image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.layers import packed_attend
from fastvlp.recipe import Eval, Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.system import Part
from fastvlp.towers import Joint
from fastvlp_kernels import packed_attention, token_select
from fastvlp_kernels.packed import Packed


class PyramidDrop(Captioner):
    """-log p(word | picture, words before it) of a tower, two linear layers and a causal transformer (LLaVA), which before some blocks
    drops image tokens: those that the last token before the answer, here a caption's start, attends to least, with the queries and keys of
    the block that follows, the mean over heads (as in pdrop_rank_drop of github.com/Cooperx521/PyramidDrop).

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
        self.image, self.text, self.joint, self.drop_before, self.keep = image, text, joint, sorted(drop_before), keep
        self.connector = nn.Sequential(nn.Linear(image.width, joint.width), nn.GELU(), nn.Linear(joint.width, joint.width))
        self.words = nn.Linear(joint.width, text.vocab_size, bias=False)

    def states(self, images: Packed, texts: Packed) -> Packed:
        seen = self.image(images)
        patches = seen.replace(x=self.connector(seen.x), pos=None)
        whole, tokens = patches.lengths, patches.join(self.text.embed(texts).replace(pos=None))
        for number, block in enumerate(self.joint.blocks):
            if number in self.drop_before:
                remain = (whole * self.keep ** (self.drop_before.index(number) + 1)).long()
                tokens = _drop(block, tokens, texts.lengths, remain)
            tokens = tokens.replace(x=block(tokens.x, packed_attend(tokens, causal=True)))
        return tokens.replace(x=self.joint.norm_out(tokens.x)).last(texts)


@torch.no_grad()
def _ranks(block: Part, tokens: Packed, patches: Tensor) -> Tensor:
    """How much each patch [T'] of the first ``patches`` tokens of each segment gets from the token behind them."""
    q, k, v = (tokens.replace(x=part, size=None).first(patches + 1) for part in block.queries_keys_values(tokens.x))
    asking = q.last(1)
    _, mass = packed_attention(
        asking.x,
        k.x,
        v.x,
        asking.cu_seqlens,
        k.cu_seqlens,
        1,
        k.max_seqlen,
        return_key_mass=True,
        lengths=asking.lengths,
        lengths_k=k.lengths,
    )
    return k.replace(x=mass).first(patches).x


def _drop(block: Part, tokens: Packed, words: Tensor, remain: Tensor) -> Packed:
    patches = tokens.first(tokens.lengths - words)
    kept = token_select(_ranks(block, tokens, patches.lengths), patches.cu_seqlens, remain, lengths=patches.lengths)
    return kept.apply(patches).join(tokens.last(words))


def recipe() -> Recipe:
    """Half of the tokens left after the second block, a quarter after the fourth."""
    model = fdl.Config(
        PyramidDrop,
        shipped.image(),
        shipped.words(),
        fdl.Config(Joint, width=192, depth=6, heads=3),
        drop_before=(2, 4),
    )
    return replace(clip.recipe(), model=model, data=shipped.captions(), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """LLaVA-1.5-7B's sizes, second stage: half of the tokens dropped after layers 8, 16 and 24; 665,000 samples in batches of 128."""
    made = clip.paper()
    image = clip.vit_b(14, width=1024, depth=24, heads=16, image_size=336, grid=24)
    text = clip.words(4096, 32000, 1472)
    model = fdl.Config(
        PyramidDrop, image, text, fdl.Config(Joint, width=4096, depth=32, heads=32, activation="gelu"), drop_before=(8, 16, 24)
    )
    return replace(
        made,
        model=model,
        data=replace(made.data, batch_size=128),
        schedule=Schedule(samples=665_000, warmup=156),
        optim=Optim(lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0),
        train=Train(amp="bf16"),
    )
