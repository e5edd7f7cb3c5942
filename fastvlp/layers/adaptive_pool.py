"""Average pooling of ragged pictures and videos to one grid, or to several."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastvlp_kernels import segment_pool
from fastvlp_kernels._check import plain_tensors
from fastvlp_kernels.packed import Packed, check_packed


def _bins(size: int, out: int) -> list[range]:
    """Cell i of ``out`` covers floor(i size / out) to ceil((i + 1) size / out), as in torch's adaptive pooling."""
    return [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


@lru_cache(maxsize=256)
def _cells(size: tuple[int, int, int], out: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The tokens of each cell of one grid, int64 [n], and how many each has, int64 [cells]."""
    _, rows, columns = size
    times, heights, widths = (_bins(n, m) for n, m in zip(size, out, strict=True))
    cells = [[(t * rows + r) * columns + c for t in time for r in height for c in width]
             for time in times for height in heights for width in widths]  # fmt: skip
    return torch.tensor([token for cell in cells for token in cell]), torch.tensor([len(cell) for cell in cells])


class AdaptiveAveragePool(nn.Module):
    """Pool each video to ``out`` = (frames, rows, columns) tokens, without parameters (PLLaVA, https://arxiv.org/abs/2404.16994).

    Equal to ``F.adaptive_avg_pool3d`` of each video on its own grid; pictures are videos of one frame.
    """

    def __init__(self, out: tuple[int, int, int]) -> None:
        super().__init__()
        if len(out) != 3 or min(out) < 1:
            raise ValueError(f"AdaptiveAveragePool: out is {out}; three positive numbers are needed: frames, rows, columns")
        self.out = out

    def forward(self, packed: Packed, sizes: Tensor) -> Packed:
        """Pool.

        Args:
            packed: [T, C], the tokens of every video in the order of frames, rows, columns.
            sizes: integers [S, 3] on the CPU: frames, rows and columns of each video, all positive.

        Returns:
            ``Packed`` [S * cells, C], each video the same number of tokens, with their places in the new grid.

        Raises:
            ValueError: ``sizes`` is not what the segments hold.
        """
        check_packed("AdaptiveAveragePool", packed=packed)
        plain_tensors("AdaptiveAveragePool", sizes=sizes)
        if sizes.shape != (len(packed), 3) or not torch.equal(sizes.prod(1), packed.lengths) or (len(sizes) and int(sizes.min()) < 1):
            raise ValueError(f"AdaptiveAveragePool: sizes are {sizes.tolist()}, the segments have {packed.lengths.tolist()} tokens; "
                             "each needs positive frames, rows and columns whose product is its length")  # fmt: skip
        starts = torch.cat((packed.lengths.new_zeros(1), packed.lengths.cumsum(0))).tolist()
        parts = [_cells(tuple(size), self.out) for size in sizes.tolist()]
        # Cells overlap where the grid does not divide the picture: a token is copied into each of its cells, and each cell is a segment.
        tokens = torch.cat([torch.empty(0, dtype=torch.int64), *(part[0] + start for part, start in zip(parts, starts, strict=False))])
        counts = torch.cat([torch.empty(0, dtype=torch.int64), *(part[1] for part in parts)])
        cells = Packed.of(packed.x.index_select(0, tokens.to(packed.x.device, non_blocking=True)), counts)
        pooled = segment_pool(cells.x, cells.cu_seqlens, "mean", lengths=cells.lengths)
        place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in self.out))
        per_video = len(place)
        return Packed.of(pooled, [per_video] * len(packed), pos=place.repeat(len(packed), 1).to(pooled.device, non_blocking=True))


class PyramidPool(nn.Module):
    """Each picture's tokens pooled to grids of several sizes, the tokens of one behind those of the other (ADEM-VL, arXiv:2410.17779).

    Args:
        sides: of the square grids.
    """

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        self.pools = nn.ModuleList(AdaptiveAveragePool((1, side, side)) for side in sides)
        self.places = sum(side**2 for side in sides)

    def forward(self, tokens: Packed) -> Packed:
        """Tokens [T, C] of whole pictures, with ``pos``, in reading order -> [S * places, C]."""
        if tokens.pos is None:
            raise ValueError("PyramidPool: the tokens carry no positions (pos is None), which say the shape of each picture")
        last = [pos.amax(0) for pos in tokens.pos.split(tokens.lengths.tolist())]
        sizes = torch.stack(last).long().cpu() + 1
        first, *others = (pool(tokens, sizes) for pool in self.pools)
        return first.join(*others)
