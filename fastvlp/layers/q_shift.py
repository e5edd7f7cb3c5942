"""RWKV-CLIP's and Vision-RWKV's shift of features between neighbouring patches, on packed and dropped tokens."""

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
    keys = (((segment << 11) + frame << 16) + row + 1 << 16) + column + 1
    found, order = keys.sort()
    wanted = torch.stack([keys + (down << 16) + right for down, right in STEPS])
    place = torch.searchsorted(found, wanted).clamp_max(T - 1)
    return torch.where((found[place] == wanted) & (row >= 0), order[place], -1)


def q_shift(x: Tensor, pos: Tensor, cu_seqlens: Tensor, index: Tensor | None = None) -> Tensor:
    """Four quarters of the channels take the value of the token to the left, to the right, above and below; 0 where there is none.

    Vision-RWKV, https://arxiv.org/abs/2403.02308. The remaining C % 4 channels stay.

    Args:
        x: [T, C]. pos, cu_seqlens: see :func:`neighbours`. index: what that returned for them, so that it is made once per batch.

    Returns:
        [T, C], differentiable.
    """
    if x.ndim != 2 or x.shape[0] != pos.shape[0]:
        raise ValueError(f"q_shift: x has shape {tuple(x.shape)}; with {pos.shape[0]} positions it must be [{pos.shape[0]}, C]")
    if index is None:
        index = neighbours(pos, cu_seqlens)
    quarter = x.shape[1] // 4
    shifted = [
        part.index_select(0, tokens.clamp_min(0)).masked_fill((tokens < 0)[:, None], 0)
        for part, tokens in zip(x[:, : 4 * quarter].split(max(quarter, 1), 1), index, strict=False)
    ]
    return torch.cat((*shifted, x[:, 4 * quarter :]), 1)
