"""Pooling to unit features and gated cross attention, against loops in float64."""

import pytest
import torch

from fastvlp.layers import CrossAttention, Pool
from fastvlp_kernels.packed import Packed
from tests.towers import plain

LENGTHS = [3, 0, 1, 5]


def tokens(width=16):
    return Packed.of(torch.randn(9, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(), LENGTHS)


def attended(pool, x):
    """AttentionPool of one segment: its query reads the tokens."""
    k, v = plain.linear(pool.kv, x).chunk(2, -1)
    q = plain.linear(pool.q, pool.query)
    return plain.linear(pool.proj, plain.attention(pool.num_heads, q, k, v, torch.ones(1, len(x)).bool(), torch.ones(len(x)).double()))[0]


@pytest.mark.parametrize("mode", ["mean", "last", "first", "attention"])
def test_pool(mode):
    torch.manual_seed(0)
    pool, packed = Pool(16, 6, mode, heads=4).double(), tokens()
    of = {"mean": lambda x: x.mean(0), "last": lambda x: x[-1], "first": lambda x: x[0], "attention": lambda x: attended(pool.attention, x)}
    rows = []
    for segment in packed.segments():
        projected = of[mode](segment) @ pool.projection if len(segment) else torch.zeros(6, dtype=torch.float64)
        rows.append(projected / projected.norm().clamp_min(1e-12))
    plain.same(pool(packed), torch.stack(rows), [("x", packed.x), *pool.named_parameters()])
    nothing = pool(packed.take([1]))
    assert torch.equal(nothing, torch.zeros(1, 6, dtype=torch.float64)) and pool(packed.take([])).shape == (0, 6)
    assert pool.to("meta")(packed.to("meta")).shape == (4, 6)
    assert 0.8 < Pool(64, 256).projection.std() * 8 < 1.2


def test_the_mean_weighs_merged_tokens_and_others_refuse_them():
    packed, pool = tokens(), Pool(16, 6).double()
    sizes = torch.rand(9) + 0.5
    pairs = zip(packed.segments(), sizes.double().split(LENGTHS), strict=True)
    rows = [(x * w[:, None]).sum(0) / w.sum() if len(x) else x.sum(0) for x, w in pairs]
    torch.testing.assert_close(pool.pooled(packed.replace(size=sizes)), torch.stack(rows))
    with pytest.raises(ValueError, match="none is the last any more; use 'mean'"):
        Pool(16, 6, "last").double()(packed.replace(size=sizes))


@pytest.mark.parametrize("gated", [False, True])
def test_cross_attention(gated):
    torch.manual_seed(0)
    layer, x = CrossAttention(16, 2, source=12, depth=3, gated=gated).double(), tokens()
    y = Packed.of(torch.randn(8, 12, dtype=torch.float64).requires_grad_(), [2, 3, 0, 3])
    if gated:
        torch.testing.assert_close(layer(x, y).x, x.x)
        torch.nn.init.constant_(layer.gate, 0.4)
    rows = []
    for a, b in zip(x.segments(), y.segments(), strict=True):
        if len(b) == 0:  # nothing to read: the bias of the projection alone
            rows.append(a + layer.proj.bias * (torch.tanh(layer.gate) if gated else 1))
        elif len(a):
            rows.append(plain.cross(layer, a, b))
    plain.same(layer(x, y).x, torch.cat(rows), [("x", x.x), ("y", y.x), *layer.named_parameters()])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Pool(16, 6, "max"), "mode is 'max'; allowed: mean, last, first, attention"),
    (lambda: Pool(16, 6, "attention", heads=3), "the heads must divide"),
    (lambda: Pool(8, 6)(tokens()), r"tokens of tokens have shape \(9, 16\); this layer was made for \[T, 8\]"),
    (lambda: CrossAttention(16, 3), "the heads must divide the width"),
    (lambda: CrossAttention(16, 2).double()(tokens(), tokens().take([0])), r"x has 4 segments and y 1; as many are needed"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
