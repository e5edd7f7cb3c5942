"""What stands between the two products of a feed-forward layer: a bias and an activation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

Activate = Callable[[Tensor, Tensor, str], Tensor]


def shapes(device: str, quick: bool) -> list[Shape]:
    """The hidden layers of ViT-B, of a gated model and of our towers."""
    if quick:
        sizes, dtype = [(300, 64, "gelu"), (300, 64, "geglu")], torch.float32
    elif device == "cuda":
        sizes, dtype = [(50_432, 3072, "gelu"), (16_384, 22_016, "geglu"), (50_432, 3072, "relu2")], torch.bfloat16
    else:
        sizes, dtype = [(6304, 1536, "gelu"), (2048, 4096, "geglu"), (6304, 1536, "relu2")], torch.float32
    return [Shape(f"T={t} H={h} {kind}", dtype, {"t": t, "h": h, "kind": kind}) for t, h, kind in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Products of unit variance and a small bias."""
    t, h, kind = (shape.values[name] for name in ("t", "h", "kind"))
    inputs = {"x": torch.randn(t, h, device=device).to(shape.dtype), "bias": 0.1 * torch.randn(h, device=device).to(shape.dtype)}
    inputs["upstream"] = torch.randn(t, h // 2 if kind == "geglu" else h, device=device).to(shape.dtype)
    return Problem(shape, device, inputs)


def eager(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Two or three lines of a model."""
    hidden = x + bias
    if kind == "geglu":
        value, gate = hidden.chunk(2, 1)
        return value * F.gelu(gate)
    return F.gelu(hidden) if kind == "gelu" else F.relu(hidden).square()


def exact(problem: Problem) -> Exact:
    """Autograd in float64."""
    x, bias = (problem.inputs[name].double().requires_grad_() for name in ("x", "bias"))
    value = eager(x, bias, problem.shape.values["kind"])
    gradients = torch.autograd.grad(value, (x, bias), problem.inputs["upstream"].double())
    return Exact({"value": value.detach(), "x": gradients[0], "bias": gradients[1]})


def _task(activate: Activate, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        own = {name: problem.inputs[name].detach().requires_grad_() for name in ("x", "bias")}
        call = torch.compile(activate, dynamic=False) if compiled else activate
        return Task(lambda: call(own["x"], own["bias"], problem.shape.values["kind"]), own, problem.inputs["upstream"])

    return build


def _ours(impl: str) -> Activate:
    def activate(x: Tensor, bias: Tensor, kind: str) -> Tensor:
        from fastvlp_kernels import bias_activation

        return bias_activation(x, bias, kind, impl=impl)

    return activate


def _liger(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Its gated and squared activations; the gate's gelu goes by tanh. It has no plain gelu."""
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    hidden = x + bias
    if kind == "geglu":
        value, gate = hidden.chunk(2, 1)
        return functional.liger_geglu(gate.contiguous(), value.contiguous())
    return F.gelu(hidden) if kind == "gelu" else functional.liger_relu_squared(hidden)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Read x and write the result; backward read x and the gradient, and write one."""
    x, out = problem.inputs["x"], problem.inputs["upstream"]
    moved = x.nbytes + out.nbytes + (2 * x.nbytes + out.nbytes if mode == "forward+backward" else 0)
    return (20.0 if mode == "forward" else 60.0) * out.numel(), float(moved)


CASE = Case(
    op="bias_activation",
    about="a bias and gelu, geglu or squared relu, for T tokens of H features",
    formula="f(x + b), f = gelu, h1 gelu(h2) or max(h, 0)^2",
    limit="2 T H elements moved forward, 3 backward (geglu: 3/2 and 5/2)",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _task(_ours("cpu")), "fastvlp", always),
        Provider("fastvlp triton", "ours", _task(_ours("triton")), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _task(eager)),
        Provider("torch.compile", "compiled", _task(eager, compiled=True), why_not=needs_compiler),
        Provider("liger-kernel", "rival", _task(_liger), "liger-kernel", needs("liger_kernel", cuda=True), same_function=False),
    ),
)
