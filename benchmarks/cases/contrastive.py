"""What the two contrastive cases share: random pairs, their sizes, and the operator as a chosen implementation computes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Mode, Problem, Provider, Shape, Task, always, needs

CHUNK = 1024


def shapes(device: str, quick: bool, cuda: Sequence[tuple[int, int]]) -> list[Shape]:
    """The batch and width of TARGETS for the kind of device, or small ones."""
    if quick:
        sizes, dtype = [(256, 64), (512, 128)], torch.float32
    elif device == "cuda":
        sizes, dtype = list(cuda), torch.bfloat16
    else:
        sizes, dtype = [(2048, 512), (8192, 512)], torch.float32
    return [Shape(f"B={b} D={d}", dtype, {"b": b, "d": d}) for b, d in sizes]


def pairs(shape: Shape, device: torch.device, scale: float, bias: float | None) -> Problem:
    """Unit vectors whose pairs have a cosine of about 0.2, so that neither the positives nor the negatives decide alone."""
    generator = torch.Generator(device=device)
    generator.seed()
    size = (shape.values["b"], shape.values["d"])
    x, noise = (F.normalize(torch.randn(size, device=device, generator=generator), dim=1) for _ in range(2))
    y = F.normalize(0.2 * x + 0.98 * noise, dim=1)
    inputs = {"x": x.to(shape.dtype), "y": y.to(shape.dtype), "scale": torch.tensor(scale, device=device)}
    if bias is not None:
        inputs["bias"] = torch.tensor(bias, device=device)
    return Problem(shape, device, inputs)


def leaves(problem: Problem) -> dict[str, Tensor]:
    """The inputs as fresh leaves that share the storage."""
    return {name: tensor.detach().requires_grad_() for name, tensor in problem.inputs.items()}


def loss_task(loss: Callable[..., Tensor]) -> Callable[[Problem], Task]:
    """A provider from a loss that is called as loss(x, y, scale[, bias])."""

    def build(problem: Problem) -> Task:
        own = leaves(problem)
        return Task(lambda: loss(*own.values()), own)

    return build


def compiled_task(loss: Callable[..., Tensor]) -> Callable[[Problem], Task]:
    """The same through torch.compile, with the shapes fixed."""

    def build(problem: Problem) -> Task:
        own = leaves(problem)
        call = torch.compile(loss, dynamic=False)
        return Task(lambda: call(*own.values()), own)

    return build


@contextmanager
def _implementation(name: str) -> Iterator[None]:
    before = os.environ.get("FASTVLP_IMPL")
    os.environ["FASTVLP_IMPL"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTVLP_IMPL"]
        else:
            os.environ["FASTVLP_IMPL"] = before


def ours(
    loss_class: Callable[[], Callable[[], Callable[..., Tensor]]],
    impl: str,
    variant: str = "",
    own_work: Callable[[Problem, Mode], tuple[float, float]] | None = None,
) -> Provider:
    """Our drop-in loss with the implementation forced.

    ``variant`` says in the provider's name what ``loss_class`` does differently, ``own_work`` what it needs then.
    """

    def build(problem: Problem) -> Task:
        own, loss = leaves(problem), loss_class()()

        def forward() -> Tensor:
            with _implementation(impl):
                return loss(*own.values())

        return Task(forward, own)

    why_not = needs("triton", cuda=True) if impl == "triton" else always
    return Provider(f"fastvlp {impl}{variant}", "ours", build, "fastvlp", why_not, work=own_work)


def sums(problem: Problem) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For every chunk of rows: the rows, their float64 features, and their float64 products with all columns (scale left out)."""
    x, y = problem.inputs["x"].double(), problem.inputs["y"].double()
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, x[rows], x[rows] @ y.T


def work(problem: Problem, mode: Mode, units: Mapping[Mode, float]) -> tuple[float, float]:
    """units * 2 B B D operations; the features are read once, and with gradients written once."""
    b, d = problem.shape.values["b"], problem.shape.values["d"]
    moved = 2 * b * d * problem.shape.dtype.itemsize * (2 if mode == "forward+backward" else 1)
    return units[mode] * 2.0 * b * b * d, float(moved)
