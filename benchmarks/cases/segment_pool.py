"""Mean pooling of ragged segments, as a tower over packed images ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, needs, needs_compiler

SHORTEST, LONGEST = 16, 256


def shapes(device: str, quick: bool) -> list[Shape]:
    """Segments of 16 to 256 tokens."""
    if quick:
        sizes, dtype = [(5, 32)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(256, 768)], torch.bfloat16
    else:
        sizes, dtype = [(64, 384)], torch.float32
    return [Shape(f"{s} x {SHORTEST}-{LONGEST} C={c}", dtype, {"s": s, "c": c}) for s, c in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Tokens [T, C] of segments of uniformly distributed lengths."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (shape.values["s"],))
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    inputs = {
        "x": torch.randn(int(lengths.sum()), shape.values["c"], device=device).to(shape.dtype),
        "cu_seqlens": cu_seqlens.int().to(device),
        "lengths": lengths,
        "owner": torch.arange(len(lengths)).repeat_interleave(lengths).to(device),
        "upstream": torch.randn(len(lengths), shape.values["c"], device=device).to(shape.dtype),
    }
    return Problem(shape, device, inputs)


def _mean(x: Tensor, owner: Tensor, lengths: Tensor) -> Tensor:
    """Sums in float32 (float64 for float64), rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.new_zeros(len(lengths), x.shape[1]).index_add(0, owner, wide)
    return (sums / lengths[:, None]).to(x.dtype)


def exact(problem: Problem) -> Exact:
    """The same in float64."""
    x = problem.inputs["x"].double().requires_grad_()
    value = _mean(x, problem.inputs["owner"], problem.inputs["lengths"].to(problem.device))
    (gradient,) = torch.autograd.grad(value, x, problem.inputs["upstream"].double())
    return Exact({"value": value.detach(), "x": gradient})


def _task(pool: Callable[[Problem], Callable[[Tensor], Tensor]]) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        x, run = problem.inputs["x"].detach().requires_grad_(), pool(problem)
        return Task(lambda: run(x), {"x": x}, problem.inputs["upstream"])

    return build


def _ours(impl: str) -> Callable[[Problem], Task]:
    def pool(problem: Problem) -> Callable[[Tensor], Tensor]:
        from fastvlp_kernels import segment_pool

        cu_seqlens, lengths = problem.inputs["cu_seqlens"], problem.inputs["lengths"]
        return lambda x: segment_pool(x, cu_seqlens, lengths=lengths, impl=impl)

    return _task(pool)


def _eager(compiled: bool) -> Callable[[Problem], Task]:
    def pool(problem: Problem) -> Callable[[Tensor], Tensor]:
        owner, lengths = problem.inputs["owner"], problem.inputs["lengths"].to(problem.device)
        run = torch.compile(_mean, dynamic=False) if compiled else _mean
        return lambda x: run(x, owner, lengths)

    return _task(pool)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """The tokens read and, backward, their gradients written."""
    x = problem.inputs["x"]
    return float(x.numel()), float(x.nbytes * (2 if mode == "forward+backward" else 1))


CASE = Case(
    op="segment_pool",
    about="the mean of each segment's tokens",
    formula="mean of x_i over the tokens i of every segment s",
    limit="T C elements read forward, and written backward",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp"),
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _eager(False)),
        Provider("torch.compile", "compiled", _eager(True), why_not=needs_compiler),
    ),
)
