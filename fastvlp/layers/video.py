"""Layers that act along one axis of a video at a time: time at every place, or space in every frame."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from fastvlp.layers.token_merger import TokenMerger
from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed, check_packed

_COLUMNS = {"time": (1, 2), "space": (0,)}  # of ``pos``: what tokens share along this axis


def along(packed: Packed, axis: Literal["time", "space"]) -> tuple[Packed, Tensor, Tensor]:
    """The tokens of each video cut into segments along an axis: those at one place (time), or in one frame (space).

    Finding them costs a synchronisation on a CUDA device.

    Returns:
        The new segments, sorted by video and by place or frame; which video each is of, int64 [S'] on the CPU; and where each of their
        tokens lay before, int64 [T].

    Raises:
        ValueError: the tokens carry no positions.
    """
    check_packed(f"along {axis}", packed=packed)
    if packed.pos is None:
        raise ValueError(f"along {axis}: the packed tokens carry no positions; pos [T, 3] must say frame, row and column")
    video = torch.arange(len(packed), device=packed.x.device).repeat_interleave(packed.cu_seqlens.diff(), output_size=packed.total)
    shared = torch.cat((video[:, None], packed.pos[:, list(_COLUMNS[axis])].long()), 1)
    # Frames may have lost different patches, so that places along time have different numbers of tokens: they are found, not computed.
    groups, inverse, counts = shared.unique(dim=0, return_inverse=True, return_counts=True)
    # Stable, so that tokens of one place stay in the order of their frames.
    order = inverse.argsort(stable=True)
    size = None if packed.size is None else packed.size[order]
    return Packed.of(packed.x[order], counts, size, packed.pos[order]), groups[:, 0].cpu(), order


def joined(groups: Packed, video: Tensor, videos: int) -> Packed:
    """Segments that ``along`` made, whatever their lengths are now, as those of the videos again."""
    lengths = torch.zeros(videos, dtype=torch.int64).index_add_(0, video, groups.lengths)
    return Packed.of(groups.x, lengths, groups.size, groups.pos)


class VideoMerger(nn.Module):
    """Merge similar tokens of each place along time, or of each frame along space (TESTA, https://arxiv.org/abs/2310.19060).

    The divided aggregation is one after the other: along time, then along space. Every place, and every frame, is matched on its own.

    Args:
        r: how many tokens each place or frame loses: a count, or a share below 1, rounded down.
    """

    def __init__(self, axis: Literal["time", "space"], r: int | float) -> None:
        super().__init__()
        if axis not in _COLUMNS:
            raise ValueError(f"VideoMerger: axis is {axis!r}; it must be 'time' or 'space'")
        self.axis = axis
        self.merger = TokenMerger(r)

    def forward(self, packed: Packed, metric: Tensor | None = None) -> Packed:
        """Packed [T, C] with positions -> fewer tokens, sorted by place and then frame (time) or by frame (space).

        Args:
            metric: [T, d], what is compared, as the keys of attention along this axis; None: the tokens themselves.
        """
        groups, video, order = along(packed, self.axis)
        merged = self.merger(groups, None if metric is None else metric[order])
        return joined(merged, video, len(packed))


class TemporalContext(nn.Module):
    """x + softmax(q k') x over the frames of each place: tokens that differ in time alone become alike before they merge.

    This is SimVLG's temporal attentive soft token contextualising (Jian et al., https://arxiv.org/abs/2310.03291); a TokenMerger, or a mean
    over the frames, follows. Only q and k have weights.

    Args:
        dim: C, a multiple of ``num_heads``. num_heads: each has a softmax of its own for its part of the width.
    """

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"TemporalContext: dim {dim} with {num_heads} heads; the heads must divide the width")
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, packed: Packed) -> Packed:
        """Packed [T, C] with positions -> the same tokens in their order, [T, C]."""
        check_packed("TemporalContext", self.qk.in_features, packed=packed)
        groups, _, order = along(packed, "time")
        q, k = self.qk(groups.x).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        out = packed_attention(
            q, k, groups.x.unflatten(-1, (self.num_heads, -1)), groups.cu_seqlens, max_seqlen_q=groups.max_seqlen, key_size=groups.size,
            lengths=groups.lengths,
        )  # fmt: skip
        # argsort of a permutation is its inverse: back to the order in which the tokens came.
        return packed.replace(x=packed.x + cast(Tensor, out).flatten(1)[order.argsort()])
