"""What all operators have in common at their public door: views with strides, lengths that do not fit, derivatives that there are not."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from fastvlp_kernels import bi_wkv, maxsim, merge_plan, packed_attention, pairwise_sigmoid, patch_embed, segment_pool, token_select
from tests.kernels.interpreter import interpreted

CU = torch.tensor([0, 3, 4, 9, 12], dtype=torch.int32)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(12, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operators(impl: str | None, cu: torch.Tensor, dtype: torch.dtype, **options):
    """Every token operator as a function of a matrix [12, 8]."""
    heads, decay, u = rows(1, 8, seed=1).to(dtype), rows(1, 8, seed=2).to(dtype), rows(8, seed=3)[:1].to(dtype)
    y = rows(8, seed=4).to(dtype)
    prefix = torch.arange(2 * (len(cu) - 1))[::2]
    return {
        "segment_pool": lambda x: segment_pool(x, cu, impl=impl, **options),
        "segment_pool max": lambda x: segment_pool(x, cu, "max", impl=impl, **options),
        "packed_attention": lambda x: packed_attention(x[:, None], heads, heads, cu, causal=True, prefix_len=prefix, impl=impl, **options),
        "bi_wkv": lambda x: bi_wkv(x[:, None], heads, heads, decay, u, cu, impl=impl, **options),
        "maxsim": lambda x: maxsim(x, cu, y, CU, impl=impl)[0],
    }


def strided_views() -> None:
    """Two frames to a clip: cu_seqlens[::2]."""
    view = CU[::2]
    for dense, strided in ((view.contiguous(), view), (view.long().contiguous(), CU.long()[::2])):
        for name in operators("triton", dense, torch.float32):
            want, got = (operators("triton", cu, torch.float32)[name](rows(8).float()) for cu in (dense, strided))
            assert torch.equal(got, want), name
        scores = rows(seed=5).float()
        plans = [merge_plan(rows(8).float(), cu, torch.tensor([1, 9, 2, 9])[::2], impl="triton") for cu in (dense, strided)]
        chosen = [token_select(scores, cu, torch.tensor([3, 9, 4, 9])[::2], impl="triton") for cu in (dense, strided)]
        assert torch.equal(plans[0].source, plans[1].source) and torch.equal(plans[0].order, plans[1].order)
        assert torch.equal(chosen[0].index, chosen[1].index)
    pixels, weight = torch.arange(4 * 12, dtype=torch.uint8), rows(12)[:8].float()
    keep, sizes = torch.tensor([0, 7, 2, 7])[::2], torch.tensor([[4, 9, 4, 9]])[:, ::2]
    images = [patch_embed(pixels, s, weight, patch_size=2, mean=0.5, std=0.5, keep=k, impl="triton").x
              for s, k in ((sizes, keep), (sizes.contiguous(), keep.contiguous()))]  # fmt: skip
    assert torch.equal(*images)
    # The host knows these lengths, whether it is told them or reads them.
    for ends in ([0, 3, 9], [0, 3, 13]):
        cu = torch.tensor(ends)
        for options in ({}, {"lengths": cu.diff()}):
            for name, call in operators("triton", cu, torch.float32, **options).items():
                if name != "maxsim":
                    with pytest.raises(ValueError, match="hold"):
                        call(rows(8).float())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_views_with_strides_and_lengths_that_do_not_end_at_the_last_row():
    interpreted(strided_views)


DIFFERENTIABLE = {
    **{name: (lambda impl, name=name: operators(impl, CU, torch.float64)[name]) for name in operators(None, CU, torch.float64)},
    "pairwise_sigmoid": lambda impl: lambda x: pairwise_sigmoid(x, rows(8, seed=4), 3.0, -1.0, impl=impl),
    "patch_embed": lambda impl: lambda x: patch_embed(
        torch.arange(2 * 12) / 24, torch.tensor([[2, 4]]), x.t(), patch_size=2, mean=0.5, std=0.5, impl=impl
    ).x,
    "MergePlan.merge": lambda impl: lambda x: merge_plan(rows(8), CU, 1, impl=impl).merge(x)[0],
}
GATHERS = {
    "MergePlan.unmerge": merge_plan(rows(8).repeat(2, 1), torch.tensor([0, 24]), 12).unmerge,
    "TokenSelection.take": token_select(rows(), CU, 2).take,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_right_or_refused(name):
    """PyTorch's custom operators would give a tangent of 0 without a word."""
    x, direction = rows(8, seed=6), rows(8, seed=7)
    operator = DIFFERENTIABLE[name](None)
    refused = f"{name.removesuffix(' max')}: forward-mode derivatives .* are not available; use impl='reference'"
    with pytest.raises(RuntimeError, match=refused):
        torch.func.jvp(operator, (x,), (direction,))
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=refused):
            operator(forward_ad.make_dual(leaf, direction))
    operator(x)
    _tangent_is_right(DIFFERENTIABLE[name]("reference"), x, direction)


@pytest.mark.parametrize("name", GATHERS)
def test_forward_mode_of_gathers(name):
    _tangent_is_right(GATHERS[name], rows(8, seed=6), rows(8, seed=7))


def _tangent_is_right(exact, x, direction) -> None:
    _, tangent = torch.func.jvp(exact, (x,), (direction,))
    torch.testing.assert_close(tangent, (exact(x + 1e-6 * direction) - exact(x - 1e-6 * direction)) / 2e-6, rtol=1e-5, atol=1e-7)


def sigmoid_of_vectors(x, y, **options):
    return pairwise_sigmoid(x, y, 5.0, row_bias=x[:, 0], col_weight=y[:, 0].sigmoid(), **options)


AUTOCAST = {
    "maxsim": lambda x, y: sum(s.sum() for s in maxsim(x, CU, y, CU, compute_dtype=torch.float32)),
    "pairwise_sigmoid": lambda x, y: sigmoid_of_vectors(x, y, compute_dtype=torch.float32),
    "bi_wkv": lambda x, y: bi_wkv(*(t[:, None] for t in (x, y, x, y)), x[:1], CU).square().sum(),
    "segment_pool": lambda x, y: segment_pool(x, CU, weight=y[:, 0].exp()).square().sum(),
    "merge_plan": lambda x, y: merge_plan(y.detach(), CU, 1).merge(x, y[:, 0].exp())[0].square().sum(),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_rounds_nothing_inside(name):
    """Operands in float32 stay so, forward and backward, also where backward runs inside the region."""
    x, y = (rows(8, seed=seed).float().requires_grad_() for seed in (6, 7))
    plain = AUTOCAST[name](x, y)
    want = torch.autograd.grad(plain, (x, y), allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = AUTOCAST[name](x, y)
        got = torch.autograd.grad(value, (x, y), allow_unused=True)
    torch.testing.assert_close((value, *got), (plain, *want), rtol=1e-6, atol=1e-6)


def test_maxsim_on_kernels_in_float32_under_autocast():
    interpreted(autocast_on_kernels)


def autocast_on_kernels() -> None:
    x, y = (rows(8, seed=seed).float().requires_grad_() for seed in (6, 7))
    with torch.autocast("cpu", torch.bfloat16):
        scores = maxsim(x, CU, y, CU, compute_dtype=torch.float32, impl="triton")[0]
        got = torch.autograd.grad(scores.sum(), (x, y))
    want = torch.autograd.grad(maxsim(x, CU, y, CU, impl="reference")[0].sum(), (x, y))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_causal_attention_with_a_scale_that_is_not_positive(scale):
    """PyTorch's fused attention for CPUs hides keys before it scales, which shows them again."""
    q, k, v = (rows(2, 8, seed=seed).float() for seed in range(3))
    want = packed_attention(q.double(), k.double(), v.double(), CU, causal=True, scale=scale, impl="reference")
    torch.testing.assert_close(packed_attention(q, k, v, CU, causal=True, scale=scale).double(), want, rtol=1e-5, atol=1e-5)


def test_counts_are_integers_and_shares_are_not():
    """NumPy's numbers are numbers; a whole share merges half of the tokens, as many as bipartite matching can, and keeps all."""
    cu = torch.tensor([0, 12])
    left = [merge_plan(rows(8), cu, r).total for r in (2, np.int64(2), 1, 1.0, np.float32(1.0), 0.5, 0.0, 0)]
    assert left == [10, 10, 11, 6, 6, 6, 12, 12]
    assert [len(token_select(rows(), cu, keep).index) for keep in (1, 1.0, np.int64(5), np.float64(0.5))] == [1, 12, 5, 6]
    with pytest.raises(TypeError, match="r is bool; it must be an int, a float or a tensor"):
        merge_plan(rows(8), cu, True)


def test_a_longest_length_may_be_a_tensor():
    """As in calls of flash-attn; under a compiler it says nothing, because nobody may ask it."""

    def attend(q, cu):
        longest = cu.diff().max()
        return packed_attention(q, q, q, cu, None, longest, longest)

    q = rows(2, 8).float()
    torch.testing.assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(q, CU), attend(q, CU))
