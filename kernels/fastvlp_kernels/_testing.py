"""Checks for tests of operators, ours and users': errors relative to eager PyTorch, and tensors that must not exist."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root-mean-square and largest absolute error of ``actual``, each relative to the same norm of ``exact``."""
    exact = exact.detach().double()
    difference = actual.detach().double() - exact
    rms, largest = exact.square().mean().sqrt().item(), exact.abs().max().item()
    # Where the exact result is all zeros, errors count as they are.
    return difference.square().mean().sqrt().item() / (rms or 1.0), difference.abs().max().item() / (largest or 1.0)


def assert_no_worse_than(actual: Tensor, eager: Tensor, exact: Tensor, tol: float = 1e-6, name: str = "result") -> None:
    """Assert that ``actual`` is as close to ``exact`` as eager PyTorch in the same dtype is, within ``tol``.

    Args:
        actual: what is tested. eager: the same quantity by plain PyTorch in the same dtype. exact: the same in float64.
            One shape; infinities of ``exact`` must be found at the same places in ``actual``.
        tol: what is allowed beyond eager's error, relative to the norm of ``exact`` (root mean square, and maximum).

    Raises:
        AssertionError: with both errors and the place of the worst element.
    """
    assert actual.shape == eager.shape == exact.shape, f"{name}: shapes {actual.shape}, eager {eager.shape}, exact {exact.shape}"
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite].double()), f"{name}: wrong values where the exact result is not finite"
    if not finite.any():
        return
    ours, theirs = error(actual[finite], exact[finite]), error(eager[finite], exact[finite])
    if all(mine <= other + tol for mine, other in zip(ours, theirs, strict=True)):
        return
    worst = torch.where(finite, actual.double() - exact.double(), 0.0).abs().nan_to_num(nan=torch.inf).argmax().item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
    raise AssertionError(
        f"{name}: relative error rms {ours[0]:.3e}, max {ours[1]:.3e}; eager has {theirs[0]:.3e}, {theirs[1]:.3e}; "
        f"allowed beyond that {tol:.1e}; worst at {index}: {actual[index].item()!r} where {exact[index].item()!r} is exact "
        f"and eager gives {eager[index].item()!r}"
    )


class forbid_large_tensors(TorchDispatchMode):
    """Context in which an operation whose result has ``limit`` elements or more fails, also inside custom operators.

    Covers forward and backward. A view counts nothing. ``largest`` is the most that was seen.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastvlp":
            device = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            with self:
                return func.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper())), *args, **kwargs)
        result = func(*args, **kwargs)
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # What is written in place, or viewed, was counted when it was made.
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                elements = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
                self.largest = max(self.largest, elements)
                if elements >= self.limit:
                    shape = tuple(leaf.shape)
                    raise AssertionError(f"{func} made a tensor of shape {shape}: {elements} elements, the limit is {self.limit}")
        return result
