"""PatchDropout, TokenMerger, PackedAttention and AttentionPool against plain mathematics and against timm."""

import pytest
import torch
from torch.nn import functional as F

from fastvlp.layers import (
    AttentionPool,
    LearnedCentres,
    PackedAttention,
    PatchDropout,
    PatchDropoutWithIndices,
    TemporalContext,
    TokenLearner,
    TokenMerger,
    segment_mean,
)  # fmt: skip
from fastvlp_kernels import Packed


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("prob", [0.0, 0.3, 0.99])
def test_patch_dropout_keeps_random_tokens_after_the_prefix(ordered, prefix, prob):
    x = torch.randn(5, prefix + 11, 3, requires_grad=True)
    layer = PatchDropoutWithIndices(prob, prefix, ordered)
    torch.manual_seed(0)
    kept, index = layer(x)
    if prob == 0:
        assert kept is x and index is None
        return
    number = max(1, int(11 * (1 - prob)))
    assert kept.shape == (5, prefix + number, 3) and index.shape == (5, number)
    for row in range(5):
        assert len(set(index[row].tolist())) == number and (not ordered or index[row].tolist() == sorted(index[row].tolist()))
        assert torch.equal(kept[row], torch.cat((x[row, :prefix], x[row, prefix:][index[row]])))
    assert len({tuple(sorted(row)) for row in index.tolist()}) > 1
    upstream = torch.randn_like(kept)
    expected = torch.zeros_like(x)
    expected[:, :prefix] = upstream[:, :prefix]
    expected[:, prefix:] = torch.zeros(5, 11, 3).scatter(1, index[..., None].expand(-1, -1, 3), upstream[:, prefix:])
    assert torch.equal(torch.autograd.grad(kept, x, upstream)[0], expected)
    torch.manual_seed(0)
    assert torch.equal(PatchDropout(prob, prefix, ordered)(x), kept)
    assert layer.eval()(x) == (x, None)


def test_patch_dropout_drops_every_token_equally_often():
    index = PatchDropoutWithIndices(0.5, 0, ordered=True)(torch.zeros(4000, 8, 1))[1]
    share = torch.bincount(index.flatten(), minlength=8) / 4000
    assert (share - 0.5).abs().max() < 0.05  # six standard deviations


def test_patch_dropout_takes_timms_arguments():
    with pytest.raises(ValueError, match="prob is 1.0"):
        PatchDropout(1.0)
    layer = PatchDropout()
    assert (layer.prob, layer.num_prefix_tokens, layer.ordered) == (0.5, 1, False)
    compiled = torch.compile(PatchDropout(0.5, 1, ordered=True), backend="aot_eager", fullgraph=True)
    assert compiled(torch.randn(2, 9, 4)).shape == (2, 5, 4)


def test_token_merger_dense_and_packed_agree():
    x, metric = torch.randn(3, 9, 4), torch.randn(3, 9, 6)
    size = torch.randint(1, 5, (3, 9)).float()
    for r in (3, 0.25, 0):
        layer = TokenMerger(r, protected=1)
        merged, sizes = layer(x, metric, size)
        packed = layer(Packed.from_padded(x).replace(size=size.flatten()), metric.flatten(0, 1))
        number = r if isinstance(r, int) else int(9 * r)
        assert merged.shape == (3, 9 - number, 4) and packed.lengths.tolist() == [9 - number] * 3
        assert torch.equal(merged.flatten(0, 1), packed.x) and torch.equal(sizes.flatten(), packed.size)
        assert torch.equal(merged[:, 0], x[:, 0])
        torch.testing.assert_close((merged * sizes[..., None]).sum(1), (x * size[..., None]).sum(1))
    with pytest.raises(ValueError, match="another number in every row"):
        TokenMerger(threshold=0.5)(x)
    with pytest.raises(ValueError, match="metric has shape"):
        TokenMerger(1)(x, torch.randn(2 * x.shape[0], x.shape[1] // 2, 3))
    with pytest.raises(ValueError, match=r"it must be Packed or a tensor \[B, N, C\]"):
        TokenMerger(1)(x[0])


def test_token_merger_by_threshold_and_by_itself():
    """Without a metric, equal tokens are the most similar ones: merging them changes no token."""
    x = torch.randn(6, 5)[[0, 0, 1, 2, 3, 3, 4, 5]]
    packed = TokenMerger(threshold=0.9999)(Packed.of(x, [4, 4]))
    assert packed.lengths.tolist()[:2] == [3, 3]
    torch.testing.assert_close(packed.x[:6], x[[1, 2, 3, 5, 6, 7]])
    assert packed.size[:6].tolist() == [2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_layer(causal):
    layer = PackedAttention(12, 3, causal=causal).double()
    packed = Packed.of(torch.randn(9, 12, dtype=torch.float64), [4, 0, 5], size=torch.randint(1, 4, (9,)).float())
    expected = []
    for x, size in zip(packed.segments(), packed.size.split([4, 0, 5]), strict=True):
        q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).view(len(x), 3, 3, 4).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / 2 + size.double().log()
        if causal:
            scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -torch.inf)
        expected.append(layer.proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), 12)))
    torch.testing.assert_close(layer(packed).x, torch.cat(expected))
    assert sorted(layer.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]
    for heads in (3, 0):
        with pytest.raises(ValueError, match="the heads must divide"):
            PackedAttention(10, heads)


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_pool(queries):
    layer = AttentionPool(12, 3, queries).double()
    packed = Packed.of(torch.randn(9, 12, dtype=torch.float64), [4, 2, 3], size=torch.randint(1, 4, (9,)).float())
    expected = []
    for x, size in zip(packed.segments(), packed.size.split([4, 2, 3]), strict=True):
        q = layer.q(layer.query).view(queries, 3, 4).transpose(0, 1)
        k, v = layer.kv(x).view(len(x), 2, 3, 4).permute(1, 2, 0, 3)
        attended = (q @ k.transpose(1, 2) / 2 + size.double().log()).softmax(-1) @ v
        expected.append(layer.proj(attended.transpose(0, 1).reshape(queries, 12)))
    found = layer(packed)
    torch.testing.assert_close(found, torch.cat(expected) if queries == 1 else torch.stack(expected))
    for heads in (3, 0):
        with pytest.raises(ValueError, match="the heads must divide"):
            AttentionPool(10, heads)


@pytest.mark.parametrize(
    "call", [PackedAttention(4, 2), AttentionPool(4, 2), TokenLearner(4, 2), LearnedCentres(4, 2, 2), TemporalContext(4), segment_mean]
)
def test_a_tensor_where_packed_is_needed_is_refused(call):
    with pytest.raises(TypeError, match=r"packed is Tensor; it must be Packed: make one with Packed.of\(tokens, lengths\)"):
        call(torch.zeros(6, 4))


@pytest.mark.parametrize(
    "layer", [PackedAttention(4, 2), AttentionPool(4, 2), TokenLearner(4, 2), LearnedCentres(4, 2, 2), TemporalContext(4)]
)
def test_tokens_of_another_width_are_refused(layer):
    for shape in ((6, 8), (6, 1, 4), (6,)):
        with pytest.raises(ValueError) as caught:
            layer(Packed.of(torch.zeros(shape), [6], pos=torch.zeros(6, 3, dtype=torch.int32)))
        assert str(caught.value) == f"{type(layer).__name__}: the tokens of packed have shape {shape}; this layer was made for [T, 4]"
