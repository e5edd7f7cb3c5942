"""Dropping image tokens that a language model's next block would hardly read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels import packed_attention, token_select
from fastvlp_kernels.packed import Packed


def drop_least_read(block: Any, tokens: Packed, words: Tensor, remain: Tensor) -> Packed:
    """Segments of image tokens and words, without the image tokens that the first word attends to least (PyramidDrop, arXiv:2410.17247).

    The attention is that of ``block``, the one that follows, as the mean over its heads; order is kept, and nothing is learned. Checked
    against pdrop_rank_drop of github.com/Cooperx521/PyramidDrop.

    Args:
        block: a :class:`Block`. tokens: packed [T, C]. words: how many of each segment's last tokens are words, int64 [S] on the CPU.
        remain: how many image tokens each segment keeps, int64 [S].
    """
    patches = tokens.first(tokens.lengths - words)
    kept = token_select(_read(block, tokens, patches.lengths), patches.cu_seqlens, remain, lengths=patches.lengths)
    return kept.apply(patches).join(tokens.last(words))


@torch.no_grad()
def _read(block: Any, tokens: Packed, patches: Tensor) -> Tensor:
    """How much each of the first ``patches`` tokens of each segment gets from the token behind them: [T']."""
    # Sizes of merged tokens are left out: the authors rank by plain attention.
    q, k, v = (tokens.replace(x=part, size=None).first(patches + 1) for part in block.queries_keys_values(tokens.x))
    asking = q.last(1)
    _, mass = packed_attention(asking.x, k.x, v.x, asking.cu_seqlens, k.cu_seqlens, 1, k.max_seqlen, return_key_mass=True,
                               lengths=asking.lengths, lengths_k=k.lengths)  # fmt: skip
    return k.replace(x=mass).first(patches).x
