"""What an attention mask says of keys: which are padding, and what is added to the scores of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HIDDEN = -1e4  # weights of e^-10000 are 0 in every dtype: finfo.min, -1e9 and -1e4 all mean padding


def read_mask(mask: Any, shape: tuple[int, int], padding: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are real, bool [B, N], and the bias of each key, [B, 1 or heads, N]; None where the mask says nothing of that.

    Args:
        mask: broadcast to [B, heads, N, N]: boolean (True: a query sees the key), or added to the scores, where -10,000 and less hide.
        shape: (B, N). padding: a mask [B, N] says which tokens are real, as flash-attn's in transformers.

    Raises:
        ValueError: it says different things to different queries, or is no such mask.
    """
    batch, tokens = shape
    if padding and isinstance(mask, Tensor) and mask.shape == shape and not mask.is_floating_point():
        return mask.bool(), None
    four = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape) if isinstance(mask, Tensor) and mask.ndim <= 4 else None
    fits = four is not None and four.shape[0] in (1, batch) and four.shape[2] in (1, tokens) and four.shape[3] == tokens
    if four is None or not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"fastvlp.accelerate: the attention mask is {_named(mask)}; packed attention takes boolean or floating-point masks "
            f"[B, 1 or heads, 1 or N, N] for x [{batch}, {tokens}, C] (for others leave merge, pack and attention out)"
        )
    seen = four if four.dtype == torch.bool else ~(four.detach() <= HIDDEN)
    real = seen.any(2).any(1)
    # What padding sees does not matter; what any real query sees must be all that is real.
    alike = (seen == real[:, None, None]) | ~_queries(real, four.shape[2])
    if not bool(alike.all()):
        raise ValueError(_different(mask))
    real = real.expand(batch, -1)
    return (None if bool(real.all()) else real), None if four.dtype == torch.bool else _bias(mask, four, real, batch)


def _queries(real: Tensor, queries: int) -> Tensor:
    """[B, 1, queries, 1]: which queries are real; one for all is."""
    return real[:, None, :, None] if queries > 1 else real.new_ones(1, 1, 1, 1)


def _bias(mask: Tensor, four: Tensor, real: Tensor, batch: int) -> Tensor | None:
    """What a float mask adds to the scores of real keys, the same for all real queries; None where that is 0."""
    counts = _queries(real, four.shape[2]) & real[:, None, None]
    values = four.detach()
    lowest, highest = (torch.where(counts, values, end) for end in (torch.inf, -torch.inf))
    shared = (highest.amax(2) == lowest.amin(2)) | ~real[:, None]
    if not bool(shared.all()) or (mask.requires_grad and four.shape[2] > 1):
        raise ValueError(_different(mask))
    if not mask.requires_grad and not bool((torch.where(counts, values, 0) != 0).any()):
        return None
    first = four[:, :, 0] if four.shape[2] == 1 else highest.amax(2)
    bias = torch.where(real[:, None], first, 0)
    return bias.expand(batch, -1, -1)


def _named(mask: Any) -> str:
    return f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__


def _different(mask: Tensor) -> str:
    return (
        f"fastvlp.accelerate: the attention mask ({_named(mask)}) hides more than padding, or adds to the scores of pairs of tokens; "
        "merged and packed tokens all see each other (for such masks leave merge, pack and attention out)"
    )
