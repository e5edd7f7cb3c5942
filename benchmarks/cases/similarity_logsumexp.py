"""The softmax contrastive loss (CLIP, InfoNCE), forward and backward."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import contrastive
from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Task, needs, needs_compiler
from benchmarks.rivals import import_open_clip

SCALE = 50.0  # memeff's fixed maximum underflows above about 87
# All of S at the largest size of the CPU, and what TARGETS grants a GPU, which keeps two bytes of a pair instead of four.
STASH_BYTES = {"cpu": 4 * 8192 * 8192, "triton": 2_500_000_000}
PAIR_BYTES = {"cpu": 4, "triton": 2}


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The loss as a textbook writes it: one matrix of logits, cross entropy along both sides."""
    logits = scale.to(x.dtype) * (x @ y.T)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2


def exact(problem: Problem) -> Exact:
    """Value and gradients in float64 from the formula dS = (exp(S - row) + exp(S - col)) / 2B - I / B, in chunks of rows."""
    x, y, scale = (problem.inputs[name].double() for name in ("x", "y", "scale"))
    b, positive = len(x), scale * (x * y).sum(1)
    row, col = torch.empty_like(positive), torch.full_like(positive, -torch.inf)
    for rows, _, products in contrastive.sums(problem):
        products *= scale
        row[rows] = products.logsumexp(1)
        col = torch.logaddexp(col, products.logsumexp(0))
    dx, dy, dscale, terms = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(scale), torch.zeros_like(scale)
    for rows, x_rows, products in contrastive.sums(problem):
        logits = scale * products
        slope = ((logits - row[rows, None]).exp() + (logits - col).exp()) / (2 * b)
        slope.diagonal(rows.start)[: len(x_rows)] -= 1 / b
        dx[rows] = scale * (slope @ y)
        dy += scale * (slope.T @ x_rows)
        products *= slope
        dscale += products.sum()
        terms += products.abs().sum()
    value = ((row + col) / 2 - positive).mean()
    return Exact({"value": value, "x": dx, "y": dy, "scale": dscale}, {"scale": terms})


def _open_clip_loss() -> Any:
    import_open_clip()
    from open_clip.loss import ClipLoss

    return ClipLoss()


def _our_loss() -> Any:
    from fastvlp.losses import ClipLoss

    return ClipLoss


def _with_matrix(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Whoever keeps S repeats no product."""
    return contrastive.work(problem, mode, {"forward": 1, "forward+backward": 3})


def _ours_with_stash(impl: str) -> Provider:
    def loss() -> Any:
        from fastvlp.losses import ClipLoss

        return functools.partial(ClipLoss, stash_bytes=STASH_BYTES[impl])

    def work(problem: Problem, mode: Mode) -> tuple[float, float]:
        kept = min(1.0, STASH_BYTES[impl] / (PAIR_BYTES[impl] * problem.shape.values["b"] ** 2))
        return contrastive.work(problem, mode, {"forward": 1, "forward+backward": 4 - kept})

    return contrastive.ours(loss, impl, ", stash", work)


def _without_scale(problem: Problem) -> dict[str, Tensor]:
    own = contrastive.leaves(problem)
    return {"x": own["x"], "y": own["y"]}


def _memeff(problem: Problem) -> Task:
    """memeff takes the temperature as a number: no gradient of the scale."""
    own = _without_scale(problem)
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return Task(lambda: loss(own["x"], own["y"]), own)


def _inf_cl(problem: Problem) -> Task:
    one_way = importlib.import_module("inf_cl").cal_flash_loss
    own = contrastive.leaves(problem)
    x, y, scale = own.values()
    return Task(lambda: (one_way(x, y, scale=scale).mean() + one_way(y, x, scale=scale).mean()) / 2, own)


def _liger(problem: Problem) -> Task:
    """Two fused linear cross entropies, the columns of one being the rows of the other."""
    own, loss = contrastive.leaves(problem), importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    x, y, scale = own.values()
    labels = torch.arange(len(x), device=x.device)

    def forward() -> Tensor:
        scaled = scale.to(x.dtype) * x
        return (loss(y, scaled, labels) + loss(scaled, y, labels)) / 2

    return Task(forward, own)


CASE = Case(
    op="similarity_logsumexp",
    about="softmax contrastive loss of B pairs with learnable scale (ClipLoss)",
    formula="mean_i (LSE_j S_ij + LSE_j S_ji) / 2 - S_ii, S = scale x y'",
    limit="4 products of 2 B B D (3 with a stash)",
    shapes=lambda device, quick: contrastive.shapes(device, quick, [(32768, 768), (65536, 512), (65536, 1152)]),
    problem=lambda shape, device: contrastive.pairs(shape, device, SCALE, None),
    exact=exact,
    work=lambda problem, mode: contrastive.work(problem, mode, {"forward": 1, "forward+backward": 4}),
    providers=(
        contrastive.ours(_our_loss, "cpu"),
        _ours_with_stash("cpu"),
        contrastive.ours(_our_loss, "triton"),
        _ours_with_stash("triton"),
        Provider("eager", "eager", contrastive.loss_task(eager), work=_with_matrix),
        Provider("torch.compile", "compiled", contrastive.compiled_task(eager), why_not=needs_compiler, work=_with_matrix),
        Provider("open_clip", "rival", lambda p: contrastive.loss_task(_open_clip_loss())(p), "open_clip_torch", needs("open_clip")),
        Provider("memeff", "rival", _memeff, "memeff", needs("memeff", cuda=True)),
        Provider("inf-cl", "rival", _inf_cl, "inf-cl", needs("inf_cl", cuda=True)),
        Provider("liger-kernel", "rival", _liger, "liger-kernel", needs("liger_kernel", cuda=True)),
    ),
)
