"""Ragged images embedded but for what is dropped, merged twice, proportional attention between, pooled: one loop says the same."""

import pytest
import torch

from fastvlp.layers import AttentionPool, PackedAttention, TokenMerger
from fastvlp_kernels import Packed, packed_attention, segment_pool, token_select
from tests.kernels.test_patch_embed import convolutions, embed, parameters, picture
from tests.matching import merged_rows

GRIDS, PATCH = torch.tensor([(3, 4), (1, 1), (4, 5), (2, 3), (3, 3)]), 2
LENGTHS, WIDTH, HEADS = tuple(GRIDS.prod(1).tolist()), 8, 2


def attended(x, size, layer):
    q, k, v = layer.qkv(x).view(len(x), 3, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
    weight = torch.exp(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5) * size
    return layer.proj((weight / weight.sum(-1, keepdim=True) @ v).transpose(0, 1).reshape(len(x), WIDTH))


def loop(pixels, embedding, rotary, scores, first, second, pool):
    rows = []
    images = convolutions(pixels, GRIDS * PATCH, embedding, PATCH, rotary=rotary).split(LENGTHS)
    for x, score in zip(images, scores.split(LENGTHS), strict=True):
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


def composed(pixels, embedding, rotary, scores, first, second, pool):
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    kept = token_select(scores, starts, 0.7, lengths=torch.tensor(LENGTHS))
    packed = embed(pixels, GRIDS * PATCH, embedding, PATCH, kept.index, rotary=rotary)
    for layer, share in ((first, 0.3), (second, 0.25)):
        packed = packed.replace(x=packed.x + layer(packed).x)
        packed = TokenMerger(share)(packed)
    mean = segment_pool(packed.x, packed.cu_seqlens, "mean", packed.size, lengths=packed.lengths)
    return torch.cat((mean, pool(packed)), 1)


@pytest.mark.parametrize(("positions", "rotary"), [("factorised", None), ("grid", None), ("none", 100.0), ("factorised", 10.0)])
def test_pack_drop_merge_attend_pool_equals_a_loop_over_images(positions, rotary):
    torch.manual_seed(0)
    embedding, scores = parameters(PATCH, WIDTH, positions), torch.rand(sum(LENGTHS))
    layers = [PackedAttention(WIDTH, HEADS).double(), PackedAttention(WIDTH, HEADS).double(), AttentionPool(WIDTH, HEADS).double()]
    leaves = [*embedding.values(), *(parameter for layer in layers for parameter in layer.parameters())]
    found, expected = (chain(picture(GRIDS * PATCH), embedding, rotary, scores, *layers) for chain in (composed, loop))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)), strict=True):
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
