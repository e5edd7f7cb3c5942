"""RWKV-CLIP's and Vision-RWKV's shift of features between neighbouring tokens, packed and dropped ones, too."""

import torch
from torch import Tensor

# left, right, up, down: (row, column) of the neighbour, relative to the token
STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))


def neighbours(pos: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The tokens to the left, right, above and below of each: int64 [4, T], -1 where there is none.

    Make it once per batch for all layers. A neighbour is of the same segment and frame; one that was dropped or merged away is missing.
    Text and register tokens, of row -1, have none.

    Args:
        pos: int32 [T, 3], (frame, row, column), as in ``Packed.pos``; frames below 2**11, rows and columns below 2**16 - 2.
        cu_seqlens: int32 [S+1] on the same device, which is not asked anything; S below 2**20.
    """
    T = pos.shape[0]
    if pos.ndim != 2 or pos.shape[1] != 3 or cu_seqlens.ndim != 1:
        raise ValueError(f"neighbours: pos is {tuple(pos.shape)} and cu_seqlens {tuple(cu_seqlens.shape)}; they must be [T, 3] and [S + 1]")
    if T == 0:
        return pos.new_empty(4, 0, dtype=torch.int64)
    segment = torch.searchsorted(cu_seqlens, torch.arange(T, device=pos.device, dtype=cu_seqlens.dtype), right=True) - 1
    frame, row, column = pos.long().unbind(1)
    # Place as one sortable number: the neighbour's number is this one plus a constant, found by bisection even where patches are missing.
    # The + 1 keeps a step over the border from reaching the row or segment beside.
    keys = (((segment << 11) + frame << 16) + row + 1 << 16) + column + 1
    found, order = keys.sort()
    wanted = torch.stack([keys + (down << 16) + right for down, right in STEPS])
    place = torch.searchsorted(found, wanted).clamp_max(T - 1)
    return torch.where((found[place] == wanted) & (row >= 0), order[place], -1)


def previous_and_next(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The tokens before and after each of ``tokens`` in its segment: int64 [2, T], -1 where there is none. ``cu_seqlens``: int32 [S+1]."""
    place = torch.arange(tokens, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True)
    # Empty segments make no border: only where the owner of two tokens in a row changes does one end.
    border = segment[1:] != segment[:-1]
    first, last = (torch.nn.functional.pad(border, side, value=True) for side in ((1, 0), (0, 1)))
    return torch.stack([torch.where(first, -1, place - 1), torch.where(last, -1, place + 1)])


def shift(x: Tensor, index: Tensor, heads: int = 1) -> Tensor:
    """n equal parts of each head's channels take the value of n other tokens; 0 where there is none. What is left over stays.

    With the four :func:`neighbours`, Vision-RWKV's shift (one head: quarters of all channels) and RWKV-CLIP's of images (quarters of every
    head); with :func:`previous_and_next` RWKV-CLIP's of text (halves of every head).

    Args:
        x: [T, C], C a multiple of ``heads``. index: int64 [n, T], -1 for none.

    Returns:
        [T, C], differentiable.
    """
    if x.ndim != 2 or x.shape[0] != index.shape[1] or x.shape[1] % heads:
        raise ValueError(f"shift: x has shape {tuple(x.shape)}; it must be [{index.shape[1]}, C] with C a multiple of {heads} heads")
    by_head = x.unflatten(1, (heads, -1))
    part = by_head.shape[2] // len(index)
    shifted = [
        by_head[..., number * part : (number + 1) * part].index_select(0, tokens.clamp_min(0)).masked_fill((tokens < 0)[:, None, None], 0)
        for number, tokens in enumerate(index)
    ]
    return torch.cat((*shifted, by_head[..., len(index) * part :]), 2).flatten(1)


def q_shift(x: Tensor, pos: Tensor, cu_seqlens: Tensor, index: Tensor | None = None, heads: int = 1) -> Tensor:
    """Four quarters of the channels take the value of the token to the left, to the right, above and below; 0 where there is none.

    Vision-RWKV, https://arxiv.org/abs/2403.02308; with ``heads`` quarters of every head, as RWKV-CLIP. See :func:`shift`.

    Args:
        x: [T, C]. pos, cu_seqlens: see :func:`neighbours`. index: what that returned for them, so that it is made once per batch.

    Returns:
        [T, C], differentiable.
    """
    if x.ndim != 2 or x.shape[0] != pos.shape[0]:
        raise ValueError(f"q_shift: x has shape {tuple(x.shape)}; with {pos.shape[0]} positions it must be [{pos.shape[0]}, C]")
    return shift(x, neighbours(pos, cu_seqlens) if index is None else index, heads)
