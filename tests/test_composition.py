"""Ragged images packed, tokens dropped, merged twice with proportional attention between, pooled: one loop over images says the same."""

import pytest
import torch

from fastvlp.layers import AttentionPool, PackedAttention, TokenMerger
from fastvlp_kernels import Packed, packed_attention, segment_pool, token_select
from tests.matching import merged_rows

LENGTHS, WIDTH, HEADS = (13, 1, 20, 6, 9), 8, 2


def attended(x, size, layer):
    q, k, v = layer.qkv(x).view(len(x), 3, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
    weight = torch.exp(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5) * size
    return layer.proj((weight / weight.sum(-1, keepdim=True) @ v).transpose(0, 1).reshape(len(x), WIDTH))


def loop(images, scores, first, second, pool):
    rows = []
    for x, score in zip(images, scores, strict=True):
        kept = sorted(sorted(range(len(x)), key=lambda i, score=score: -float(score[i]))[: int(0.7 * len(x))])
        x = x[kept]
        size = torch.ones(len(x), dtype=x.dtype)
        for layer, share in ((first, 0.3), (second, 0.25)):
            x = x + attended(x, size, layer)
            parts = merged_rows(x.detach(), share)
            x = torch.stack([(x[part] * size[part, None]).sum(0) / size[part].sum() for part in parts]) if parts else x
            size = torch.stack([size[part].sum() for part in parts]) if parts else size
        mean = (x * size[:, None]).sum(0) / size.sum() if len(x) else x.new_zeros(WIDTH)
        q = pool.q(pool.query).view(1, HEADS, -1).transpose(0, 1)
        k, v = pool.kv(x).view(len(x), 2, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
        weight = torch.exp(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5) * size
        out = weight / weight.sum(-1, keepdim=True) @ v
        rows.append(torch.cat((mean, pool.proj(out.transpose(0, 1).reshape(WIDTH)))))
    return torch.stack(rows)


def composed(x, scores, first, second, pool):
    packed = Packed.of(x, LENGTHS)
    packed = token_select(scores, packed.cu_seqlens, 0.7, lengths=packed.lengths).apply(packed)
    for layer, share in ((first, 0.3), (second, 0.25)):
        packed = packed.replace(x=packed.x + layer(packed).x)
        packed = TokenMerger(share)(packed)
    mean = segment_pool(packed.x, packed.cu_seqlens, "mean", packed.size, lengths=packed.lengths)
    return torch.cat((mean, pool(packed)), 1)


@pytest.mark.parametrize("seed", range(3))
def test_pack_drop_merge_attend_pool_equals_a_loop_over_images(seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(len(x))
    layers = [PackedAttention(WIDTH, HEADS).double(), PackedAttention(WIDTH, HEADS).double(), AttentionPool(WIDTH, HEADS).double()]
    leaves = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    found, expected = composed(x, scores, *layers), loop(x.split(LENGTHS), scores.split(LENGTHS), *layers)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_mass_of_attention_selects_tokens():
    """PyramidDrop and FastV: keep the tokens that one layer's attention looks at most, then attend to those alone."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(LENGTHS), HEADS, 4, dtype=torch.float64)
    packed = Packed.of(torch.randn(sum(LENGTHS), WIDTH), LENGTHS)
    _, mass = packed_attention(q, k, v, packed.cu_seqlens, lengths=packed.lengths, return_key_mass=True)
    selection = token_select(mass, packed.cu_seqlens, 0.5, lengths=packed.lengths, protected=1)
    start, expected = 0, []
    for n in LENGTHS:
        rows = slice(start, start + n)
        scores = torch.einsum("nhd,mhd->hnm", q[rows], k[rows]) / 2
        looked_at = scores.softmax(-1).sum((0, 1))
        others = sorted(range(1, n), key=lambda i, looked_at=looked_at: -float(looked_at[i]))
        expected += [start + i for i in sorted([0, *others[: max(1, n // 2) - 1]])]
        start += n
    assert selection.index.tolist() == expected
    assert torch.equal(selection.apply(packed).x, packed.x[expected])
