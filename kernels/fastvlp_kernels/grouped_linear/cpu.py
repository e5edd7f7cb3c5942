"""grouped_linear over tokens sorted by type, for any device: a product for each type, or PyTorch's grouped one on a GPU that has it."""

import torch
from torch import Tensor

from .._inputs import sum_dtype


def forward(x: Tensor, order: Tensor, starts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, O] in the dtype of x."""
    T = x.shape[0]
    # One gather puts the tokens of a type side by side, so that each type is one plain product.
    rows = x.index_select(0, order)
    if grouped(rows, weight):
        out = torch._grouped_mm(rows, weight.transpose(1, 2), offs=starts[1:])
        if bias is not None:
            # A token belongs to the first type that ends behind it; right=True passes over types without tokens.
            kinds = torch.searchsorted(starts[1:], torch.arange(T, device=x.device), right=True).clamp_max(len(weight) - 1)
            out = (out.to(sum_dtype(x.dtype)) + bias[kinds]).to(x.dtype)
    else:
        out = x.new_empty(T, weight.shape[1])
        for kind, part in _parts(starts):
            if bias is None:
                # out= puts the product where it belongs, without a copy of each type's rows.
                torch.mm(rows[part], weight[kind].T, out=out[part])
            else:
                torch.addmm(bias[kind].to(x.dtype), rows[part], weight[kind].T, out=out[part])
    # Nothing stays unwritten, since order is a permutation.
    return torch.empty_like(out).index_copy_(0, order, out)


def backward(
    grad: Tensor, x: Tensor, order: Tensor, starts: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and of the bias in the dtype of sums; [0] where ``needs`` says no."""
    g = grad.index_select(0, order)
    # Only the weight's gradient reads x; sorting it for the others would be a copy for nothing.
    rows = x.index_select(0, order) if needs[1] else x
    dx = x.new_empty(x.shape if needs[0] else (0,))
    # Zeros, since types without tokens are not visited below.
    dweight = weight.new_zeros(weight.shape if needs[1] else (0,))
    dbias = weight.new_zeros(weight.shape[:2] if needs[2] else (0,), dtype=sum_dtype(x.dtype))
    by_group = grouped(g, weight)
    if by_group and needs[0]:
        dx.index_copy_(0, order, torch._grouped_mm(g, weight, offs=starts[1:]))
    if by_group and needs[1]:
        dweight = torch._grouped_mm(g.T, rows, offs=starts[1:])
    if not by_group or needs[2]:
        for kind, part in _parts(starts):
            if needs[2]:
                torch.sum(g[part], 0, dtype=dbias.dtype, out=dbias[kind])
            if needs[1] and not by_group:
                torch.mm(g[part].T, rows[part], out=dweight[kind])
            if needs[0] and not by_group:
                dx.index_copy_(0, order[part], g[part] @ weight[kind])
    return dx, dweight, dbias


def grouped(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` computes this on the GPU: bfloat16 rows of whole 16 bytes, from compute capability 8.0 on."""
    wide = weight.shape[1] % 8 == weight.shape[2] % 8 == 0
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or not wide or not hasattr(torch, "_grouped_mm") or not len(rows):
        return False
    return torch.cuda.get_device_capability(rows.device) >= (8, 0)


def _parts(starts: Tensor) -> list[tuple[int, slice]]:
    """Each type that has tokens, and where they are."""
    # On a GPU this waits for the device: products are launched from the host, which has to know their sizes.
    ends = starts.tolist()
    return [(kind, slice(low, high)) for kind, (low, high) in enumerate(zip(ends, ends[1:], strict=False)) if low < high]
