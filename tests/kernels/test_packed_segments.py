"""Segments taken, joined, split and put after one another: what plain lists of segments say, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels.packed import Packed

some_lengths = st.lists(st.integers(0, 5), max_size=6)


def batch(lengths, seed=0, size=True):
    made = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    x = torch.randn(total, 3, dtype=torch.float64, generator=made).requires_grad_()
    pos = torch.randint(0, 9, (total, 3), dtype=torch.int32, generator=made)
    return Packed.of(x, lengths, torch.rand(total, generator=made) + 1 if size else None, pos)


def equal(found: Packed, x: list, size: list, pos: list, leaves: list):
    """``found`` has the segments of the lists, and the gradients of their concatenation."""
    expected = torch.cat([*x, leaves[0][:0]])
    assert found.lengths.tolist() == [len(segment) for segment in x]
    assert found.cu_seqlens.tolist() == [0, *torch.tensor([len(segment) for segment in x]).cumsum(0).tolist()]
    assert found.cu_seqlens.dtype == torch.int32 and found.lengths.dtype == torch.int64
    assert found.total == len(expected) and found.max_seqlen == max(map(len, x), default=0)
    assert torch.equal(found.x, expected)
    for ours, theirs in ((found.size, size), (found.pos, pos)):
        assert torch.equal(ours, torch.cat([*theirs, ours[:0]]))
    weight = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True, materialize_grads=True) for out in (found.x, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def lists(packed):
    lengths = packed.lengths.tolist()
    return [list(part.split(lengths)) for part in (packed.x, packed.size, packed.pos)]


@given(some_lengths, st.data())
@settings(max_examples=60, deadline=None)
def test_segments_by_number(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9)) if lengths else []
    packed = batch(lengths)
    for form in (rows, torch.tensor(rows, dtype=torch.int32)):
        equal(packed.take(form), *([part[row] for row in rows] for part in lists(packed)), [packed.x])
    n = data.draw(st.integers(0, 3))
    equal(packed.repeat(n), *([segment for segment in part for _ in range(n)] for part in lists(packed)), [packed.x])


@given(some_lengths, st.data())
@settings(max_examples=60, deadline=None)
def test_the_first_and_the_last_tokens(lengths, data):
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    packed, like = batch(lengths), batch(counts, seed=1)
    for form in (counts, torch.tensor(counts, dtype=torch.int64), like):
        equal(packed.first(form), *([s[:n] for s, n in zip(part, counts, strict=True)] for part in lists(packed)), [packed.x])
        equal(packed.last(form), *([s[len(s) - n:] for s, n in zip(part, counts, strict=True)] for part in lists(packed)), [packed.x])
    one = min(lengths, default=0)
    equal(packed.last(one), *([s[len(s) - one:] for s in part] for part in lists(packed)), [packed.x])


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_joining_and_splitting(lengths):
    parts = [batch([row[k] for row in lengths], seed=k) for k in range(3)]
    joined = parts[0].join(*parts[1:])
    whole = [[torch.cat(pieces) for pieces in zip(*column, strict=True)] for column in zip(*map(lists, parts), strict=True)]
    equal(joined, *whole, [part.x for part in parts])
    again = joined.split(parts[0], parts[1].lengths, parts[2].lengths.tolist())
    for part, found in zip(parts, again, strict=True):
        equal(found, *lists(part), [part.x])
    put = Packed.cat(parts)
    equal(put, *(sum(column, []) for column in zip(*map(lists, parts), strict=True)), [part.x for part in parts])


def test_what_only_some_carry():
    sized, bare = batch([2, 1]), batch([1, 2], seed=1, size=False)
    for found, size in ((sized.join(bare), [0, 1, None, 2, None, None]), (Packed.cat([sized, bare]), [0, 1, 2, None, None, None])):
        expected = torch.tensor([1.0 if row is None else float(sized.size[row]) for row in size])
        assert torch.equal(found.size, expected) and found.pos is not None
    assert sized.join(bare.replace(pos=None)).pos is None
    assert batch([1, 2], size=False).join(bare).size is None
    assert Packed.cat([sized]) is sized


def test_ids_are_taken_too_and_floating_dtypes_meet():
    ids = Packed.of(torch.arange(5), [2, 3])
    assert ids.take([1, 0, 1]).x.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert ids.replace(x=ids.x.bfloat16()).join(ids.replace(x=ids.x.float())).x.dtype == torch.float32  # as under autocast


def test_the_device_is_asked_nothing():
    """A meta tensor has no values that could be read."""
    packed = batch([2, 0, 3]).to("meta")
    other = packed.take([2, 1, 0])
    joined = packed.join(other)
    assert joined.lengths.tolist() == [5, 0, 5]
    for found in (joined, joined.split(packed, other)[1], joined.last([1, 0, 2]), packed.repeat(2), Packed.cat([packed] * 2)):
        assert {t.device.type for t in (found.x, found.cu_seqlens, found.size, found.pos)} == {"meta"}
        assert found.lengths.device.type == "cpu"


@pytest.mark.parametrize(("call", "message"), [
    (lambda p: p.take([0, 2]), r"rows go from 0 to 2; there are segments 0 to 1"),
    (lambda p: p.take([-1]), "rows go from -1 to -1"),
    (lambda p: p.take([True, False]), "they must be integers"),
    (lambda p: p.take(torch.tensor([0.5])), "they must be integers"),
    (lambda p: p.first(3), r"Packed.first: asked for \[3, 3\] tokens of segments of \[2, 3\]"),
    (lambda p: p.last([1]), "allowed: 0 to all of each"),
    (lambda p: p.last(-1), "lengths are 0 or more"),
    (lambda p: p.join(batch([1])), "got 2 segments and 1"),
    (lambda p: p.join(p.replace(x=torch.zeros(5, 4))), r"torch.float32 \(5, 4\); they must be alike"),
    (lambda p: p.join(p.replace(x=torch.zeros(5, 3, dtype=torch.int64))), "they must be alike but for their number"),
    (lambda p: p.split([1, 1], [1, 1]), r"the parts are \[1, 1\] \+ \[1, 1\]; together they must be the lengths, \[2, 3\]"),
    (lambda p: p.split([2]), "together they must be the lengths"),
    (lambda p: p.split(), "the parts are nothing"),
    (lambda p: Packed.cat([]), "pass at least one"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(batch([2, 3]))
