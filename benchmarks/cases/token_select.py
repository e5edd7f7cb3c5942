"""Dropping half of the patches by score, as FLIP (random scores) and FastV (attention) do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, needs, needs_compiler

KEEP = 0.5


def shapes(device: str, quick: bool) -> list[Shape]:
    """Images of 224 pixels with a class token: ViT-B/16 on GPUs, ViT-S on CPUs."""
    if quick:
        sizes, dtype = [(4, 17, 32)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(256, 197, 768)], torch.bfloat16
    else:
        sizes, dtype = [(32, 197, 384)], torch.float32
    return [Shape(f"B={b} N={n} C={c}", dtype, {"b": b, "n": n, "c": c}) for b, n, c in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Scores [B, N] and tokens [B, N, C], normally distributed."""
    b, n, c = (shape.values[name] for name in ("b", "n", "c"))
    inputs = {
        "scores": torch.randn(b, n, device=device),
        "x": torch.randn(b, n, c, device=device).to(shape.dtype),
        "upstream": torch.randn(b, int(KEEP * n), c, device=device).to(shape.dtype),
    }
    return Problem(shape, device, inputs)


def _select(scores: Tensor, x: Tensor) -> Tensor:
    """The class token and the patches of highest score, in their order."""
    scores = torch.cat((torch.full_like(scores[:, :1], torch.inf), scores[:, 1:]), 1)
    index = scores.topk(int(KEEP * scores.shape[1]), dim=1).indices.sort(1).values
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def exact(problem: Problem) -> Exact:
    """The same in float64."""
    x = problem.inputs["x"].double().requires_grad_()
    value = _select(problem.inputs["scores"], x)
    (gradient,) = torch.autograd.grad(value, x, problem.inputs["upstream"].double())
    return Exact({"value": value.detach(), "x": gradient})


def _ours(impl: str) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        from fastvlp_kernels import Packed, token_select

        packed = Packed.from_padded(problem.inputs["x"])
        x, scores = problem.inputs["x"].detach().requires_grad_(), problem.inputs["scores"].flatten()

        def forward() -> Tensor:
            kept = token_select(scores, packed.cu_seqlens, KEEP, lengths=packed.lengths, protected=1, impl=impl)
            return kept.take(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1))

        return Task(forward, {"x": x}, problem.inputs["upstream"])

    return build


def _needs_cupy(device: torch.device) -> str:
    from fastvlp_kernels.token_select import cuda

    return needs("cupy", cuda=True)(device) or cuda.why_not()


def _eager(compiled: bool) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        x = problem.inputs["x"].detach().requires_grad_()
        run = torch.compile(_select, dynamic=False) if compiled else _select
        return Task(lambda: run(problem.inputs["scores"], x), {"x": x}, problem.inputs["upstream"])

    return build


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Scores read; kept tokens read and written, and backward their gradients read and all tokens' written."""
    b, n, c = (problem.shape.values[name] for name in ("b", "n", "c"))
    elements = 2 * int(KEEP * n) * c + (int(KEEP * n) * c + n * c if mode == "forward+backward" else 0)
    return 0.0, float(b * (problem.inputs["x"].element_size() * elements + 4 * n))


CASE = Case(
    op="token_select",
    about="half of the patches kept by score, a class token protected",
    formula="x[i] for the floor(N / 2) tokens i of highest score in each segment, in their order",
    limit="N C elements per image moved forward, 3/2 N C backward",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp"),
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("fastvlp cuda", "ours", _ours("cuda"), "fastvlp", _needs_cupy),
        Provider("eager", "eager", _eager(False)),
        Provider("torch.compile", "compiled", _eager(True), why_not=needs_compiler),
    ),
)
