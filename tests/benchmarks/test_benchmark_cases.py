"""The cases: their exact answers against autograd on dense float64 matrices, and their counts of work."""

import math
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from benchmarks.cases import contrastive
from benchmarks.measure import build, check_parity, results
from benchmarks.registry import OPS, Shape, find
from benchmarks.rivals import version

CPU = torch.device("cpu")


def dense(op: str, x, y, scale, bias=None):
    logits = scale * x @ y.T
    if op == "similarity_logsumexp":
        return (logits.logsumexp(1) + logits.logsumexp(0)).mean() / 2 - logits.diagonal().mean()
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return F.softplus(-signs * (logits + bias)).sum() / len(x)


@pytest.mark.parametrize("op", ["similarity_logsumexp", "pairwise_sigmoid"])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_exact_losses_equal_autograd_on_the_dense_matrix(op, chunk, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    case = find(op)
    problem = case.problem(Shape("B=37 D=12", torch.float32, {"b": 37, "d": 12}), CPU)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in problem.inputs.items()}
    value = dense(op, *leaves.values())
    expected = {"value": value} | dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    exact = case.exact(problem)
    products = leaves["x"] @ leaves["y"].T
    logits = (leaves["scale"] * products + leaves.get("bias", 0)).detach().requires_grad_()
    slope = torch.autograd.grad(dense(op, torch.eye(37).double(), logits.T, 1.0, 0.0), logits)[0]
    torch.testing.assert_close(exact.terms["scale"], (slope * products).abs().sum(), rtol=1e-10, atol=0)
    found = exact.results
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


def test_the_exact_loss_of_prefixes_equals_autograd_on_their_dense_matrices():
    case = find("matryoshka")
    problem = case.problem(Shape("", torch.float32, {"b": 21, "d": 12, "widths": (3, 6, 12)}), CPU)
    x, y, scale = leaves = [tensor.double().requires_grad_() for tensor in problem.inputs.values()]
    value = 0
    for width in (3, 6, 12):
        a, b = (side[:, :width] / side[:, :width].square().sum(1, keepdim=True).sqrt() for side in (x, y))
        value = value + dense("similarity_logsumexp", a, b, scale)
    expected = (value, *torch.autograd.grad(value, leaves))
    found = case.exact(problem).results
    for name, tensor in zip(("value", "x", "y", "scale"), expected, strict=True):
        torch.testing.assert_close(found.pop(name), tensor, rtol=1e-9, atol=1e-12)
    assert not found


def test_the_exact_loss_of_words_equals_autograd_on_all_logits(monkeypatch):
    case = find("linear_cross_entropy")
    monkeypatch.setattr(import_module("benchmarks.cases.linear_cross_entropy"), "CHUNK", 7)
    problem = case.problem(Shape("", torch.float32, {"t": 20, "d": 5, "v": 11}), CPU)
    x, weight = (problem.inputs[name].double().requires_grad_() for name in ("x", "weight"))
    value = F.cross_entropy(x @ weight.T, problem.inputs["targets"])
    expected = {"value": value} | dict(zip(("x", "weight"), torch.autograd.grad(value, (x, weight)), strict=True))
    found = case.exact(problem).results
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", ["matryoshka", "patch_embed", "linear_cross_entropy", "similarity_topk", "residual_norm",
                                "bias_activation", "grouped_linear", "packed_attention"])  # fmt: skip
def test_ours_and_eager_agree_with_the_exact_results(op):
    case = find(op)
    problem = case.problem(case.shapes("cpu", True)[-1], CPU)
    tasks, left_out = build([p for p in case.providers if p.kind != "compiled" and not p.why_not(CPU)], problem)
    errors, wrong = check_parity(case, problem, tasks)
    assert set(errors) == set(tasks) and {"fastvlp cpu", "eager"} <= set(tasks) and not left_out and not wrong
    assert op != "patch_embed" or "fastvlp cpu, dropped after" in tasks


@pytest.mark.skipif(version("vit-pytorch") is None, reason="NaViT is vit-pytorch's, which is not installed")
def test_navit_is_measured_on_pictures_alone():
    case = find("towers")
    navit = case.find_provider("NaViT")
    pictures, captions, _ = case.shapes("cpu", True)
    problem = case.problem(pictures, CPU)
    (task,), upstream = build([navit], problem)[0].values(), problem.inputs["upstream"]
    found = task.canonical(results(task, "forward+backward"))
    assert found["value"].shape == upstream.shape and found["image"].any()
    layers = {name for name in task.leaves if name.endswith("to_q.weight") and ".transformer." in name}
    assert len(layers) == len(problem.inputs["model"].image.blocks)
    assert build([navit], case.problem(captions, CPU)) == ({}, {"NaViT": "it has no text tower"})


def test_exact_softmax_of_similarities_equals_autograd_on_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", 7)
    case = find("similarity_attend")
    problem = case.problem(Shape("", torch.float32, {"b": 37, "d": 12, "e": 5}), CPU)
    x, y, v, scale = leaves = [problem.inputs[name].double().requires_grad_() for name in ("x", "y", "v", "scale")]
    value = (scale * x @ y.T).softmax(1) @ v
    gradients = torch.autograd.grad(value, leaves, problem.inputs["upstream"].double())
    found = case.exact(problem).results
    for name, tensor in zip(("value", "x", "y", "v", "scale"), (value, *gradients), strict=True):
        torch.testing.assert_close(found.pop(name), tensor, rtol=1e-10, atol=1e-12)
    assert not found


def test_exact_attention_equals_torch_segment_by_segment():
    case = find("packed_attention")
    for shape in case.shapes("cpu", True):
        problem = case.problem(shape, CPU)
        parts = [problem.inputs[name].double().split(shape.values["lengths"]) for name in ("q", "k", "v")]
        masks = [torch.ones(n, n).tril().bool() if shape.values["causal"] else torch.ones(n, n).bool() for n in shape.values["lengths"]]
        if shape.values["typed"]:  # the second half in four parts that see the first half and themselves
            for n, mask in enumerate(masks):
                half, end = len(mask) // 2, len(mask)
                part = [-1] * half + [4 * (place - half) // (end - half) for place in range(half, end)]
                masks[n] = mask & torch.tensor([[b < 0 or a == b for b in part] for a in part])
        outputs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), attn_mask=mask).transpose(0, 1)
            for *part, mask in zip(*parts, masks, strict=True)
        ]
        torch.testing.assert_close(case.exact(problem).results["value"], torch.cat(outputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", ["similarity_logsumexp", "pairwise_sigmoid", "packed_attention", "linear_cross_entropy", "similarity_topk"])
def test_inputs_are_random_every_time(op):
    case = find(op)
    first, second = (next(iter(case.problem(case.shapes("cpu", True)[0], CPU).inputs.values())) for _ in range(2))
    assert first.shape == second.shape and not torch.equal(first, second)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_have_names_of_their_own_and_one_eager_provider_comes_first(op, device):
    case = find(op)
    names = [shape.name for quick in (False, True) for shape in case.shapes(device, quick)]
    assert len(set(names)) == len(names)
    assert [case.find_shape(name, device).name for name in names] == names
    providers = [provider.name for provider in case.providers]
    assert len(set(providers)) == len(providers) and case.find_provider(providers[-1]).name == providers[-1]
    assert {"ours", "eager"} <= {provider.kind for provider in case.providers}


def test_work_is_that_of_the_targets():
    # TARGETS: CLIP B=32,768 D=768 with recomputation is 4 units, 8.3 ms at 790 TFLOP/s; SigLIP B=65,536 D=768 3 units, 25 ms.
    shape = find("matryoshka").shapes("cuda", False)[0]
    flops, _ = find("matryoshka").work(type("P", (), {"shape": shape})(), "forward+backward")
    assert math.isclose(1e3 * flops / 790e12, 5.6, rel_tol=0.02) and shape.values["b"] == 32768
    for op, b, milliseconds in (("similarity_logsumexp", 32768, 8.3), ("pairwise_sigmoid", 65536, 25.0)):
        shape = Shape("", torch.bfloat16, {"b": b, "d": 768})
        flops, moved = contrastive.work(type("P", (), {"shape": shape})(), "forward+backward",
                                        {"forward": 1, "forward+backward": 4 if b == 32768 else 3})  # fmt: skip
        assert math.isclose(1e3 * flops / 790e12, milliseconds, rel_tol=0.02), op
        assert moved == 4 * b * 768 * 2
