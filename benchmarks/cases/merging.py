"""A whole ViT whose blocks merge tokens: ``fastvlp.accelerate(model, merge=r)`` against eager ToMe and against the untouched model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.token_merge import match, merge
from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, needs
from benchmarks.rivals import import_open_clip

CLEAR = 1e-5  # two similarities nearer than this can change places by rounding


def shapes(device: str, quick: bool) -> list[Shape]:
    """timm's ViT-S/16 on 224 pixels, on GPUs ViT-B/16; 8 tokens merge in each of 12 blocks."""
    if quick:
        name, size, batch, r, dtype = "vit_tiny_patch16_224", 64, 4, 1, torch.float32
    elif device == "cuda":
        name, size, batch, r, dtype = "vit_base_patch16_224", 224, 256, 8, torch.bfloat16
    else:
        name, size, batch, r, dtype = "vit_small_patch16_224", 224, 16, 8, torch.float32
    values = {"model": name, "size": size, "b": batch, "r": r}
    return [Shape(f"{name.split('_patch')[0].replace('_', ' ')} B={batch} r={r}", dtype, values)]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Images of smooth noise and a model of random weights.

    ``clear``: the images whose merges no rounding can change; only those are compared. Facts: operations per image, with and without
    merging, and the share that merging saves.
    """
    import_open_clip()  # makes torchvision importable, which timm imports
    import fastvlp

    size, batch, r = (shape.values[name] for name in ("size", "b", "r"))
    model = importlib.import_module("timm").create_model(shape.values["model"], img_size=size, num_classes=64).to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).add_(0.02 * torch.randn_like(parameter))
    images = F.interpolate(torch.randn(batch, 3, size // 8, size // 8, device=device), size, mode="bilinear")
    upstream = torch.randn(batch, 64, device=device)
    exact = copy.deepcopy(model).double()
    leaf, clear = images.double().requires_grad_(), torch.ones(batch, dtype=torch.bool, device=device)
    value = _eager_merging(exact, leaf, r, lambda metric: clear.logical_and_(_clear(metric, r)))
    (gradient,) = torch.autograd.grad(value, leaf, upstream.double())
    report = fastvlp.accelerate(copy.deepcopy(model), merge=r)
    facts = {"flops": sum(block.flops for block in report.expected), "flops_before": sum(block.flops_before for block in report.expected)}
    facts |= {"flops_saved": report.flops_saved, "clear": float(clear.sum())}
    if not clear.any():
        raise RuntimeError("merging: rounding could change the merges of every image; run it again for other images")
    inputs = {"images": images.to(shape.dtype), "model": model.to(shape.dtype), "upstream": upstream.to(shape.dtype), "clear": clear}
    return Problem(shape, device, inputs | {"exact": {"value": value.detach()[clear], "images": gradient[clear]}}, facts)


def _clear(metric: Tensor, r: int) -> Tensor:
    """bool [B]: whether neither the choice of the r tokens nor that of their matches is a matter of rounding."""
    unit = F.normalize(metric, dim=-1)
    best, second = (unit[:, 2::2] @ unit[:, 1::2].transpose(1, 2)).topk(2, 2).values.unbind(2)
    ranked, order = best.sort(1, descending=True)
    margin = (best - second).gather(1, order[:, :r]).amin(1)
    return torch.minimum(margin, ranked[:, r - 1] - ranked[:, r]) > CLEAR


def _eager_merging(model: Any, images: Tensor, r: int, see: Callable[[Tensor], Any] | None = None) -> Tensor:
    """timm's model with ToMe in dense PyTorch between attention and MLP of every block; ``see`` gets the metric of each."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones_like(x[:, :, 0])
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None])
        x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
        with torch.no_grad():
            metric = k.mean(1)
            if see is not None:
                see(metric)
            matched = match(metric, r, precise=metric.dtype == torch.float64)
        x, size = merge(x, size, matched)
        x = x + block.mlp(block.norm2(x))
    logits: Tensor = model.forward_head(model.norm(x))
    return logits


def exact(problem: Problem) -> Exact:
    """Eager merging in float64."""
    return Exact(problem.inputs["exact"])


def _task(forward: Callable[[Tensor], Tensor], problem: Problem) -> Task:
    leaf = problem.inputs["images"].detach().requires_grad_()

    def canonical(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: result[problem.inputs["clear"]] for name, result in results.items()}

    return Task(lambda: forward(leaf), {"images": leaf}, problem.inputs["upstream"], canonical)


def _ours(problem: Problem) -> Task:
    import fastvlp

    model = copy.deepcopy(problem.inputs["model"])
    fastvlp.accelerate(model, merge=problem.shape.values["r"])
    return _task(model, problem)


def _eager(problem: Problem) -> Task:
    return _task(lambda images: _eager_merging(problem.inputs["model"], images, problem.shape.values["r"]), problem)


def _unmerged(problem: Problem) -> Task:
    return _task(problem.inputs["model"], problem)


def _work(fact: str) -> Callable[[Problem, Mode], tuple[float, float]]:
    """The blocks' operations, with or without merging; the weights are read once."""

    def work(problem: Problem, mode: Mode) -> tuple[float, float]:
        passes = 3 if mode == "forward+backward" else 1
        weights = sum(parameter.nbytes for parameter in problem.inputs["model"].parameters())
        return passes * problem.shape.values["b"] * problem.facts[fact], float(passes * weights)

    return work


CASE = Case(
    op="merging",
    about="inference of timm's ViT whose blocks merge tokens, against eager ToMe and against the untouched model",
    formula="logits of a batch of images; in every block r tokens merge",
    limit="the operations that merging leaves",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=_work("flops"),
    modes=("forward",),
    providers=(
        Provider("fastvlp", "ours", _ours, "fastvlp", needs("timm")),
        Provider("eager ToMe", "eager", _eager, why_not=needs("timm")),
        Provider("timm, unmerged", "rival", _unmerged, "timm", needs("timm"), same_function=False, work=_work("flops_before")),
    ),
)
