"""How the tests of losses compare a function with its formula over whole matrices. ``dense(tensors, options, dtype)``: products of operands
in the dtype of the features, everything else in ``dtype``."""

import torch
from objectives import differentiated

from fastvlp_kernels._testing import assert_no_worse_than


def assert_exact(ours, dense, tensors, options, rtol=1e-8):
    """In float64: the value and all gradients. Returns what is exact."""
    exact, found = differentiated(dense, tensors, options, torch.float64), differentiated(ours, tensors, options)
    assert set(found) == set(exact)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-2 * rtol * value.abs().max().item(), msg=name)
    return exact


def assert_rounded_like_eager(ours, dense, tensors, options, tol):
    """In the dtype of ``tensors``: no worse than eager PyTorch, within ``tol``."""
    exact = differentiated(dense, {name: tensor.double() for name, tensor in tensors.items()}, options, torch.float64)
    eager, found = differentiated(dense, tensors, options, torch.float32), differentiated(ours, tensors, options)
    for name, value in exact.items():
        assert found[name].dtype == (torch.float32 if name == "loss" else tensors[name].dtype)
        assert_no_worse_than(found[name], eager[name], value, tol, name)
