"""Layers against plain mathematics."""

import torch

from fastvlp.layers import SquaredReLU, segment_mean
from fastvlp_kernels import Packed


def test_squared_relu_and_its_gradient():
    x = torch.tensor([-2.0, -0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    y = SquaredReLU()(x)
    assert y.tolist() == [0, 0, 0.25, 9]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1, 6]
    assert torch.autograd.gradcheck(SquaredReLU(), torch.randn(7, dtype=torch.float64, requires_grad=True))


def test_segment_mean_equals_a_loop_and_empty_segments_are_zero():
    x = torch.randn(9, 5, requires_grad=True)
    packed = Packed.of(x, [4, 0, 2, 3])
    pooled = segment_mean(packed)
    expected = torch.stack([s.mean(0) if len(s) else x.new_zeros(5) for s in packed.segments()])
    torch.testing.assert_close(pooled, expected)
    weight = torch.randn(4, 5)
    (got,) = torch.autograd.grad((pooled * weight).sum(), x)
    torch.testing.assert_close(got, (weight / torch.tensor([4, 1, 2, 3])[:, None]).repeat_interleave(packed.lengths, 0))
