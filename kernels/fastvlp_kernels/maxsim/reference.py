"""MaxSim in plain PyTorch: every product is stored, one pair of segments after the other, autograd does the rest."""

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype


def maxsim(x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, mean: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_to_y and y_to_x [M, N], see ``op.maxsim``.

    ``dtype`` is what the features are rounded to; the rest is computed in float32, or in float64 for float64.
    """
    accumulate = sum_dtype(dtype)
    x, y = x.to(dtype).to(accumulate), y.to(dtype).to(accumulate)
    reduce = torch.mean if mean else torch.sum
    x_to_y, y_to_x = (x.new_zeros(len(cu_x) - 1, len(cu_y) - 1) + (x[:0].sum() + y[:0].sum()) for _ in range(2))
    x_starts, y_starts = cu_x.tolist(), cu_y.tolist()
    for m, (i, i_end) in enumerate(zip(x_starts, x_starts[1:], strict=False)):
        for n, (j, j_end) in enumerate(zip(y_starts, y_starts[1:], strict=False)):
            if i < i_end and j < j_end:
                products = x[i:i_end] @ y[j:j_end].T
                # The values that max returns with their places: among equals the first alone gets the gradient.
                x_to_y[m, n] += reduce(products.max(1).values)
                y_to_x[m, n] += reduce(products.max(0).values)
    return x_to_y, y_to_x
