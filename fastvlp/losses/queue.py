"""Features of earlier batches: negatives for a loss, or nearest neighbours as positives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvlp_kernels import _check, _inputs


class NegativeQueue(nn.Module):
    """The last ``size`` features that were put in, first in first out (He et al. 2020, MoCo, arXiv:1911.05722).

    All is in buffers, and so in the state dict. Losses read it in place: enqueue after ``backward``. Across processes enqueue what
    :func:`gather_batch` gives, so that all hold the same.

    Attributes:
        features: [size, width]. log_weight: [size], 0 where a feature is, -inf where none was. position: int64, 0-d, the next place.

    Raises:
        ValueError: ``size`` or ``width`` is below 1. TypeError: ``dtype`` is not floating point.
    """

    features: Tensor
    log_weight: Tensor
    position: Tensor

    def __init__(self, size: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not (isinstance(size, int) and isinstance(width, int)) or size < 1 or width < 1:
            raise ValueError(f"NegativeQueue: size={size}, width={width}; both must be ints of at least 1")
        if not dtype.is_floating_point:
            raise TypeError(f"NegativeQueue: dtype={dtype}; it must be floating point: float32, bfloat16, float16 or float64")
        self.register_buffer("features", torch.zeros(size, width, dtype=dtype, device=device))
        # exp(-inf) = 0: places that were never filled count for nothing in a log-sum-exp, whose shapes stay the same.
        self.register_buffer("log_weight", torch.full((size,), -torch.inf, dtype=dtype, device=device))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Put ``features`` [B, D] in the place of the oldest; of more than ``size``, the last.

        Raises:
            ValueError: not a matrix of the queue's width. TypeError: not floating point.
        """
        self._check(features)
        size = len(self.features)
        # An index twice would leave open which of the two stays.
        features = features[-size:].to(self.features.dtype)
        places = (self.position + torch.arange(len(features), device=features.device)) % size
        self.features.index_copy_(0, places, features)
        self.log_weight.index_fill_(0, places, 0.0)
        self.position.add_(len(features)).remainder_(size)

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """For each of ``features`` [M, D] the feature in the queue with the largest dot product, [M, D], same dtype, without gradient.

        DeCLIP's positives (Li et al. 2022, arXiv:2110.05208): ``contrastive_loss(image, queue.nearest(text), scale)``. An empty queue gives
        the features back.

        Raises:
            ValueError: not of the queue's width. TypeError: not floating point.
        """
        self._check(features)
        elements = 1 << (19 if features.device.type == "cpu" else 24)  # of a tile: one that caches hold, or one that fills a GPU
        with torch.autocast(features.device.type, enabled=False):
            found = [self._nearest(rows, max(1, elements // 512)) for rows in features.detach().split(512)]
        return torch.cat(found)

    def _nearest(self, rows: Tensor, columns: int) -> Tensor:
        wide = rows.to(_inputs.sum_dtype(rows.dtype))
        best, place = wide.new_full((len(rows),), -torch.inf), torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for start in range(0, len(self.features), columns):
            part = slice(start, start + columns)
            highest, where = (wide @ self.features[part].to(wide.dtype).T + self.log_weight[part].to(wide.dtype)).max(1)
            place = torch.where(highest > best, where + start, place)
            best = torch.maximum(highest, best)
        return torch.where(best[:, None] == -torch.inf, rows, self.features[place].to(rows.dtype))

    def _check(self, features: Tensor) -> None:
        _check.plain_tensors("NegativeQueue", 2, queue=self.features, features=features)
        width = self.features.shape[1]
        if features.ndim != 2 or features.shape[1] != width or len(features) == 0:
            raise ValueError(f"NegativeQueue: features have shape {tuple(features.shape)}; they must be a matrix [B, {width}] with B >= 1")
        if not features.is_floating_point():
            raise TypeError(f"NegativeQueue: features are {features.dtype}; they must be floating point")

    def extra_repr(self) -> str:
        size, width = self.features.shape
        return f"size={size}, width={width}"
