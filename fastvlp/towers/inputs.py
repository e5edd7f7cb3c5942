"""What towers refuse, each in one sentence: tokens of another width, tokens without places, and shares that cannot merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp_kernels.packed import Packed, check_packed


def positions(name: str, tokens: Packed, maker: str) -> Tensor:
    """``tokens.pos`` int32 [T, 3]."""
    check_packed(name, tokens=tokens)
    if tokens.pos is None:
        raise ValueError(f"{name}: the tokens carry no positions (pos is None); make them with fastvlp.data.{maker}")
    return tokens.pos


def inside(name: str, what: str, index: Tensor, count: int) -> None:
    """Refuse an index outside 0..count - 1, where looking costs nothing: on the CPU."""
    # On a CUDA device the check would be a synchronisation in every step, and an index out of range ends in PyTorch's own assertion.
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: {what} go from {low} to {high}; this tower has 0 to {count - 1}")


def places(name: str, texts: Packed, vocab_size: int, context_length: int) -> Tensor:
    """The places in their captions of packed ids: int64 [T]."""
    place = positions(name, texts, "pack_texts")[:, 0].long()
    if texts.x.ndim != 1 or texts.x.is_floating_point():
        raise TypeError(f"{name}: the tokens are {texts.x.dtype} {tuple(texts.x.shape)}; they must be ids, integers [T]")
    inside(name, "token ids", texts.x, vocab_size)
    inside(name, "places in the caption", place, context_length)
    return place


def merge_shares(name: str, merge: float | Sequence[float], depth: int) -> tuple[float, ...]:
    """The share of each segment's tokens that merges away in each of ``depth`` blocks, from one for all, one for each, or none."""
    shares = (merge,) if isinstance(merge, int | float) else tuple(merge)
    if len(shares) not in (0, 1, depth) or not all(0 <= share <= 0.5 for share in shares):
        raise ValueError(f"{name}: merge is {list(shares)}; shares from 0 to 0.5 are needed, one for each of {depth} blocks or one for all")
    return shares if len(shares) == depth else (shares or (0.0,)) * depth
