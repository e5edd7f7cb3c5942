"""q_shift against shifted pictures, and on dropped tokens against a search."""

import pytest
import torch

from fastvlp.layers import neighbours, previous_and_next, q_shift, shift
from fastvlp_kernels import Packed, token_select


def packed(grids, C=9, frames=1):
    """One segment per grid, each with a register token in front."""
    parts, places = [], []
    for m, n in grids:
        patches = torch.cartesian_prod(*(torch.arange(size) for size in (frames, m, n))).view(-1, 3)
        pos = torch.cat([torch.tensor([[0, -1, -1]]), patches])
        places.append(pos.int())
        parts.append(torch.randn(len(pos), C, dtype=torch.float64))
    return Packed.from_list(parts, places)


def pictures(x, m, n):
    """[m n, C] as Vision-RWKV shifts a picture."""
    image, quarter = x.view(m, n, -1), x.shape[1] // 4
    out = torch.zeros_like(image)
    a, b, c, d = (slice(i * quarter, (i + 1) * quarter) for i in range(4))
    out[:, 1:, a], out[:, :-1, b] = image[:, :-1, a], image[:, 1:, b]
    out[1:, :, c], out[:-1, :, d] = image[:-1, :, c], image[1:, :, d]
    out[:, :, 4 * quarter :] = image[:, :, 4 * quarter :]
    return out.view(m * n, -1)


@pytest.mark.parametrize("C", [8, 9, 3])
def test_whole_pictures_are_shifted(C):
    grids = [(3, 4), (1, 1), (5, 2)]
    batch = packed(grids, C)
    ours = q_shift(batch.x, batch.pos, batch.cu_seqlens).split(batch.lengths.tolist())
    for (m, n), mine, x in zip(grids, ours, batch.segments(), strict=True):
        torch.testing.assert_close(mine[1:], pictures(x[1:], m, n), rtol=0, atol=0)
        assert not mine[0, : C // 4 * 4].any() and torch.equal(mine[0, C // 4 * 4 :], x[0, C // 4 * 4 :])


def test_every_head_is_quartered():
    batch = packed([(3, 4), (2, 2)], 16)
    ours = q_shift(batch.x, batch.pos, batch.cu_seqlens, heads=2)
    each = [q_shift(half.contiguous(), batch.pos, batch.cu_seqlens) for half in batch.x.chunk(2, 1)]
    assert torch.equal(ours, torch.cat(each, 1)) and not torch.equal(ours, q_shift(batch.x, batch.pos, batch.cu_seqlens))


def test_captions_are_shifted_both_ways():
    lengths = [0, 3, 1, 0, 4, 0]
    batch = Packed.of(torch.randn(8, 9, dtype=torch.float64), lengths)
    index = previous_and_next(batch.cu_seqlens, batch.total)
    assert index.tolist() == [[-1, 0, 1, -1, -1, 4, 5, 6], [1, 2, -1, -1, 5, 6, 7, -1]]
    for x, found in zip(batch.segments(), shift(batch.x, index, heads=3).split(lengths), strict=True):
        zero = x.new_zeros(1, 1)
        for head in range(0, 9, 3):  # a half is one channel; the third stays
            before, after = torch.cat([zero, x[:-1, [head]]])[:len(x)], torch.cat([x[1:, [head + 1]], zero])[:len(x)]
            assert torch.equal(found[:, head:head + 3], torch.cat([before, after, x[:, [head + 2]]], 1))
    assert previous_and_next(torch.zeros(1, dtype=torch.int32), 0).shape == (2, 0)
    with pytest.raises(ValueError, match="C a multiple of 2 heads"):
        shift(batch.x, index, heads=2)


def test_dropped_tokens_are_missing_and_frames_and_segments_apart():
    batch = packed([(4, 5), (3, 3), (2, 2)], frames=2)
    kept = token_select(torch.rand(batch.total), batch.cu_seqlens, 0.6, lengths=batch.lengths).apply(batch)
    index = neighbours(kept.pos, kept.cu_seqlens)
    segment = torch.arange(len(kept)).repeat_interleave(kept.lengths).tolist()
    places = {(s, *p): t for t, (s, p) in enumerate(zip(segment, kept.pos.tolist(), strict=True)) if p[1] >= 0}
    for t, (s, (f, r, c)) in enumerate(zip(segment, kept.pos.tolist(), strict=True)):
        around = [(s, f, r, c - 1), (s, f, r, c + 1), (s, f, r - 1, c), (s, f, r + 1, c)]
        assert index[:, t].tolist() == [places.get(place, -1) if r >= 0 else -1 for place in around]
    assert (index >= 0).any() and (index < 0).any()
    x = kept.x.requires_grad_()
    assert torch.equal(q_shift(x, kept.pos, kept.cu_seqlens), q_shift(x, kept.pos, kept.cu_seqlens, index))
    assert torch.autograd.gradcheck(lambda x: q_shift(x, kept.pos, kept.cu_seqlens, index), x, fast_mode=True)


def test_empty_and_wrong_inputs():
    nothing = torch.empty(0, 3, dtype=torch.int32)
    assert q_shift(torch.empty(0, 8), nothing, torch.zeros(1, dtype=torch.int32)).shape == (0, 8)
    with pytest.raises(ValueError, match=r"with 2 positions it must be \[2, C\]"):
        q_shift(torch.zeros(3, 8), torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"they must be \[T, 3\] and \[S \+ 1\]"):
        neighbours(torch.zeros(2, 2, dtype=torch.int32), torch.tensor([0, 2]))
