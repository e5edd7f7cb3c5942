"""The loss of a captioner's last layer over its vocabulary, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

CHUNK = 256
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def shapes(device: str, quick: bool) -> list[Shape]:
    """CoCa's captions: 256 of 76 words from CLIP's vocabulary on GPUs; fewer, and a small vocabulary, on CPUs."""
    if quick:
        sizes, dtype = [(256, 64, 1000), (512, 64, 4096)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(19_456, 768, 49_408), (4096, 1024, 128_256)], torch.bfloat16
    else:
        sizes, dtype = [(1216, 512, 49_408), (4096, 384, 8192)], torch.float32
    return [Shape(f"T={t} D={d} V={v}", dtype, {"t": t, "d": d, "v": v}) for t, d, v in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Features of unit variance, weights as a linear layer starts with, and random words, all of which count."""
    t, d, v = (shape.values[name] for name in ("t", "d", "v"))
    x = torch.randn(t, d, device=device).to(shape.dtype)
    weight = (torch.randn(v, d, device=device) * d**-0.5).to(shape.dtype)
    return Problem(shape, device, {"x": x, "weight": weight, "targets": torch.randint(0, v, (t,), device=device)})


def exact(problem: Problem) -> Exact:
    """Value and gradients in float64 from d logits = (softmax - one-hot) / T, in chunks of rows."""
    x, weight, targets = (problem.inputs[name] for name in ("x", "weight", "targets"))
    weight = weight.double()
    value, dx, dweight = weight.new_zeros(()), torch.empty_like(x, dtype=torch.float64), torch.zeros_like(weight)
    for i in range(0, len(x), CHUNK):
        rows = slice(i, min(i + CHUNK, len(x)))
        part, words = x[rows].double(), targets[rows, None]
        logits = part @ weight.T
        value += (logits.logsumexp(1) - logits.gather(1, words)[:, 0]).sum() / len(x)
        slope = logits.softmax(1)
        slope.scatter_add_(1, words, -torch.ones_like(words, dtype=slope.dtype))
        slope /= len(x)
        dx[rows] = slope @ weight
        dweight += slope.T @ part
    return Exact({"value": value, "x": dx, "weight": dweight})


def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Two lines with a matrix of logits."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def _ours(impl: str) -> Loss:
    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from fastvlp_kernels import linear_cross_entropy

        return linear_cross_entropy(x, weight, targets, impl=impl)

    return loss


def _task(loss: Loss, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        own = {name: problem.inputs[name].detach().requires_grad_() for name in ("x", "weight")}
        call = torch.compile(loss, dynamic=False) if compiled else loss
        return Task(lambda: call(own["x"], own["weight"], problem.inputs["targets"]), own)

    return build


def _chunked(problem: Problem) -> Task:
    """PyTorch's own, which has to be asked for chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return _task(lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets, options=options))(problem)


def _chunks_why_not(device: torch.device) -> str:
    return "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs a newer torch, with F.linear_cross_entropy"


def _liger(problem: Problem) -> Task:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return _task(lambda x, weight, targets: loss(weight, x, targets))(problem)


def _cce(problem: Problem) -> Task:
    return _task(importlib.import_module("cut_cross_entropy").linear_cross_entropy)(problem)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Logits, and two gradients; x and the weights read once, and with gradients written once."""
    t, d, v = (problem.shape.values[name] for name in ("t", "d", "v"))
    backward = mode == "forward+backward"
    return (3 if backward else 1) * 2.0 * t * d * v, float((t + v) * d * problem.shape.dtype.itemsize * (2 if backward else 1))


CASE = Case(
    op="linear_cross_entropy",
    about="cross-entropy of T words over a vocabulary of V, without the logits",
    formula="mean_t LSE_v <x_t, w_v> - <x_t, w_target(t)>",
    limit="3 products of 2 T V D (triton: 4)",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _task(_ours("cpu")), "fastvlp", always),
        Provider("fastvlp triton", "ours", _task(_ours("triton")), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _task(eager)),
        Provider("torch.compile", "compiled", _task(eager, compiled=True), why_not=needs_compiler),
        Provider("torch, chunked", "rival", _chunked, "torch", _chunks_why_not),
        Provider("liger-kernel", "rival", _liger, "liger-kernel", needs("liger_kernel", cuda=True)),
        Provider("cut-cross-entropy", "rival", _cce, "cut-cross-entropy", needs("cut_cross_entropy", cuda=True)),
    ),
)
