"""One step of token merging (ToMe) as a module."""

from typing import overload

import torch
from torch import Tensor, nn

from fastvlp_kernels import merge_plan
from fastvlp_kernels.packed import Packed


def mergeable(tokens: int, r: int | float, protected: int = 0) -> int:
    """How many of a segment's tokens ``merge_plan`` merges for ``r``: a count, or a share below 1 of the tokens, rounded down."""
    wanted = int(tokens * r) if r < 1 else int(r)
    # Only tokens of even place can merge away, so at most half of them, less those in the protected prefix; they need one of odd place.
    return min(wanted, (tokens + 1) // 2 - (protected + 1) // 2) if tokens // 2 > protected // 2 else 0


def even_segments(rows: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cu_seqlens int32 [rows + 1] on the device, and lengths int64 [rows] on the CPU, of a dense [rows, tokens, ...]."""
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * tokens
    return starts, torch.full((rows,), tokens, dtype=torch.int64)


def check_rows(op: str, name: str, x: Tensor, shape: tuple[int, int]) -> None:
    """Refuse what is not [B, N, ...] with ``shape`` = (B, N)."""
    if x.shape[:2] != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must be [{shape[0]}, {shape[1]}, ...], a row for each token")


class TokenMerger(nn.Module):
    """Merge the most similar tokens of each image: bipartite soft matching (ToMe, https://arxiv.org/abs/2210.09461).

    Args:
        r: how many tokens each image loses: a count, or a share below 1 of its tokens. threshold: instead, the least similarity.
        protected: leading tokens that stay as they are: 1 for a class token.
    """

    def __init__(self, r: int | float = 0, threshold: float | None = None, protected: int = 0) -> None:
        super().__init__()
        self.r, self.threshold, self.protected = r, threshold, protected

    @overload
    def forward(self, x: Packed, metric: Tensor | None = None) -> Packed: ...
    @overload
    def forward(self, x: Tensor, metric: Tensor | None = None, size: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Packed | Tensor, metric: Tensor | None = None, size: Tensor | None = None) -> Packed | tuple[Tensor, Tensor]:
        """Merge; ``metric`` [T, d] or [B, N, d] is what is compared (in ToMe the keys), by default the tokens themselves.

        Args:
            x: ``Packed`` [T, C] with its sizes, or [B, N, C]. size: for [B, N, C], float32 [B, N]; None: 1 each.

        Returns:
            ``Packed``; or x [B, N', C] and size [B, N'].

        Raises:
            ValueError: a threshold for [B, N, C], whose rows would end up of different lengths; or what ``merge_plan`` refuses.
        """
        if isinstance(x, Packed):
            values = x.x if metric is None else metric
            plan = merge_plan(values, x.cu_seqlens, self.r, lengths=x.lengths, threshold=self.threshold, protected=self.protected)
            return plan.apply(x)
        if self.threshold is not None:
            raise ValueError("TokenMerger: a threshold merges another number in every row of [B, N, C]; pass Packed.from_padded(x)")
        if not isinstance(x, Tensor) or x.ndim != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"TokenMerger: x is {got}; it must be Packed or a tensor [B, N, C]")
        rows, tokens = x.shape[:2]
        for name, given in (("metric", metric), ("size", size)):
            if given is not None:
                check_rows("TokenMerger", name, given, (rows, tokens))
        starts, lengths = even_segments(rows, tokens, x.device)
        values = (x if metric is None else metric).flatten(0, 1)
        # Every row loses as many, which the host knows: the result is dense again, and nothing asks the device.
        left = tokens - mergeable(tokens, self.r, self.protected)
        plan = merge_plan(values, starts, self.r, lengths=lengths, total=rows * left, protected=self.protected)
        merged, sizes = plan.merge(x.flatten(0, 1), None if size is None else size.flatten())
        return merged.unflatten(0, (rows, left)), sizes.unflatten(0, (rows, left))
