"""Several features of each caption from one pass of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.layers import facet_mask
from fastvlp_kernels.packed import Packed


@torch.no_grad()
def facet_features(text: Any, blocks: Iterable[nn.Module], captions: Packed, prompts: Sequence[Sequence[int]]) -> Tensor:
    """What a frozen causal model has at the end of each of K prompts behind each caption: [n, K, C] (FLAME, arXiv:2411.11927).

    The prompts do not see one another, and each is numbered as if it alone followed its caption, so that one pass equals K passes. (The
    released FLAME numbers the prompts' tokens through.)

    Args:
        text: a tower of which the embedding is used. blocks: those to go through.
        captions: packed ids, each with an end, in whose place the prompts come. prompts: token ids, at least one each.
    """
    # The caption's end comes off: a prompt goes on where the words stopped.
    lengths = captions.lengths - 1
    mask = facet_mask(lengths.tolist(), [len(prompt) for prompt in prompts], captions.x.device)
    behind = torch.tensor([sum((list(prompt) for prompt in prompts), [])] * len(captions), dtype=captions.x.dtype)
    # Places come below, since each prompt is numbered as if it stood alone.
    ids = captions.first(lengths).replace(pos=None).join(Packed.from_padded(behind.to(captions.x.device)))
    place = torch.stack([mask.position, *[torch.full_like(mask.position, -1)] * 2], 1).int()
    x = text.embed(ids.replace(pos=place)).x
    for block in blocks:
        x = block(x, mask.attend)
    return x[mask.last].unflatten(0, (len(captions), -1))
