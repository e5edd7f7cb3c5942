"""packed_attention against a loop over segments in float64, written here, and against eager PyTorch's errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.packed_attention import cpu, packed_attention
from fastvlp_kernels.packed_attention.runs import plan


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# A query of type 0 sees types 0 and 2, one of type 1 types 0 and 1, one of type 2 nothing.
SEES = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])


def types_of(tokens):
    """int8 [tokens] in 0..2."""
    return (torch.arange(tokens) * 7 % 5 % 3).to(torch.int8)


def loop(q, k, v, lengths_q, lengths_k, size=None, bias=None, prefix=None, causal=False, scale=None, types=False):
    """Each query of each head by itself: sum_j w_j v_j / sum_j w_j over the keys it sees."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    mass = torch.zeros(k.shape[0], dtype=q.dtype)
    rows, first_q, first_k = [], 0, 0
    for s, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        for i in range(n):
            seen = [j for j in range(m) if not causal or j <= i + m - n or (prefix is not None and j < prefix[s])]
            if types:
                row = SEES[int(types_of(len(q))[first_q + i])]
                seen = [j for j in seen if row[int(types_of(len(k))[first_k + j])]]
            keys = torch.tensor([first_k + j for j in seen], dtype=torch.int64)
            for h in range(heads):
                if not seen:
                    rows.append(q.new_zeros(v.shape[2]))
                    continue
                logit = scale * (k[keys, h // group] @ q[first_q + i, h])
                if bias is not None:
                    logit = logit + (bias[keys] if bias.ndim == 1 else bias[h, keys])
                if size is not None:
                    logit = logit + size[keys].log()
                if torch.isneginf(logit).all():
                    rows.append(q.new_zeros(v.shape[2]))
                    continue
                p = torch.softmax(logit, 0)
                mass[keys] += p.detach()
                rows.append(p @ v[keys, h // group])
        first_q, first_k = first_q + n, first_k + m
    return torch.stack(rows).view(q.shape[0], heads, -1) if rows else q.new_zeros(q.shape[0], heads, v.shape[2]), mass


def compare(
    lengths_q, lengths_k=None, *, heads=2, kv_heads=2, width=5, value_width=5, impl=None,
    size=False, bias=0, prefix=False, causal=False, scale=None, types=False,
):
    """Value, mass and every gradient in float64 against the loop."""
    keys = lengths_q if lengths_k is None else lengths_k
    q = randn(sum(lengths_q), heads, width, seed=1).requires_grad_()
    k, v = (randn(sum(keys), kv_heads, w, seed=2 + w).requires_grad_() for w in (width, value_width))
    sizes = torch.randint(0, 4, (sum(keys),), generator=torch.Generator().manual_seed(4)).double() if size else None
    key_bias = randn(*((heads,) if bias == 2 else ()), sum(keys), seed=5).requires_grad_() if bias else None
    prefixes = torch.arange(1, 1 + 3 * len(lengths_q), 3) % 4 if prefix else None
    leaves = [q, k, v] + ([key_bias] if bias else [])
    weight = randn(sum(lengths_q), heads, value_width, seed=6)
    exact, exact_mass = loop(q, k, v, lengths_q, keys, sizes, key_bias, prefixes, causal, scale, types)
    zero = 0 * sum(leaf.sum() for leaf in leaves)  # so that every leaf has a gradient, 0 if nothing sees it
    arguments = (q, k, v, cu(lengths_q), None if lengths_k is None else cu(lengths_k))
    options = {"key_size": sizes, "key_bias": key_bias, "prefix_len": prefixes, "causal": causal, "scale": scale, "impl": impl}
    if types:
        options |= {"token_type": types_of(len(q)), "token_type_k": None if lengths_k is None else types_of(len(k)), "sees": SEES}
    ours, mass = packed_attention(*arguments, **options, return_key_mass=True)
    plain = packed_attention(*arguments, **options)
    torch.testing.assert_close(mass, exact_mass.to(mass.dtype), rtol=1e-5, atol=1e-5)
    assert not mass.requires_grad
    wanted = torch.autograd.grad((exact * weight).sum() + zero, leaves, retain_graph=True)
    for out in (ours, plain):
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad((out * weight).sum() + zero, leaves, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


BATCHES = {
    "one run": [3] * 4,
    "runs": [2, 2, 3, 5, 5],
    "mixed": [4, 1, 3, 1, 2],
    "empty segments": [0, 3, 0, 0, 2],
    "one token": [1],
    "nothing": [],
    "only empty": [0, 0],
}
VARIANTS = {
    "plain": {}, "causal": {"causal": True}, "prefix": {"causal": True, "prefix": True}, "sizes": {"size": True}, "bias": {"bias": 1},
    "head bias": {"bias": 2}, "all": {"causal": True, "prefix": True, "size": True, "bias": 2}, "scale": {"scale": 0.7, "causal": True},
    # which PyTorch's own attention makes NaN of: it hides before it scales
    "no scale": {"scale": 0.0, "causal": True}, "negative scale": {"scale": -0.5, "causal": True},
    "grouped heads": {"heads": 4, "kv_heads": 2}, "one key head": {"heads": 3, "kv_heads": 1, "bias": 2, "causal": True},
    "wide values": {"value_width": 7}, "types": {"types": True, "kv_heads": 1},
    "all and types": {"causal": True, "prefix": True, "size": True, "bias": 2, "types": True},
}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_equal_to_the_loop(batch, variant, impl):
    compare(BATCHES[batch], impl=impl, **VARIANTS[variant])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("variant", ["plain", "causal", "prefix", "sizes", "all", "one key head", "wide values", "types", "all and types"])
def test_cross_attention_equal_to_the_loop(variant, impl):
    for lengths_q, lengths_k in (([1, 1, 1], [4, 0, 2]), ([2, 5, 0, 2], [3, 2, 4, 3]), ([3, 3], [0, 0])):
        compare(lengths_q, lengths_k, impl=impl, **VARIANTS[variant])


lengths_of_both = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8)


@given(lengths_of_both, st.sampled_from(sorted(VARIANTS)), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_segments_equal_to_the_loop(pairs, variant, cross, tiny_cache):
    with pytest.MonkeyPatch.context() as patch:
        if tiny_cache:  # scores in pieces of a few segments, or a few rows
            patch.setitem(cpu.SCORES, "cpu", 24)
        compare([n for n, _ in pairs], [m for _, m in pairs] if cross else None, **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["plain", "causal", "all"])
def test_many_unsorted_segments_are_gathered_by_length(variant):
    lengths = [2, 4, 1, 3, 0] * 12
    assert plan(tuple(lengths), tuple(lengths))[1] is not None
    compare(lengths, **VARIANTS[variant])


def test_segments_that_lie_together_stay_in_place():
    runs, order = plan((4,) * 6 + (7,) * 2, (4,) * 6 + (7,) * 2)
    assert order is None and [(run.batch, run.n) for run in runs] == [(6, 4), (2, 7)]


@pytest.mark.parametrize("variant", [{}, {"causal": True}, {"key_size": torch.tensor([1.0, 2, 3, 1, 2])}, {"return_key_mass": True}])
def test_gradcheck(variant):
    q, k, v = (randn(5, 2, 3, seed=s).requires_grad_() for s in range(3))
    bias = randn(2, 5, seed=3).requires_grad_()

    def first(*args, **more):
        out = packed_attention(*args, cu([2, 3]), **variant, **more)
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(first, (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v, bias: first(q, k, v, key_bias=bias), (q, k, v, bias))


def eager(q, k, v, lengths, causal, size):
    """PyTorch's own attention, one segment after the other."""
    rows = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        mask = None if size is None else size[: len(ks)].log().to(q.dtype).expand(len(qs), len(ks))
        operands = (x.transpose(0, 1)[None] for x in (qs, ks, vs))
        rows.append(F.scaled_dot_product_attention(*operands, attn_mask=mask, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["plain", "causal", "sizes"])
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_errors_are_no_larger_than_eager_pytorch(dtype, variant, sharpness):
    lengths = [17, 17, 17, 40]
    size = torch.rand(40, generator=torch.Generator().manual_seed(9)).double() + 0.5 if variant == "sizes" else None
    inputs = [randn(91, 3, 64, seed=s) * (sharpness if s == 0 else 1) for s in range(3)]
    weight = randn(91, 3, 64, seed=3)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, weight.to(dtype))

    causal = variant == "causal"
    sizes = None if size is None else torch.cat([size[:n] for n in lengths]).float()
    ours = run(lambda *x: packed_attention(*x, cu(lengths), causal=causal, key_size=sizes), dtype)
    theirs = run(lambda *x: eager(*x, lengths, causal, size), dtype)
    rounded = [x.to(dtype).double() for x in inputs]
    inputs, weight = rounded, weight.to(dtype).double()
    exact = run(lambda *x: eager(*x, lengths, causal, size), torch.float64)
    for name, mine, other, true in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than(mine, other, true, tol=1e-6 if dtype == torch.float32 else 1e-3, name=name)


def test_equal_to_scaled_dot_product_attention_from_a_fused_projection():
    qkv = randn(6 * 16, 3, 3, 64, dtype=torch.float32).requires_grad_()
    q, k, v = qkv.unbind(1)
    weight = randn(6 * 16, 3, 64, dtype=torch.float32, seed=1)
    for causal in (False, True):
        ours = packed_attention(q, k, v, cu([16] * 6), causal=causal)
        padded = F.scaled_dot_product_attention(*(x.view(6, 16, 3, 64).transpose(1, 2) for x in qkv.unbind(1)), is_causal=causal)
        theirs = padded.transpose(1, 2).reshape(96, 3, 64)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(x, qkv, weight)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("variant", [{}, {"causal": True}, {"key_size": torch.ones(10)}])
def test_a_nan_stays_in_its_segment(variant):
    q, k, v = (randn(10, 2, 4, dtype=torch.float32, seed=s).requires_grad_() for s in range(3))
    with torch.no_grad():
        q[4], k[5], v[5] = torch.nan, torch.nan, torch.nan
    out = packed_attention(q, k, v, cu([2, 2, 2, 1, 3]), **variant)
    assert out[4:6].isnan().any() and not out[:4].isnan().any() and not out[6:].isnan().any()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not gradient[:4].isnan().any() and not gradient[6:].isnan().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand, biased", [(operand, biased) for operand in ("q", "k", "v", "scale") for biased in (False, True)]
                         + [("key_bias", True)])
def test_a_nan_is_passed_on(operand, biased, value):
    """Also where a row of scores is nothing but NaN, which PyTorch's fused attention, without a mask, takes for a query without keys."""
    inputs = {name: randn(7, 2, 4, dtype=torch.float32, seed=s) for s, name in enumerate("qkv")}
    inputs |= {"key_bias": torch.zeros(7) if biased else None, "scale": 0.5}
    if operand == "scale":
        inputs["scale"] = torch.nan
    else:
        inputs[operand][2:6] = value
    results = []
    for impl in ("cpu", "reference"):
        leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
        out = packed_attention(*leaves, cu([2, 4, 1]), key_bias=inputs["key_bias"], scale=inputs["scale"], impl=impl)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine.nan_to_num(), expected.nan_to_num())
        assert torch.equal(mine.isnan(), expected.isnan())


def test_every_element_is_written(monkeypatch):
    poisoned = {name: getattr(torch.Tensor, name) for name in ("new_empty",)} | {"empty_like": torch.empty_like}

    def poison(make):
        def poisoned_make(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made
        return poisoned_make

    for name, make in poisoned.items():
        monkeypatch.setattr(torch.Tensor if name == "new_empty" else torch, name, poison(make))
    for variant in ("plain", "causal", "all", "one key head"):
        compare([3, 0, 2, 2, 1], **VARIANTS[variant])
    compare([2, 4, 1, 3, 0] * 12, **VARIANTS["all"])


def test_a_long_segment_never_has_all_its_scores_at_once(monkeypatch):
    monkeypatch.setitem(cpu.SCORES, "cpu", 4096)
    n = 512
    leaves = [randn(n, 1, 8, dtype=torch.float32, seed=s).requires_grad_() for s in range(3)]
    size = torch.rand(n) + 0.5
    for options in ({"key_size": size}, {}):
        with forbid_large_tensors(n * n // 8):
            out = packed_attention(*leaves, cu([n]), **options)
            gradients = torch.autograd.grad(out.sum(), leaves)
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        exact = eager(*doubles, [n], False, size.double() if options else None)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
        for mine, true in zip(gradients, torch.autograd.grad(exact.sum(), doubles), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)


def test_merged_tokens_attend_in_proportion():
    """A key of size 3 weighs as much as the same key three times (ToMe's proportional attention)."""
    q, k, v = randn(2, 2, 4), randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)
    repeated = [0, 1, 1, 1, 2]
    ours = packed_attention(q, k, v, cu([2]), cu([3]), key_size=torch.tensor([1, 3, 1]))
    torch.testing.assert_close(ours, packed_attention(q, k[repeated], v[repeated], cu([2]), cu([5])))


def test_hidden_keys_and_queries_without_keys_give_zero():
    q, k, v = (randn(4, 2, 3, seed=s).requires_grad_() for s in range(3))
    out, mass = packed_attention(q, k, v, cu([2, 2]), key_size=torch.tensor([0.0, 0, 1, 0]), return_key_mass=True)
    assert (out[:2] == 0).all() and torch.equal(out[2:], v[2].expand(2, 2, 3)) and mass.tolist() == [0, 0, 4, 0]
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in gradients) and (gradients[0] == 0).all() and (gradients[2][2] == 2).all()


def test_types_with_dropout_of_weights():
    """So rare that nothing is dropped: the padded path hides what the others hide."""
    q, k, v = (randn(9, 2, 4, seed=seed) for seed in range(3))
    options = {"token_type": types_of(9), "sees": SEES, "causal": True}
    want = packed_attention(q, k, v, cu([4, 5]), **options)
    torch.testing.assert_close(packed_attention(q, k, v, cu([4, 5]), **options, dropout_p=1e-12), want)


def test_types_as_masks_of_scaled_dot_product_attention():
    """32 types, of which each sees itself and those before it."""
    q, k, v = (randn(64, 2, 4, seed=seed).float().requires_grad_() for seed in range(3))
    kinds = torch.arange(64) // 2
    out = packed_attention(q, k, v, cu([64]), token_type=kinds, sees=torch.ones(32, 32).tril().bool())
    mask = kinds[:, None] >= kinds
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
