"""The pairwise sigmoid loss (SigLIP), forward and backward."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import contrastive
from benchmarks.registry import Case, Exact, Problem, Provider, Task, needs, needs_compiler
from benchmarks.rivals import import_open_clip


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss as its paper writes it (arXiv 2303.15343, algorithm 1)."""
    logits = scale.to(x.dtype) * (x @ y.T) + bias.to(x.dtype)
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * logits).sum(-1).float().mean()


def exact(problem: Problem) -> Exact:
    """Value and gradients in float64 from the formula dS = sigmoid(S) / B - I / B, in chunks of rows."""
    x, y, scale, bias = (problem.inputs[name].double() for name in ("x", "y", "scale", "bias"))
    b = len(x)
    value, dscale, dbias, scale_terms, bias_terms = (torch.zeros_like(scale) for _ in range(5))
    dx, dy = torch.empty_like(x), torch.zeros_like(y)
    for rows, x_rows, products in contrastive.sums(problem):
        logits = scale * products + bias
        own = logits.diagonal(rows.start)[: len(x_rows)]
        value += (F.softplus(logits).sum() - own.sum()) / b  # softplus(-s) = softplus(s) - s on the positives
        slope = logits.sigmoid() / b
        slope.diagonal(rows.start)[: len(x_rows)] -= 1 / b
        dx[rows] = scale * (slope @ y)
        dy += scale * (slope.T @ x_rows)
        products *= slope
        dscale += products.sum()
        scale_terms += products.abs().sum()
        dbias += slope.sum()
        bias_terms += slope.abs().sum()
    results = {"value": value, "x": dx, "y": dy, "scale": dscale, "bias": dbias}
    return Exact(results, {"scale": scale_terms, "bias": bias_terms})


def _open_clip_loss() -> Any:
    import_open_clip()
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


def _our_loss() -> Any:
    from fastvlp.losses import SigLipLoss

    return SigLipLoss


def _siglip_kernel(problem: Problem) -> Task:
    """siglip-kernel takes the logarithm of the scale; its gradient is brought back by d/dscale = d/dlog / scale."""
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    own = contrastive.leaves(problem)
    scale = own.pop("scale").detach()
    own["scale"] = scale.log().requires_grad_()

    def canonical(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return results | {"scale": results["scale"] / scale}

    return Task(lambda: loss(own["x"], own["y"], own["scale"], own["bias"]), own, canonical=canonical)


CASE = Case(
    op="pairwise_sigmoid",
    about="sigmoid contrastive loss of B pairs with learnable scale and bias (SigLipLoss)",
    formula="sum_ij softplus(-z_ij (scale x_i y_j' + bias)) / B, z = 1 on the diagonal, else -1",
    limit="3 products of 2 B B D",
    shapes=lambda device, quick: contrastive.shapes(device, quick, [(32768, 768), (65536, 768)]),
    problem=lambda shape, device: contrastive.pairs(shape, device, 10.0, -10.0),
    exact=exact,
    work=lambda problem, mode: contrastive.work(problem, mode, {"forward": 1, "forward+backward": 3}),
    providers=(
        contrastive.ours(_our_loss, "cpu"),
        contrastive.ours(_our_loss, "triton"),
        Provider("eager", "eager", contrastive.loss_task(eager)),
        Provider("torch.compile", "compiled", contrastive.compiled_task(eager), why_not=needs_compiler),
        Provider("open_clip", "rival", lambda p: contrastive.loss_task(_open_clip_loss())(p), "open_clip_torch", needs("open_clip")),
        Provider("siglip-kernel", "rival", _siglip_kernel, "siglip-kernel", needs("siglip_kernel", cuda=True)),
    ),
)
