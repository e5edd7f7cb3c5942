"""packed_attention as an operator: registration, compilation, autocast, meta tensors, what it refuses."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvlp_kernels import Packed
from fastvlp_kernels.packed_attention import op, packed_attention

CU = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
TYPES, SEES = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int8), torch.tensor([[True, False], [True, True]])


def qkv(dtype=torch.float32, heads=2, tokens=5, width=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, width, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("causal", "extras"), [(False, "none"), (True, "all")])
def test_opcheck(causal, extras):
    q, k, v = qkv()
    lengths = CU.diff().long()
    size = bias = prefix = None
    if extras == "all":
        size, bias, prefix = torch.rand(5) + 0.5, torch.randn(2, 5, requires_grad=True), torch.tensor([1, 0, 2])
    forward = (q, k, v, CU, CU, lengths, lengths, size, bias, prefix, causal, 0.5, extras == "all", "cpu")
    types = (TYPES, TYPES, SEES) if extras == "all" else (None, None, None)
    forward += (None, None, *types)
    torch.library.opcheck(torch.ops.fastvlp.packed_attention.default, forward)
    out, lse, _ = torch.ops.fastvlp.packed_attention(*forward)
    saved = (torch.randn_like(out), q, k, v, out, lse, CU, CU, lengths, None, size, bias, prefix)
    saved = [None if x is None else x.detach() for x in saved]
    for needs in ([True, True, True, extras == "all"], [True, False, False, False]):
        torch.library.opcheck(torch.ops.fastvlp.packed_attention_backward.default, (*saved, causal, 0.5, needs, "cpu", None, None, *types))


@pytest.mark.parametrize("lengths", [None, CU.diff().long()])
def test_compiled_in_one_graph(lengths):
    def attend(q, k, v, bias):
        out = packed_attention(q * 1.5, k, v, CU, key_bias=bias, causal=True, lengths=lengths, token_type=TYPES, sees=SEES)
        return out.square().sum()

    leaves = [*qkv(), torch.randn(5, requires_grad=True)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(attend(*leaves), leaves), strict=True):
        torch.testing.assert_close(mine, eager)


def test_compiled_once_for_all_totals():
    def attend(q, k, v, cu, lengths):
        return packed_attention(q, k, v, cu, lengths=lengths)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([2, 3], [4, 4], [1, 6], [5, 9]):
            packed = Packed.of(torch.zeros(sum(lengths)), lengths)
            q, k, v = (x.detach() for x in qkv(tokens=packed.total))
            torch.testing.assert_close(compiled(q, k, v, packed.cu_seqlens, packed.lengths), packed_attention(q, k, v, packed.cu_seqlens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_meta_tensors_know_their_shapes(dtype, with_lengths):
    q, k, v = (x.detach().to("meta").requires_grad_() for x in qkv(dtype))
    bias = torch.empty(5, device="meta", requires_grad=True)
    lengths = CU.diff().long() if with_lengths else None
    out, mass = packed_attention(q, k, v, CU.to("meta"), key_bias=bias, return_key_mass=True, lengths=lengths)
    assert out.device.type == "meta" and out.shape == (5, 2, 4) and out.dtype == dtype
    assert mass.shape == (5,) and mass.dtype == torch.float32
    shapes = [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v, bias))]
    assert shapes == [(5, 2, 4)] * 3 + [(5,)]


def test_autocast_decides_the_dtype():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_attention(q, k.bfloat16(), v, CU)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, packed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), CU))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_attention(*qkv(torch.float64), CU).dtype == torch.float64


def test_only_needed_gradients_are_made(monkeypatch):
    seen = []
    real = op.cpu.backward
    monkeypatch.setattr(op.cpu, "backward", lambda *args: seen.append(args[-3]) or real(*args))
    q, k, v = qkv()
    packed_attention(q, k.detach(), v.detach(), CU).sum().backward()
    packed_attention(q.detach(), k.detach(), v, CU, key_bias=torch.zeros(5, requires_grad=True)).sum().backward()
    assert [list(map(bool, needs)) for needs in seen] == [[True, False, False, False], [False, False, True, True]]
    assert not packed_attention(q.detach(), k.detach(), v.detach(), CU).requires_grad


def test_lengths_spare_the_question_and_must_tell_the_truth():
    q, k, v = qkv()
    expected = packed_attention(q, k, v, CU)
    torch.testing.assert_close(packed_attention(q, k, v, CU, lengths=CU.diff()), expected)
    torch.testing.assert_close(packed_attention(q, k, v, CU.long(), CU, lengths=CU.diff()), expected)
    with pytest.raises(ValueError, match=r"lengths \[2, 1, 2\] are not those of cu_seqlens_q, \[2, 0, 3\]; leave lengths out"):
        packed_attention(q, k, v, CU, lengths=torch.tensor([2, 1, 2]))
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match="lengths_k .* are not those of cu_seqlens_k"):
            packed_attention(q, k, v, CU, CU, lengths_k=torch.tensor([3, 2, 0]), impl=impl)


def test_views_of_a_fused_projection_need_no_copy_of_the_whole():
    fused = torch.randn(5, 3, 2, 4, requires_grad=True)
    q, k, v = fused.unbind(1)
    torch.testing.assert_close(packed_attention(q, k, v, CU), packed_attention(q.contiguous(), k.contiguous(), v.contiguous(), CU))
    swapped = [x.detach().transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]  # the features are not next to each other
    torch.testing.assert_close(packed_attention(*swapped, CU), packed_attention(q, k, v, CU))


def test_an_expanded_gradient_is_taken():
    leaves = qkv()
    for options in ({}, {"key_size": torch.ones(5)}):
        out = packed_attention(*leaves, torch.tensor([0, 5]), **options)
        ones = torch.autograd.grad(out, leaves, torch.ones(()).expand(5, 2, 4), retain_graph=True)
        torch.testing.assert_close(ones, torch.autograd.grad(out, leaves, torch.ones(5, 2, 4)))


def test_the_same_with_the_dispatcher_and_without():
    """Parameters go through the operator, other tensors in eager mode on CPUs past it."""
    results = []
    for kind in (torch.nn.Parameter, lambda x: x.clone().requires_grad_()):
        leaves = [kind(x.detach()) for x in qkv()]
        out = packed_attention(*leaves, CU, causal=True)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert "_Direct" not in type(results[0][0].grad_fn).__name__ and "_Direct" in type(results[1][0].grad_fn).__name__
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_checkpointed():
    q, k, v = qkv()

    def attend(q, k, v):
        return packed_attention(q, k, v, CU, token_type=TYPES, sees=SEES)

    again = checkpoint(attend, q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), (q, k, v)), torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x])
def test_second_derivatives_are_refused_by_name(kind):
    q, k, v = map(kind, qkv())
    (gradient,) = torch.autograd.grad(packed_attention(q, k, v, CU).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="packed_attention: second derivatives"):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(packed_attention(q, k, v, CU, impl="reference").square().sum(), q, create_graph=True)
    gradient.sum().backward()


def attend(**changes):
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU} | changes
    return packed_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key_bias": torch.zeros(5, 5)}, ValueError, r"key_bias is \(5, 5\).*[Bb]iases for pairs of query and key.*flex_attention"),
        ({"key_bias": torch.zeros(2, 5, 5)}, ValueError, "[Bb]iases for pairs"),
        ({"key_bias": torch.zeros(5, dtype=torch.bool)}, TypeError, "it must be floating point"),
        ({"key_size": torch.ones(4)}, ValueError, r"key_size has shape \(4,\); it must have shape \(5,\)"),
        ({"key_size": torch.ones(5, requires_grad=True)}, ValueError, "key_bias=key_size.log()"),
        ({"q": torch.zeros(1, 5, 2, 4)}, ValueError, r"each must be \[tokens, heads, width\]"),
        ({"q": torch.zeros(5, 2, 3)}, ValueError, "q and k must share their width"),
        ({"v": torch.zeros(4, 2, 4)}, ValueError, "k and v their tokens and heads"),
        ({"q": torch.zeros(5, 3, 4)}, ValueError, "the key heads must divide the query heads"),
        ({"q": torch.zeros(5, 2, 4).half()}, TypeError, "cast them to one dtype"),
        ({name: torch.zeros(5, 2, 4, dtype=torch.int32) for name in "qkv"}, TypeError, "allowed: float32, bfloat16"),
        ({"q": torch.zeros(6, 2, 4)}, ValueError, "need cu_seqlens_k"),
        ({"cu_seqlens_q": CU.float()}, ValueError, r"cu_seqlens_q is torch.float32 \(4,\); it must be int32"),
        ({"cu_seqlens_q": CU[:0]}, ValueError, "it must be int32"),
        ({"cu_seqlens_k": CU[:3]}, ValueError, "describes 3 segments and cu_seqlens_k 2"),
        ({"cu_seqlens_q": CU - 1}, ValueError, "cu_seqlens_q starts at -1; it must start at 0"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 5])}, ValueError, "negative length"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, ValueError, "the segments hold 3 queries and 3 keys, but q has 5 rows"),
        ({"prefix_len": torch.ones(2, dtype=torch.int64)}, ValueError, r"prefix_len has shape \(2,\); it must have shape \(3,\)"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, ValueError, r"lengths has shape \(2,\)"),
        ({"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "must be on the CPU"),
        ({"k": torch.zeros(5, 2, 4, device="meta")}, ValueError, "move them to one device"),
        ({"sees": SEES}, ValueError, "give token_type and sees, or none of them"),
        ({"token_type": TYPES, "sees": SEES, "cu_seqlens_k": CU}, ValueError, "other keys than queries need token_type_k too"),
        ({"token_type": TYPES[1:], "sees": SEES}, ValueError, r"token_type has shape \(4,\); it must have shape \(5,\)"),
        ({"token_type": TYPES, "sees": SEES.int()}, ValueError, r"sees is torch.int32 \(2, 2\); it must be bool \[types, types\] of 1 to"),
        ({"token_type": TYPES, "sees": torch.ones(33, 33).bool()}, ValueError, r"sees is torch.bool \(33, 33\)"),
        ({"token_type": TYPES + 1, "sees": SEES}, ValueError, "token_type goes from 1 to 2; sees has the types 0 to 1"),
        ({"token_type": TYPES.float(), "sees": SEES}, TypeError, "token_type is torch.float32; it must be an integer tensor"),
        ({"impl": "flash"}, ValueError, "impl='flash' is unknown; allowed: triton, cpu, reference, flash-attn"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        attend(**changes)
