"""A linear layer with weights for each type of token, as patches and words of one transformer have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

Linear = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, types, weight, bias)


def shapes(device: str, quick: bool) -> list[Shape]:
    """QKV and MLP of patches and words that lie mixed in one batch, and four kinds of tokens."""
    if quick:
        sizes, dtype = [(300, 32, 48, 2), (200, 32, 16, 4)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(32_768, 1024, 3072, 2), (32_768, 1024, 4096, 2), (16_384, 768, 3072, 4)], torch.bfloat16
    else:
        sizes, dtype = [(4096, 384, 1152, 2), (4096, 384, 1536, 4)], torch.float32
    return [Shape(f"T={t} {i} to {o}, {k} types", dtype, {"t": t, "i": i, "o": o, "k": k}) for t, i, o, k in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Tokens of unit variance and random types, weights as a linear layer starts with."""
    t, i, o, k = (shape.values[name] for name in ("t", "i", "o", "k"))
    inputs = {"x": torch.randn(t, i, device=device), "weight": torch.randn(k, o, i, device=device) * i**-0.5}
    inputs |= {"bias": 0.1 * torch.randn(k, o, device=device), "upstream": torch.randn(t, o, device=device)}
    inputs = {name: tensor.to(shape.dtype) for name, tensor in inputs.items()}
    return Problem(shape, device, inputs | {"types": torch.randint(0, k, (t,), device=device)})


def eager(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gather the tokens of each type, multiply, and put them back."""
    rows = [(types == kind).nonzero()[:, 0] for kind in range(len(weight))]
    parts = [F.linear(x[index], weight[kind], bias[kind]) for kind, index in enumerate(rows)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def everywhere(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every token through every type: what a compiler can trace."""
    out = F.linear(x, weight[0], bias[0])
    for kind in range(1, len(weight)):
        out = torch.where((types == kind)[:, None], F.linear(x, weight[kind], bias[kind]), out)
    return out


def _grouped_mm(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sorted copies around PyTorch's grouped product."""
    kinds, order = types.sort(stable=True)
    ends = torch.searchsorted(kinds, torch.arange(1, len(weight) + 1, device=types.device), out_int32=True)
    out = torch._grouped_mm(x[order], weight.transpose(1, 2), offs=ends) + bias[kinds]
    return torch.empty_like(out).index_copy(0, order, out)


def _grouped_why_not(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a CUDA device"
    return "" if hasattr(torch, "_grouped_mm") else "needs a newer torch, with torch._grouped_mm"


def exact(problem: Problem) -> Exact:
    """Autograd in float64."""
    leaves = {name: problem.inputs[name].double().requires_grad_() for name in ("x", "weight", "bias")}
    value = eager(leaves["x"], problem.inputs["types"], leaves["weight"], leaves["bias"])
    gradients = torch.autograd.grad(value, list(leaves.values()), problem.inputs["upstream"].double())
    return Exact({"value": value.detach()} | dict(zip(leaves, gradients, strict=True)))


def _task(linear: Linear, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        own = {name: problem.inputs[name].detach().requires_grad_() for name in ("x", "weight", "bias")}
        call = torch.compile(linear, dynamic=False) if compiled else linear
        return Task(lambda: call(own["x"], problem.inputs["types"], own["weight"], own["bias"]), own, problem.inputs["upstream"])

    return build


def _ours(impl: str) -> Linear:
    def linear(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from fastvlp_kernels import grouped_linear

        return grouped_linear(x, types, weight, bias, impl=impl)

    return linear


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """One product forward and two backward; tokens, weights and results once, and with gradients twice."""
    t, i, o, k = (problem.shape.values[name] for name in ("t", "i", "o", "k"))
    backward, moved = mode == "forward+backward", (t * (i + o) + k * i * o) * problem.shape.dtype.itemsize
    return (3 if backward else 1) * 2.0 * t * i * o, float(moved * (2 if backward else 1))


CASE = Case(
    op="grouped_linear",
    about="a linear layer by the type of each of T tokens, mixed in one batch",
    formula="W_k x_t + b_k, k the type of token t",
    limit="3 products of 2 T I O",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _task(_ours("cpu")), "fastvlp", always),
        Provider("fastvlp triton", "ours", _task(_ours("triton")), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _task(eager)),
        Provider("torch.compile, all types", "compiled", _task(everywhere, compiled=True), why_not=needs_compiler),
        Provider("torch._grouped_mm", "rival", _task(_grouped_mm), why_not=_grouped_why_not),
    ),
)
