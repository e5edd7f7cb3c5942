"""A linear layer of each type in plain PyTorch: one product for each, and a mask."""

from torch import Tensor

from .._inputs import sum_dtype


def grouped_linear(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, O], see ``op.grouped_linear``; sums in float32 (float64 for float64)."""
    acc = sum_dtype(x.dtype)
    out = x.new_zeros(x.shape[0], weight.shape[1], dtype=acc)
    for kind, matrix in enumerate(weight):
        product = x.to(acc) @ matrix.to(acc).T
        product = product if bias is None else product + bias[kind].to(acc)
        # Not a product with 0, which would let NaN and infinity of the other types through.
        out = out + product.masked_fill((types != kind)[:, None], 0)
    return out.to(x.dtype)
