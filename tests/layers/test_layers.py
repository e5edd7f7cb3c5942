"""Layers against plain mathematics."""

import pytest
import torch

from fastvlp.layers import Block, SquaredReLU, packed_attend, segment_mean, transformer
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


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_a_block_in_fewer_passes_computes_the_same(activation, monkeypatch):
    """Sums with norms and biases with activations, as on GPUs; layers that somebody watches, or that are others, are called."""
    torch.manual_seed(0)
    block = Block(8, 2, 16, 3, activation).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    packed = Packed.of(torch.randn(9, 8, dtype=torch.float64, requires_grad=True), [4, 0, 5])
    leaves, calls = [packed.x, *block.parameters()], []

    def run():
        return torch.autograd.grad(block(packed.x, packed_attend(packed, causal=False)).square().sum(), leaves)

    expected = run()
    for name in ("residual_norm", "bias_activation"):
        real = getattr(transformer, name)
        monkeypatch.setattr(transformer, name, lambda *args, real=real, **options: calls.append(real) or real(*args, **options))
    monkeypatch.setattr(transformer, "FUSED_ON", ("cpu",))
    torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-11)
    assert len(calls) == 2
    watched = []
    for layer in (block.norm2, block.up):
        layer.register_forward_hook(lambda module, args, out: watched.append(module))
    torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-11)
    assert watched == [block.norm2, block.up] and len(calls) == (2 if activation == "gelu" else 3)
