"""What a pre-norm block does between attention and MLP: the residual sum and its norm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

EPS = 1e-5
Norm = Callable[..., tuple[Tensor, Tensor]]  # (x, branch, weight, bias or None, gamma or None) -> (out, total)


def shapes(device: str, quick: bool) -> list[Shape]:
    """ViT-B's and ViT-SO400M's tokens, with LayerScale, and a language model's with RMSNorm."""
    if quick:
        sizes, dtype = [(300, 64, "layer", False), (300, 64, "rms", True)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(50_432, 768, "layer", False), (50_176, 1152, "layer", True), (16_384, 4096, "rms", False)], torch.bfloat16
    else:
        sizes, dtype = [(6304, 384, "layer", False), (6304, 768, "layer", True), (4096, 1024, "rms", False)], torch.float32
    return [
        Shape(f"T={t} C={c} {kind}{' scaled' if scaled else ''}", dtype, {"t": t, "c": c, "kind": kind, "scaled": scaled})
        for t, c, kind, scaled in sizes
    ]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Tokens of unit variance, what is added to them, and parameters near their start."""
    t, c = shape.values["t"], shape.values["c"]
    inputs = {name: torch.randn(t, c, device=device).to(shape.dtype) for name in ("x", "branch", "upstream")}
    inputs["weight"] = 1 + 0.1 * torch.randn(c, device=device).to(shape.dtype)
    if shape.values["kind"] == "layer":
        inputs["bias"] = 0.1 * torch.randn(c, device=device).to(shape.dtype)
    if shape.values["scaled"]:
        inputs["gamma"] = 0.1 * torch.randn(c, device=device).to(shape.dtype)
    return Problem(shape, device, inputs)


def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two or three lines of a block; without a bias RMSNorm."""
    total = x + (branch if gamma is None else branch * gamma)
    if bias is None:
        return F.rms_norm(total, total.shape[-1:], weight, EPS), total
    return F.layer_norm(total, total.shape[-1:], weight, bias, EPS), total


class _Both(torch.autograd.Function):
    """The norm, whose gradient the sum gets too: both results are used, as in a block, and nothing is copied for it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, total: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def _leaves(problem: Problem) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in problem.inputs.items() if name != "upstream"}


def exact(problem: Problem) -> Exact:
    """Autograd in float64."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in _leaves(problem).items()}
    value = _Both.apply(*eager(**leaves))
    gradients = torch.autograd.grad(value, list(leaves.values()), problem.inputs["upstream"].double())
    return Exact({"value": value.detach()} | dict(zip(leaves, gradients, strict=True)))


def _task(norm: Norm, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        own = {name: tensor.detach().requires_grad_() for name, tensor in _leaves(problem).items()}
        call = torch.compile(norm, dynamic=False) if compiled else norm
        return Task(lambda: _Both.apply(*call(**own)), own, problem.inputs["upstream"])

    return build


def _ours(impl: str) -> Norm:
    def norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from fastvlp_kernels import residual_norm

        return residual_norm(x, branch, weight, bias, gamma=gamma, kind="rms" if bias is None else "layer", eps=EPS, impl=impl)

    return norm


def _liger(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Its fused sum and RMSNorm; of LayerNorm and LayerScale it has the norm alone."""
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    if bias is None and gamma is None:
        out, total = functional.liger_fused_add_rms_norm(branch, x, weight, EPS, in_place=False)
        return out, total
    total = x + (branch if gamma is None else branch * gamma)
    if bias is None:
        return functional.liger_rms_norm(total, weight, EPS, in_place=False), total
    return functional.liger_layer_norm(total, weight, bias, EPS), total


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Read x and branch, write the sum and the norm; backward read both gradients and the sum (with LayerScale branch too), write one
    gradient (with LayerScale two)."""
    x = problem.inputs["x"]
    passes = 4 if mode == "forward" else 10 if problem.shape.values["scaled"] else 8
    return (10.0 if mode == "forward" else 30.0) * x.numel(), float(passes * x.nbytes)


CASE = Case(
    op="residual_norm",
    about="the residual sum x + gamma * branch and its norm, for T tokens of C features",
    formula="t = x + gamma branch; (t - mean t) / sqrt(var t + eps) weight + bias, and t",
    limit="4 T C elements moved forward, 4 backward (6 with LayerScale)",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _task(_ours("cpu")), "fastvlp", always),
        Provider("fastvlp triton", "ours", _task(_ours("triton")), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _task(eager)),
        Provider("torch.compile", "compiled", _task(eager, compiled=True), why_not=needs_compiler),
        Provider("liger-kernel", "rival", _task(_liger), "liger-kernel", needs("liger_kernel", cuda=True)),
    ),
)
