"""The packed layout: to and from padded tensors and lists, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels.packed import Packed

some_lengths = st.lists(st.integers(0, 6), max_size=8)


def features(total: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(total, 3, dtype=dtype, generator=torch.Generator().manual_seed(total))


@given(some_lengths, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_padding_and_back_is_the_identity_and_keeps_gradients_in_place(lengths, more):
    x = features(sum(lengths)).requires_grad_()
    packed = Packed.of(x, lengths)
    padded, mask = packed.to_padded(value=7.0, width=packed.max_seqlen + more)
    assert padded.shape == (len(lengths), packed.max_seqlen + more, 3) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == lengths and (padded[~mask] == 7).all()
    torch.testing.assert_close(padded[mask], x)
    weight = torch.randn_like(padded)
    (gradient,) = torch.autograd.grad((padded * weight).sum(), x)
    torch.testing.assert_close(gradient, weight[mask])
    for again in (Packed.from_padded(padded, lengths), Packed.from_padded(padded, mask), Packed.from_padded(padded, mask=mask)):
        torch.testing.assert_close(again.x, x)
        assert again.lengths.tolist() == lengths and again.cu_seqlens.tolist() == packed.cu_seqlens.tolist()
    leaf = padded.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(Packed.from_padded(leaf, lengths).x.sum(), leaf)
    torch.testing.assert_close(gradient, mask[..., None].expand_as(leaf).double())


@given(some_lengths.filter(bool))
@settings(max_examples=40, deadline=None)
def test_a_list_of_segments_and_back(lengths):
    pieces = [features(n) for n in lengths]
    packed = Packed.from_list(pieces, pos=[torch.full((n, 3), i, dtype=torch.int32) for i, n in enumerate(lengths)])
    assert len(packed) == len(lengths) and packed.total == sum(lengths) and packed.max_seqlen == max(lengths)
    assert packed.pos is not None and packed.pos[:, 0].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    for ours, theirs in zip(packed.segments(), pieces, strict=True):
        assert torch.equal(ours, theirs)


def test_the_fields():
    packed = Packed.of(torch.arange(5), torch.tensor([2, 0, 3], dtype=torch.int32), size=torch.ones(5))
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packed.lengths.dtype == torch.int64 and packed.lengths.device.type == "cpu"
    assert (packed.total, packed.max_seqlen, len(packed)) == (5, 3, 3)
    empty = Packed.of(torch.zeros(0, 4), [])
    assert (empty.total, empty.max_seqlen, len(empty), empty.segments()) == (0, 0, 0, [])
    assert empty.to_padded()[0].shape == (0, 0, 4)


def test_a_mask_may_keep_any_tokens_of_a_row():
    x = torch.arange(6.0).view(2, 3, 1)
    packed = Packed.from_padded(x, mask=torch.tensor([[True, False, True], [False, True, False]]))
    assert packed.x.flatten().tolist() == [0, 2, 4] and packed.lengths.tolist() == [2, 1]


def test_without_padding_nothing_is_copied():
    x = torch.randn(4, 5, 3)
    packed = Packed.from_padded(x)
    assert packed.x.data_ptr() == x.data_ptr()
    assert packed.to_padded()[0].data_ptr() == x.data_ptr()
    assert Packed.from_padded(x, [5] * 4).x.data_ptr() == x.data_ptr()


def test_replace_and_to():
    packed = Packed.of(torch.zeros(5, 2), [2, 3], size=torch.ones(5), pos=torch.zeros(5, 3, dtype=torch.int32))
    other = packed.replace(x=torch.ones(5, 7), size=None)
    assert other.x.shape == (5, 7) and other.size is None and other.cu_seqlens is packed.cu_seqlens
    moved = packed.to("meta")
    assert {t.device.type for t in (moved.x, moved.cu_seqlens, moved.size, moved.pos)} == {"meta"} and moved.lengths.device.type == "cpu"
    assert packed.to("meta").to_padded()[0].shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Packed.of(torch.zeros(4, 2), [2, 3]), r"the lengths sum to 5, x has shape \(4, 2\)"),
        (lambda: Packed.of(torch.zeros(4, 2), [5, -1]), "segment 1 has length -1"),
        (lambda: Packed.of(torch.zeros(4, 2), torch.tensor([4.0])), "they must be integers"),
        (lambda: Packed.of(torch.zeros(4, 2), [1.9, 2.9]), "they must be integers"),
        (lambda: Packed.of(torch.zeros(4, 2), [4], size=torch.ones(3)), r"size has shape \(3,\); with 4 tokens it must be \(4,\)"),
        (lambda: Packed.of(torch.zeros(4, 2), [4], pos=torch.ones(4, 2)), r"pos has shape \(4, 2\); with 4 tokens it must be \(4, 3\)"),
        (lambda: Packed.from_list([]), "pass at least one"),
        (lambda: Packed.from_list([torch.zeros(2, 3), torch.zeros(2, 4)]), r"segments\[1\] is .* of shape \(2, 4\) and segments"),
        (lambda: Packed.from_list([torch.zeros(2, 3), torch.zeros(2, 3).half()]), r"segments\[1\] is torch.float16.*alike but for n"),
        (lambda: Packed.from_list([torch.tensor(1.0), torch.tensor(2.0)]), r"segments\[0\] is torch.float32 of shape \(\)"),
        (lambda: Packed.from_padded(torch.zeros(2, 3), [1, 4]), r"lengths \[1, 4\].*allowed: 2 of 0 to 3"),
        (lambda: Packed.from_padded(torch.zeros(2, 3), [1]), "allowed: 2 of 0 to 3"),
        (lambda: Packed.from_padded(torch.zeros(3)), r"it must be \[B, N, ...\]"),
        (lambda: Packed.from_padded(torch.zeros(2, 3), mask=torch.ones(2, 2, dtype=torch.bool)), r"it must be torch.bool \(2, 3\)"),
        (lambda: Packed.from_padded(torch.zeros(2, 3), [1, 1], torch.ones(2, 3, dtype=torch.bool)), "pass one of them"),
        (lambda: Packed.of(torch.zeros(4), [4]).to_padded(width=3), "width 3 is less than the longest segment, 4"),
        (lambda: Packed.of(torch.zeros(4), [4]).replace(x=torch.zeros(5)), "x has 5 rows; these segments have 4 tokens"),
        (lambda: Packed.of(torch.zeros(4), [4]).replace(lengths=torch.tensor([4])), "cannot change lengths"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_compiles_in_one_graph():
    packed = Packed.of(torch.randn(5, 2), [2, 3])
    compiled = torch.compile(lambda x: Packed.to_padded(packed.replace(x=x))[0].sum(1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(packed.x), torch.stack([s.sum(0) for s in packed.segments()]))
