"""Layers that reduce tokens: pooling, learned tokens, learned centres and merging along time and space, against loops in float64."""

import pytest
import torch
from torch.nn import functional as F

from fastvlp.layers import (
    AdaptiveAveragePool,
    LearnedCentres,
    ParameterFreeAttention,
    PyramidPool,
    TemporalContext,
    TokenLearner,
    VideoMerger,
)
from fastvlp_kernels import Packed

WIDTH = 12
GRIDS = [(4, 2, 3), (1, 3, 1), (5, 2, 2)]


def video(sizes: bool = False) -> Packed:
    """Videos of GRIDS, their tokens in the order of frames, rows, columns."""
    pos = torch.cat([torch.cartesian_prod(*(torch.arange(n) for n in grid)) for grid in GRIDS]).int()
    x = torch.randn(len(pos), WIDTH, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 4, (len(pos),)).float() if sizes else None
    return Packed.of(x, [t * h * w for t, h, w in GRIDS], size, pos)


def same(found, expected, leaves):
    """Equal values, and equal gradients of every leaf that either depends on."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)
    assert grads[1][0].abs().sum() > 0


@pytest.mark.parametrize("out", [(1, 1, 1), (2, 2, 2), (4, 1, 3), (6, 3, 2)], ids=str)
def test_adaptive_pooling_is_that_of_every_grid_alone(out):
    packed = video()
    found = AdaptiveAveragePool(out)(packed, torch.tensor(GRIDS))
    expected = [F.adaptive_avg_pool3d(x.view(*grid, WIDTH).permute(3, 0, 1, 2), out).permute(1, 2, 3, 0).reshape(-1, WIDTH)
                for x, grid in zip(packed.segments(), GRIDS, strict=True)]  # fmt: skip
    same(found.x, torch.cat(expected), [packed.x])
    cells = out[0] * out[1] * out[2]
    assert found.lengths.tolist() == [cells] * 3
    assert found.pos[:cells].tolist() == [[t, h, w] for t in range(out[0]) for h in range(out[1]) for w in range(out[2])]


def test_adaptive_pooling_refuses_other_grids():
    with pytest.raises(ValueError, match=r"sizes are .* whose product is its length"):
        AdaptiveAveragePool((1, 1, 1))(video(), torch.tensor([(4, 2, 2), *GRIDS[1:]]))
    with pytest.raises(ValueError, match="three positive numbers"):
        AdaptiveAveragePool((1, 0, 1))
    with pytest.raises(ValueError, match="PyramidPool: the tokens carry no positions"):
        PyramidPool((2, 1))(video().replace(pos=None))
    none = AdaptiveAveragePool((1, 2, 1))(Packed.of(torch.zeros(0, 3), []), torch.zeros(0, 3, dtype=torch.int64))
    assert none.total == len(none) == 0


@pytest.mark.parametrize("width", [12, 262], ids=["one part", "parts"])  # 262 = 2 * 131: wider than a kernel takes at once
@pytest.mark.parametrize("sizes", [False, True])
def test_token_learner(width, sizes):
    layer = TokenLearner(width, num_tokens=3, hidden=5).double()
    x = torch.randn(9, width, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 4, (9,)).float() if sizes else torch.ones(9)
    packed = Packed.of(x, [4, 0, 5], size if sizes else None)
    expected = []
    for tokens, weight in zip(packed.segments(), size.double().split([4, 0, 5]), strict=True):
        centred = tokens - tokens.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        scores = F.gelu(normed @ layer.mlp[0].weight.T + layer.mlp[0].bias) @ layer.mlp[2].weight.T + layer.mlp[2].bias
        weights = scores.exp() * weight[:, None]
        expected.append((weights / weights.sum(0)).T @ tokens if len(tokens) else tokens.new_zeros(3, width))
    same(layer(packed), torch.stack(expected), [x, *layer.mlp.parameters()])


@pytest.mark.parametrize("training", [False, True])
def test_learned_centres(training):
    torch.manual_seed(0)
    layer = LearnedCentres(WIDTH, num_centres=3, num_heads=2, depth=1).double().train(training)
    with torch.no_grad():
        layer.centres.mul_(50)  # so that the tokens go to different centres
    packed = video(sizes=True)
    torch.manual_seed(1)
    found, which = layer(packed)
    torch.manual_seed(1)
    noise = -torch.empty(3, packed.max_seqlen, 3, dtype=torch.float64).exponential_().log()
    look, expected, choices = layer.looks[0], [], []
    for x, size, gumbel in zip(packed.segments(), packed.size.double().split(packed.lengths.tolist()), noise, strict=True):
        both = look.norm_kv(torch.cat((layer.centres, x)))
        q = look.q(look.norm_q(layer.centres)).view(3, 2, 6).transpose(0, 1)
        k, v = look.kv(both).view(len(both), 2, 2, 6).permute(1, 2, 0, 3)
        seen = ((q @ k.transpose(1, 2) / 6**0.5).softmax(-1) @ v).transpose(0, 1).reshape(3, WIDTH)
        centres = layer.centres + look.proj(seen)
        centres = layer.norm_q(centres + look.mlp(look.norm_mlp(centres)))
        normed = layer.norm(x)
        logits = layer.norm_k(normed @ layer.k.weight.T) @ centres.T
        soft = (((logits + gumbel[: len(x)]) / 0.9) if training else logits).softmax(1)
        chosen = [int(row.argmax()) for row in soft]
        values, means = normed @ layer.v.weight.T, []
        for m in range(3):
            members = [i for i, choice in enumerate(chosen) if choice == m]
            # value: a plain mean of the members; gradient: that of the softmax where the hard choice stood
            weight = torch.stack([size[i] * (float(i in members) + soft[i, m] - soft[i, m].detach()) for i in range(len(x))])
            means.append((weight[:, None] * values).sum(0) / weight.sum().clamp_min(1))
        expected.append(layer.mlp(layer.norm_out(centres + torch.stack(means))))
        choices += chosen
    assert which.tolist() == choices and len(set(choices)) > 1
    same(found, torch.stack(expected), [packed.x, *layer.parameters()])


def test_the_noise_of_learned_centres_is_for_training():
    layer, packed = LearnedCentres(WIDTH, 4, 2), video()
    packed = packed.replace(x=packed.x.detach().float())
    assert not torch.equal(layer(packed)[0], layer(packed)[0])
    assert torch.equal(layer.eval()(packed)[0], layer(packed)[0])
    with pytest.raises(ValueError, match="the heads must divide"):
        LearnedCentres(10, num_heads=3)


def rows_of_merging(metric, r):
    """Which tokens each row is made of, the one that stayed first."""
    unit = metric / metric.norm(dim=1, keepdim=True)
    odd = range(1, len(metric), 2)
    best = {i: max(odd, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in range(0, len(metric), 2) if len(odd)}
    gone = sorted(best, key=lambda i: -float(unit[i] @ unit[best[i]]))[: int(r * len(metric)) if r < 1 else r]
    return [[i, *(j for j in gone if best[j] == i)] for i in range(len(metric)) if i not in gone]


def test_divided_merging_equals_loops_over_places_and_frames():
    """Tokens as lists of (position, value, size): merge those at one place along time, then those of one frame along space."""
    packed = video(sizes=True)
    found = VideoMerger("space", 0.4)(VideoMerger("time", 2)(packed))
    at, values, lengths = [], [], []
    for x, pos, size in zip(*(t.split(packed.lengths.tolist()) for t in (packed.x, packed.pos, packed.size.double())), strict=True):
        tokens = [(tuple(p), value, weight) for p, value, weight in zip(pos.tolist(), x, size, strict=True)]
        for shared, r in ((lambda p: p[1:], 2), (lambda p: p[:1], 0.4)):
            merged = []
            for key in sorted({shared(token[0]) for token in tokens}):
                group = sorted((token for token in tokens if shared(token[0]) == key), key=lambda token: token[0])
                for row in rows_of_merging(torch.stack([token[1].detach() for token in group]), r):
                    weight = torch.stack([group[i][2] for i in row])
                    mean = (torch.stack([group[i][1] for i in row]) * weight[:, None]).sum(0) / weight.sum()
                    merged.append((group[row[0]][0], mean, weight.sum()))
            tokens = merged
        at += [list(token[0]) for token in tokens]
        values += [token[1] for token in tokens]
        lengths.append(len(tokens))
    assert found.pos.tolist() == at and found.lengths.tolist() == lengths
    same(found.x, torch.stack(values), [packed.x])
    assert float(found.size.sum()) == float(packed.size.sum())


def test_video_merging_compares_the_metric_that_it_is_given():
    """By a metric in which neighbouring frames are equal in pairs, exactly those pairs merge."""
    packed = Packed.of(torch.randn(8, 3), [8], pos=torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(1)).int())
    metric = torch.eye(4)[torch.tensor([0, 0, 1, 1])].repeat_interleave(2, 0) + 0.01 * torch.eye(4)[[3] * 8]
    found = VideoMerger("time", 2)(packed, metric)
    x = packed.x.view(2, 2, 2, 3).mean(1)  # pairs of frames, places
    torch.testing.assert_close(found.x, x.transpose(0, 1).reshape(4, 3))
    assert found.size.tolist() == [2] * 4
    with pytest.raises(ValueError, match="must be 'time' or 'space'"):
        VideoMerger("colour", 1)
    with pytest.raises(ValueError, match="carry no positions"):
        VideoMerger("time", 1)(Packed.of(torch.zeros(2, 3), [2]))


@pytest.mark.parametrize("heads", [1, 3])
def test_temporal_context(heads):
    layer, packed = TemporalContext(WIDTH, heads).double(), video()
    wide, expected = WIDTH // heads, []
    for x, (t, h, w) in zip(packed.segments(), GRIDS, strict=True):
        frames = x.view(t, h * w, heads, wide)
        q, k = (x @ layer.qk.weight.T).view(t, h * w, 2, heads, wide).unbind(2)
        weights = (torch.einsum("tphd,uphd->phtu", q, k) / wide**0.5).softmax(-1)
        expected.append(x + torch.einsum("phtu,uphd->tphd", weights, frames).reshape(-1, WIDTH))
    same(layer(packed).x, torch.cat(expected), [packed.x, layer.qk.weight])
    shuffled = torch.randperm(packed.lengths[0])  # the order of tokens within a video is free
    one = Packed.of(packed.x[: len(shuffled)][shuffled], [len(shuffled)], pos=packed.pos[: len(shuffled)][shuffled])
    torch.testing.assert_close(layer(one).x, expected[0][shuffled])
    with pytest.raises(ValueError, match="the heads must divide"):
        TemporalContext(10, 3)


@pytest.mark.parametrize("drop", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("sizes", [False, True])
def test_parameter_free_attention(drop, sizes):
    texts = Packed.of(torch.randn(8, 5, dtype=torch.float64, requires_grad=True), [3, 0, 4, 1])
    images = Packed.of(torch.randn(13, 5, dtype=torch.float64, requires_grad=True), [6, 2, 5, 0])
    values = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 4, (13,)).float() if sizes else torch.ones(13)
    expected = []
    for x, k, v, weight in zip(texts.segments(), *(t.split([6, 2, 5, 0]) for t in (images.x, values, size.double())), strict=True):
        for token in x:
            scores = [(F.silu(token) * F.silu(key)).sum() for key in k]
            kept = sorted(range(len(k)), key=lambda j, scores=scores: float(scores[j]))[int(drop * len(k)) :]
            expected.append(sum((weight[j] * scores[j] * v[j] for j in kept), torch.zeros(5, dtype=torch.float64)))
    layer = ParameterFreeAttention(drop)
    same(layer(texts, images.replace(size=size) if sizes else images, values), torch.stack(expected), [texts.x, images.x, values])
    torch.testing.assert_close(layer(texts, images), layer(texts, images, images.x))


def test_parameter_free_attention_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="drop is 1"):
        ParameterFreeAttention(1)
    with pytest.raises(ValueError, match="got 1 texts and 2 pictures"):
        ParameterFreeAttention()(Packed.of(torch.zeros(2, 3), [2]), Packed.of(torch.zeros(2, 3), [1, 1]))
