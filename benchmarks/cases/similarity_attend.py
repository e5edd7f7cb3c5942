"""Softmax over a similarity matrix times values: soft targets of distillation, retrieval of neighbours; forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import contrastive
from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

SCALE = 20.0
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def shapes(device: str, quick: bool) -> list[Shape]:
    """Batches of pairs, with values as wide as the features or, for a teacher's, wider."""
    if quick:
        sizes, dtype = [(256, 64, 64), (384, 64, 96)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(16384, 512, 512), (32768, 768, 768), (32768, 768, 1152)], torch.bfloat16
    else:
        sizes, dtype = [(2048, 512, 512), (4096, 512, 768)], torch.float32
    return [Shape(f"B={b} D={d} E={e}", dtype, {"b": b, "d": d, "e": e}) for b, d, e in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Pairs as in the contrastive cases, normally distributed values and upstream gradient."""
    inputs = contrastive.pairs(shape, device, SCALE, None).inputs
    size = (shape.values["b"], shape.values["e"])
    v, upstream = (torch.randn(size, device=device).to(shape.dtype) for _ in range(2))
    return Problem(shape, device, {**inputs, "v": v, "upstream": upstream})


def exact(problem: Problem) -> Exact:
    """Value and gradients in float64 from dS = P * (dP - sum(P * dP)), dP = upstream v', in chunks of rows."""
    y, v, scale, upstream = (problem.inputs[name].double() for name in ("y", "v", "scale", "upstream"))
    value, dx = torch.empty_like(upstream), torch.empty_like(problem.inputs["x"], dtype=torch.float64)
    dy, dv, dscale, terms = torch.zeros_like(y), torch.zeros_like(v), torch.zeros_like(scale), torch.zeros_like(scale)
    for rows, x_rows, products in contrastive.sums(problem):
        P = (scale * products).softmax(1)
        value[rows] = P @ v
        dv += P.T @ upstream[rows]
        dS = upstream[rows] @ v.T
        dS -= (P * dS).sum(1, keepdim=True)
        dS *= P
        dx[rows] = scale * (dS @ y)
        dy += scale * (dS.T @ x_rows)
        dS *= products
        dscale += dS.sum()
        terms += dS.abs().sum()
    return Exact({"value": value, "x": dx, "y": dy, "v": dv, "scale": dscale}, {"scale": terms})


def eager(x: Tensor, y: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """Three lines with a matrix of logits and a matrix of probabilities."""
    logits = scale.to(x.dtype) * (x @ y.T)
    return logits.float().softmax(1).to(v.dtype) @ v


def flash(x: Tensor, y: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """One head of PyTorch's attention, which takes the scale as a number: here it is in x."""
    return F.scaled_dot_product_attention((scale.to(x.dtype) * x)[None, None], y[None, None], v[None, None], scale=1.0)[0, 0]


def _ours(impl: str) -> Attend:
    def attend(x: Tensor, y: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        from fastvlp_kernels import similarity_attend

        return similarity_attend(x, y, v, scale, impl=impl)[0]

    return attend


def _task(attend: Attend, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        own = {name: problem.inputs[name].detach().requires_grad_() for name in ("x", "y", "v", "scale")}
        call = torch.compile(attend, dynamic=False) if compiled else attend
        return Task(lambda: call(*own.values()), own, problem.inputs["upstream"])

    return build


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """S and P v forward; dP and three gradients backward (ours makes S again). x, y, v and out once, and with gradients once more."""
    b, d, e = (problem.shape.values[name] for name in ("b", "d", "e"))
    products = 3 * (d + e) if mode == "forward+backward" else d + e
    moved = 2 * b * (d + e) * problem.shape.dtype.itemsize * (2 if mode == "forward+backward" else 1)
    return 2.0 * b * b * products, float(moved)


CASE = Case(
    op="similarity_attend",
    about="softmax over similarities of B pairs times values of width E, with learnable scale",
    formula="softmax_j(S_ij) v_j, S = scale x y'",
    limit="6 B B (D + E) operations (2 B B D more without a stored matrix)",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _task(_ours("cpu")), "fastvlp", always),
        Provider("fastvlp triton", "ours", _task(_ours("triton")), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _task(eager)),
        Provider("scaled_dot_product_attention", "eager", _task(flash)),
        Provider("torch.compile", "compiled", _task(eager, compiled=True), why_not=needs_compiler),
    ),
)
