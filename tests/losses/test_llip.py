"""Llip's objective: against loops over pairs, heads and tokens, whole tensors in float64, and eager PyTorch in the same dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastvlp.losses import llip, llip_loss
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors

NAMES = ("keys", "values", "queries", "text", "output_projection", "scale", "bias")


def problem(M=7, N=9, K=4, H=3, C=5, E=6, D=10, scale=10.0, bias=-10.0, likeness=0.3, dtype=torch.float64, seed=0):
    """Images whose values hold ``likeness`` of their text; D=None: without output projection."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    width = D or H * E
    keys, queries, text = draw(M, K, H, C), draw(N, H, C), F.normalize(draw(N, width), dim=1)
    projection = draw(H * E, D) / (H * E) ** 0.5 if D else None
    meant = torch.zeros(M, width, dtype=torch.float64)
    meant[: min(M, N)] = text[:M]
    meant = meant @ torch.linalg.pinv(projection) if D else meant
    values = likeness * 3 * meant.view(M, 1, H, E) + (1 - likeness) * draw(M, K, H, E) / width**0.5
    tensors = {"keys": keys, "values": values, "queries": queries, "text": text, "output_projection": projection}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return tensors | {"scale": torch.tensor(scale, dtype=wide), "bias": torch.tensor(bias, dtype=wide)}


def dense(keys, values, queries, text, scale, bias, output_projection=None, temperature=1.0):
    """All pairs at once: products in the dtype of the inputs, the rest as eager PyTorch has it."""
    weights = (torch.einsum("nhc,mkhc->mnhk", queries, keys) / temperature).softmax(-1)
    mixed = torch.einsum("mnhk,mkhe->mnhe", weights, values).flatten(2)
    features = F.normalize(mixed if output_projection is None else mixed @ output_projection, dim=-1)
    logits = scale * torch.einsum("mnd,nd->mn", features, text).to(scale.dtype) + bias
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / min(logits.shape)


def differentiated(function, tensors, **options):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    loss = function(**leaves, **options)
    return {"loss": loss.detach()} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_value_by_loops():
    M, N, K, H, C, E, D, temperature = 3, 4, 2, 2, 3, 2, 5, 0.7
    tensors = problem(M, N, K, H, C, E, D)
    keys, values, queries, text, projection, scale, bias = (tensors[name].tolist() for name in NAMES)
    total = 0.0
    for m in range(M):
        for n in range(N):
            out = [0.0] * D
            for h in range(H):
                scores = [sum(queries[n][h][c] * keys[m][k][h][c] for c in range(C)) / temperature for k in range(K)]
                weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
                for e in range(E):
                    mixed = sum(weights[k] * values[m][k][h][e] for k in range(K))
                    out = [o + mixed * p for o, p in zip(out, projection[h * E + e], strict=True)]
            length = math.sqrt(sum(o * o for o in out))
            logit = scale * sum(o * t for o, t in zip(out, text[n], strict=True)) / length + bias
            total += math.log1p(math.exp(-logit if m == n else logit))
    assert llip_loss(**tensors, temperature=temperature).item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("sizes", [(9, 9), (7, 12), (12, 7)])
@pytest.mark.parametrize("D", [None, 18], ids=["heads alone", "projection"])
@pytest.mark.parametrize("scale,bias,likeness", [(10.0, -10.0, 0.3), (100.0, -20.0, 0.3), (100.0, -85.0, 0.95)])
@pytest.mark.parametrize("tile", [1, 100, 1 << 19])
def test_value_and_gradients(sizes, D, scale, bias, likeness, tile, monkeypatch):
    """At scale 100, for a loss below 0.01, for M != N, in tiles of one pair and of many."""
    monkeypatch.setattr(llip, "TILE", tile)
    tensors = problem(*sizes, D=D, scale=scale, bias=bias, likeness=likeness)
    exact, found = (differentiated(function, tensors, temperature=0.5) for function in (dense, llip_loss))
    assert (exact["loss"] < 0.01) == (likeness > 0.9)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("D", [None, 4])
def test_gradcheck(D, monkeypatch):
    monkeypatch.setattr(llip, "TILE", 10)
    tensors = problem(3, 4, 3, 2, 2, 2, D, scale=5.0, bias=-1.0)
    names = list(tensors)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(lambda *given: llip_loss(**dict(zip(names, given, strict=True)), temperature=1.3), leaves)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 20), N=st.integers(1, 20), K=st.integers(2, 6), H=st.sampled_from([1, 2, 5]), D=st.sampled_from([None, 2, 7, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), scale=st.sampled_from([1.0, 10.0, 100.0]),
    likeness=st.sampled_from([0.1, 0.5]), turned=st.booleans(),
)  # fmt: skip
def test_no_worse_than_eager(M, N, K, H, D, dtype, scale, likeness, turned):
    """What is allowed beyond eager's error are roundings of logits in float32, against the loss, and one of a gradient to 16 bits."""
    tensors = problem(M, N, K, H, D=D, scale=scale, bias=-scale / 4, likeness=likeness, dtype=dtype, seed=M * 20 + N)
    if turned:
        tensors |= {name: tensors[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("keys", "values", "queries", "text")}
    exact = differentiated(dense, {name: tensor.double() for name, tensor in tensors.items()})
    eager, found = differentiated(dense, tensors), differentiated(llip_loss, tensors)
    terms = 1 + float(scale) / min(1.0, exact["loss"].item())
    for name, value in exact.items():
        assert found[name].dtype == (torch.float32 if name == "loss" else tensors[name].dtype)
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}[found[name].dtype]
        assert_no_worse_than(found[name], eager[name], value, rounding + 4 * torch.finfo(torch.float32).eps * terms, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_round_the_inputs_alone(dtype):
    """The gradients are those of the rounded inputs in float64, but for one rounding; the scale's are float32. The loss is 3e-7."""
    tensors = problem(16, 16, scale=100.0, bias=-85.0, likeness=0.9, dtype=dtype)
    exact = differentiated(lambda **given: 1e7 * dense(**given), {name: tensor.double() for name, tensor in tensors.items()})
    found = differentiated(lambda **given: 1e7 * llip_loss(**given), tensors)
    for name, value in exact.items():
        tol = 1e-4 if found[name].dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(found[name].double(), value, rtol=tol, atol=tol * value.abs().max().item(), msg=name)


def test_upstream_gradients_of_a_scaler():
    """A mean over many pairs, multiplied by what keeps float16 in range: nothing underflows before that."""
    tensors = problem(16, 16, likeness=0.9, scale=100.0, bias=-85.0, dtype=torch.float16)
    scaled = differentiated(lambda **given: llip_loss(**given) * 65536 / 4096, tensors)
    plain = differentiated(lambda **given: llip_loss(**given) * 16, {name: tensor.float() for name, tensor in tensors.items()})
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name].float(), value, rtol=2**-10, atol=2**-24, msg=name)


def test_one_token_and_one_feature():
    """Where there is nothing to mix, keys and queries have no gradient; where there is one feature, only its sign counts."""
    tensors = problem(K=1, dtype=torch.float32)
    found = differentiated(llip_loss, tensors)
    assert not found["keys"].any() and not found["queries"].any() and found["values"].any()
    tensors = problem(D=1)
    exact, found = differentiated(dense, tensors), differentiated(llip_loss, tensors)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-13, msg=name)


@pytest.mark.parametrize("D,needs", [(10, [True] * 7), (None, [True] * 4 + [False] + [True] * 2), (10, [False, True] * 3 + [False])])
def test_opcheck(D, needs):
    tensors = problem(D=D, dtype=torch.float32)
    inputs = [tensors.get(name) for name in ("keys", "values", "queries", "text", "output_projection", "scale", "bias")]
    leaves = [tensor.clone().requires_grad_() if need else tensor for tensor, need in zip(inputs, needs, strict=True)]
    forward, backward = torch.ops.fastvlp.llip_loss, torch.ops.fastvlp.llip_loss_backward
    torch.library.opcheck(forward.default, (*leaves, 0.5, torch.float32, needs))
    found = forward(*inputs, 0.5, torch.float32, needs)[1:]
    given = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    torch.library.opcheck(backward.default, (torch.tensor(2.0), [part for part in found if part.numel()], given))


def test_meta_tensors():
    tensors = {name: tensor.to("meta").requires_grad_() for name, tensor in problem(dtype=torch.float32).items()}
    loss = llip_loss(**tensors)
    loss.backward()
    assert loss.shape == () and all(tensor.grad.shape == tensor.shape for tensor in tensors.values())


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(llip, "TILE", 100)
    tensors = problem(dtype=torch.float32)
    compiled = torch.compile(lambda **given: llip_loss(**given), backend="aot_eager", fullgraph=True)
    eager = differentiated(llip_loss, tensors)
    for name, value in differentiated(compiled, tensors).items():
        torch.testing.assert_close(value, eager[name], msg=name)


@pytest.mark.parametrize("length", [0.0, 1e-14])
def test_a_mixture_without_direction(length):
    """As normalize has it, what is shorter than 1e-12 is divided by that, also in the gradient: 0 has similarity 0, and nothing is NaN."""
    tensors = problem()
    tensors["values"][2] *= length
    exact, found = differentiated(dense, tensors), differentiated(llip_loss, tensors)
    assert length == 0 or exact["values"][2].abs().max() > 1e6
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("D", [None, 8])
def test_no_tensor_of_all_pairs(D):
    M, N, K = 320, 310, 2
    tensors = {name: tensor.requires_grad_() for name, tensor in problem(M, N, K, 2, 3, 4, D, dtype=torch.float32).items()}
    with forbid_large_tensors(M * N):  # a tile has at most a ninth of all pairs, here times 8
        llip_loss(**tensors).backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_needs_a_gradient_gets_one(wanted):
    tensors = problem(dtype=torch.float32)
    every = differentiated(llip_loss, tensors)
    tensors[wanted].requires_grad_()
    llip_loss(**tensors).backward()
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)
    with torch.no_grad():
        torch.testing.assert_close(llip_loss(**tensors), every["loss"])


def test_autocast_and_mixed_dtypes():
    tensors = problem(dtype=torch.float32)
    rounded = llip_loss(**tensors, compute_dtype=torch.bfloat16)
    mixed = tensors | {"text": tensors["text"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(llip_loss(**tensors), rounded) and torch.equal(llip_loss(**mixed), rounded)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, llip_loss(**tensors))


def test_second_derivatives_are_refused():
    tensors = problem()
    loss = llip_loss(**(tensors | {"text": tensors["text"].requires_grad_()}))
    (grad,) = torch.autograd.grad(loss, tensors["text"], create_graph=True)
    with pytest.raises(RuntimeError, match="llip_loss: second derivatives are not available"):
        grad.sum().backward()


SHAPES = {"keys": (3, 2, 2, 4), "values": (3, 2, 2, 5), "queries": (6, 2, 4), "text": (6, 10)}
REFUSED = [
    ({"values": torch.ones(3, 1, 2, 5)}, ValueError, r"values has shape \(3, 1, 2, 5\), which is \[M, K, H, E\], but K = 2 elsewhere"),
    ({"queries": torch.ones(6, 3, 4)}, ValueError, r"queries has shape .*, but H = 2 elsewhere"),
    ({"queries": torch.ones(5, 2, 4)}, ValueError, r"text has shape .* \[N, D\], but N = 5 elsewhere"),
    ({"text": torch.ones(6, 9)}, ValueError, r"but D = 10 elsewhere \(F is H \* E, and so is D without output_projection\)"),
    ({"output_projection": torch.ones(9, 10)}, ValueError, r"\[F, D\], but F = 10 elsewhere"),
    ({"output_projection": torch.ones(10, 7)}, ValueError, r"text has shape \(6, 10\), which is \[N, D\], but D = 7 elsewhere"),
    ({"keys": torch.ones(3, 2, 8)}, ValueError, r"keys has shape \(3, 2, 8\); it must be \[M, K, H, C\]"),
    ({"keys": torch.ones(0, 2, 2, 4)}, ValueError, "and nothing empty"),
    ({"text": torch.ones(6, 10).long()}, TypeError, "text is torch.int64; it must be float32"),
    ({"text": torch.ones(6, 10).bfloat16()}, TypeError, "the dtypes differ .*text bfloat16.*; cast the inputs"),
    ({"text": torch.ones(6, 10, device="meta")}, ValueError, "keys is on cpu but text is on meta"),
    ({"text": [1.0]}, TypeError, r"text is list; it must be a tensor \[N, D\]"),
    ({"scale": torch.ones(2)}, ValueError, r"scale has shape \(2,\)"),
    ({"bias": None}, TypeError, "bias is NoneType; it must be a number"),
    ({"temperature": 0.0}, ValueError, "temperature=0.0; it must be positive"),
    ({"temperature": torch.ones(())}, TypeError, "temperature is Tensor; it must be a number .*divide the queries"),
]


@pytest.mark.parametrize("changed,kind,message", REFUSED, ids=[case[2][:30] for case in REFUSED])
def test_refusals(changed, kind, message):
    with pytest.raises(kind, match=message):
        llip_loss(**({name: torch.ones(shape) for name, shape in SHAPES.items()} | {"scale": 1.0} | changed))
