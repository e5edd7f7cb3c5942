"""The Triton kernels of packed_attention for short segments: stacked in one tile, or with all their keys on chip; interpreted."""

import math

import pytest
import torch

from fastvlp_kernels.packed_attention import packed_attention
from tests.kernels.interpreter import interpreted
from tests.kernels.test_packed_attention import cu, randn
from tests.kernels.test_packed_attention_triton import compare

pytest.importorskip("triton", reason="Triton is not installed")

CAPTIONS = [5, 1, 0, 9, 0, 0, 3, 2, 24, 1, 7, 4, 2, 6, 3, 8, 1, 1, 2, 5, 12, 3, 4, 2, 2, 9]


def windows(lengths, longest) -> int:
    from fastvlp_kernels.packed_attention.triton import Side
    from fastvlp_kernels.packed_attention.triton_short import window

    side = Side(cu(lengths), sum(lengths), longest)
    return window(side, side)


def stacked_cases() -> None:
    torch.use_deterministic_algorithms(True)  # uninitialised memory is full of NaN
    for lengths, longest, apart in ((CAPTIONS, 24, 41), ([2] * 70, 2, 63), ([1] * 66, 1, 64), ([0, 4, 0] * 20, 5, 60)):
        assert windows(lengths, longest) == apart
        compare(lengths, longest=(longest, longest), dtype=torch.float16)
        compare(lengths, longest=(longest, longest), dtype=torch.bfloat16, causal=True, prefix=True, size=True, bias=2, kv_heads=1)
    compare(CAPTIONS, longest=(24, 24), dtype=torch.float16, causal=True, bias=1, width=24, value_width=72, heads=1, kv_heads=1)
    compare(CAPTIONS[:1] * 12, longest=(5, 5), dtype=torch.float16, size=True)
    for needed in (1, 2, -1, -2):
        compare([2] * 40, longest=(2, 2), dtype=torch.float16, leaves_needed=needed, bias=1)
    assert windows([16] * 40, 16) == 0 and windows([40] * 9, 40) == 0 and windows(CAPTIONS, None) == 0
    what_is_not_finite_stays_in_its_segment()
    too_long_segments_are_nan()


def what_is_not_finite_stays_in_its_segment() -> None:
    """Other segments have the same bits as without it, in values and gradients."""
    starts = cu(CAPTIONS)
    segment = CAPTIONS.index(24)
    own = torch.zeros(sum(CAPTIONS), dtype=torch.bool)
    own[starts[segment] : starts[segment + 1]] = True

    def run(place, value):
        inputs = [randn(sum(CAPTIONS), 2, 16, seed=seed).half() for seed in range(4)]
        sizes, bias = torch.ones(sum(CAPTIONS)), torch.zeros(sum(CAPTIONS))
        (*inputs, sizes, bias)[place][starts[segment] + 3] = value
        *leaves, upstream = inputs
        leaves = [x.requires_grad_() for x in leaves]
        out = packed_attention(*leaves, starts, max_seqlen_q=24, key_size=sizes, key_bias=bias, causal=place % 2 == 1, impl="triton")
        return out, *torch.autograd.grad(out, leaves, upstream)

    for place in range(6):
        good = run(place, 1.0)
        for value in (math.nan, math.inf):
            bad = run(place, value)
            assert all(torch.equal(x[~own], y[~own]) for x, y in zip(good, bad, strict=True)), (place, value)
            if (place, value) != (5, math.inf):
                assert any(not x[own].isfinite().all() for x in bad), (place, value)


def write_sevens_into_new_tensors() -> None:
    make = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda *args, **options: make(*args, **options).fill_(7)


def too_long_segments_are_nan() -> None:
    write_sevens_into_new_tensors()
    lengths = [2] * 25 + [150] + [3] * 30
    long = slice(50, 200)
    leaves = [randn(sum(lengths), 2, 16, seed=seed).half().requires_grad_() for seed in range(3)]
    assert windows(lengths, 3) == 62
    results = []
    for options in ({"max_seqlen_q": 3, "impl": "triton"}, {"impl": "reference"}):
        for causal in (False, True):
            out = packed_attention(*leaves, cu(lengths), causal=causal, **options)
            results.append((out, *torch.autograd.grad(out[:50].sum() + out[200:].square().sum() + 0 * out.sum(), leaves)))
    for ours, exact in zip(results[:2], results[2:], strict=True):
        for mine, true in zip(ours, exact, strict=True):
            assert mine[long].isnan().all()
            for rest in (slice(50), slice(200, None)):
                torch.testing.assert_close(mine[rest], true[rest], rtol=1e-2, atol=1e-2)


def resident_cases() -> None:
    """129 to 256 keys in two or three tiles, one or several tiles of queries per program."""
    from fastvlp_kernels.packed_attention import triton_short

    torch.use_deterministic_algorithms(True)
    for programs in (1, 512):
        triton_short.PROGRAMS = programs
        compare([197, 0, 180], longest=(197, 197), dtype=torch.float16, heads=1, kv_heads=1)
        compare([150, 131], longest=(150, 150), dtype=torch.bfloat16, size=True, bias=2, heads=1, kv_heads=1)
        compare([90, 3], longest=(90, 90), dtype=torch.float16, causal=True, prefix=True, heads=2, kv_heads=1)
    compare([70, 1], [130, 190], (70, 190), dtype=torch.float16, bias=1)
    compare([5, 1], [200, 240], (5, 240), dtype=torch.bfloat16)
    compare([3, 2], [100, 90], (3, 100), dtype=torch.bfloat16, width=72, value_width=80, heads=1, kv_heads=1)
    # Longest lengths that are too small: what no program holds has NaN.
    write_sevens_into_new_tensors()
    q, k = randn(4, 1, 16).half().requires_grad_(), randn(360, 1, 16, seed=1).half().requires_grad_()
    for longest in (200, 100):
        out = packed_attention(q, k, k, cu([2, 2]), cu([100, 260]), 2, longest, impl="triton")
        (gradient,) = torch.autograd.grad(out.sum(), k)
        exact = packed_attention(q, k, k, cu([2, 2]), cu([100, 260]), impl="reference")
        torch.testing.assert_close(out[:2], exact[:2], rtol=1e-2, atol=1e-2)
        assert out[2:].isnan().all() and gradient[100:].isnan().all() and gradient[:100].isfinite().all()
    out = packed_attention(k, q, q, cu([100, 260]), cu([2, 2]), 60, 2, impl="triton")
    assert out[260:].isnan().all() and out.nan_to_num().ne(7).all()


def test_stacked_segments():
    interpreted(stacked_cases)


def test_resident_keys():
    interpreted(resident_cases)
