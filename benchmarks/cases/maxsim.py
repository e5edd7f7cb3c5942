"""Late interaction of all pairs of segments: FILIP in both directions, ColBERT in one."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

NEAR = 2 * torch.finfo(torch.float32).eps  # products of unit vectors that are closer may change places by rounding


def _mixed(count: int, low: int, high: int) -> list[int]:
    draw = random.Random(low)
    return [draw.randint(low, high) for _ in range(count)]


Size = tuple[str, Sequence[int], Sequence[int], int, bool]  # name, lengths of x and y, width, both directions (means) or one (sums)


def shapes(device: str, quick: bool) -> list[Shape]:
    """FILIP's and ColBERT's batches of TARGETS on GPUs, small ones of both and ragged images and captions on CPUs."""
    dtype = torch.float32
    if quick:
        sizes: list[Size] = [("8 x 8, 20 x 9 tokens", [20] * 8, [9] * 8, 32, True), ("8 x 8, one way", [8] * 8, [30] * 8, 32, False)]
    elif device == "cuda":
        sizes = [
            ("FILIP 1024, 196 x 77, D=256", [196] * 1024, [77] * 1024, 256, True),
            ("FILIP 256, 196 x 77, D=256", [196] * 256, [77] * 256, 256, True),
            ("ragged 512, 64-256 x 8-77, D=256", _mixed(512, 64, 256), _mixed(512, 8, 77), 256, True),
            ("ColBERT 256, 32 x 300, D=128", [32] * 256, [300] * 256, 128, False),
        ]
        dtype = torch.bfloat16
    else:
        sizes = [
            ("FILIP 32, 196 x 77, D=256", [196] * 32, [77] * 32, 256, True),
            ("FILIP 128, 49 x 32, D=256", [49] * 128, [32] * 128, 256, True),
            ("ragged 128, 16-64 x 3-24, D=192", _mixed(128, 16, 64), _mixed(128, 3, 24), 192, True),
            ("ColBERT 64, 32 x 300, D=128", [32] * 64, [300] * 64, 128, False),
        ]
    return [Shape(name, dtype, {"x": list(x), "y": list(y), "d": d, "both": both}) for name, x, y, d, both in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Unit vectors, where the segments start, and an upstream gradient for each direction."""
    inputs: dict[str, Tensor] = {}
    generator = torch.Generator(device=device)
    generator.seed()
    for side in ("x", "y"):
        lengths = torch.tensor(shape.values[side])
        tokens = torch.randn(int(lengths.sum()), shape.values["d"], device=device, generator=generator)
        inputs[side] = F.normalize(tokens, dim=1).to(shape.dtype)
        inputs[f"cu_{side}"] = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    size = (2 if shape.values["both"] else 1, len(shape.values["x"]), len(shape.values["y"]))
    return Problem(shape, device, inputs | {"upstream": torch.randn(size, device=device, generator=generator)})


def _pad(tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[segments, longest, D], and which of its tokens are real."""
    mask = torch.arange(max(lengths), device=tokens.device) < torch.tensor(lengths, device=tokens.device)[:, None]
    padded = tokens.new_zeros(*mask.shape, tokens.shape[1])
    padded[mask] = tokens
    return padded, mask


def _scores(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None, both: bool) -> Tensor:
    """All products at once: [2, M, N] means in both directions, or [1, M, N] sums over x."""
    S = torch.einsum("mid,njd->mnij", x, y)
    highest = (S if mask_y is None else S.masked_fill(~mask_y[None, :, None, :], -torch.inf)).amax(3)
    row = _sums(highest, None if mask_x is None else mask_x[:, None])
    if not both:
        return row[None]
    highest = (S if mask_x is None else S.masked_fill(~mask_x[:, None, :, None], -torch.inf)).amax(2)
    col = _sums(highest, mask_y)
    row = row / (x.shape[1] if mask_x is None else mask_x.sum(1)[:, None])
    return torch.stack((row, col / (y.shape[1] if mask_y is None else mask_y.sum(1))))


def _sums(highest: Tensor, mask: Tensor | None) -> Tensor:
    highest = highest.to(torch.promote_types(highest.dtype, torch.float32))
    return highest.sum(2) if mask is None else (highest * mask).sum(2)


def exact(problem: Problem) -> Exact:
    """Scores and gradients in float64, one segment of x after the other."""
    values = problem.shape.values
    y, mask_y = _pad(problem.inputs["y"].double(), values["y"])
    y.requires_grad_()
    dy, dxs, rows, moved = torch.zeros_like(y), [], [], 0.0
    for m, x in enumerate(problem.inputs["x"].double().split(values["x"])):
        x = x[None].requires_grad_()
        row = _scores(x, y, None, mask_y, values["both"])
        dx, part = torch.autograd.grad(row, (x, y), problem.inputs["upstream"][:, m : m + 1].double())
        dy += part
        dxs.append(dx[0])
        rows.append(row.detach())
        moved += _near_ties(x[0].detach(), y.detach(), mask_y, problem.inputs["upstream"][:, m].double())
    gradients = {"x": torch.cat(dxs), "y": dy[mask_y]}
    undecided = {name: moved**0.5 / float(gradient.norm()) for name, gradient in gradients.items()}
    return Exact({"value": torch.cat(rows, 1), **gradients}, undecided=undecided)


def _near_ties(x: Tensor, y: Tensor, mask_y: Tensor, upstream: Tensor) -> float:
    """The squared change of a gradient when every maximum whose runner-up is within float32's rounding goes to that instead, at most.

    x [i, D] is one segment, y [N, j, D] all of the other side, both of unit vectors; upstream: [2, N] of means, or [1, N] of sums.
    """
    S = torch.einsum("id,njd->nij", x, y)
    ways = [S.masked_fill(~mask_y[:, None], -torch.inf)] + ([S.transpose(1, 2)] if len(upstream) == 2 else [])
    counts = [torch.full_like(upstream[0], len(x) if len(upstream) == 2 else 1), mask_y.sum(1)]
    total = 0.0
    for way, weight, count, real in zip(ways, upstream, counts, (torch.ones_like(S[:, :, 0], dtype=torch.bool), mask_y), strict=False):
        if way.shape[2] > 1:
            best = way.topk(2, dim=2).values
            near = (best[..., 0] - best[..., 1] < NEAR) & real
            total += float(((2 * weight / count) ** 2 * near.sum(1)).sum())
    return total


def _ours(impl: str) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        from fastvlp_kernels import maxsim

        own = {name: problem.inputs[name].detach().requires_grad_() for name in ("x", "y")}
        cu_x, cu_y, values = problem.inputs["cu_x"], problem.inputs["cu_y"], problem.shape.values
        longest, reduce, directions = max(values["x"]), "mean" if values["both"] else "sum", "both" if values["both"] else "x_to_y"

        def forward() -> Tensor:
            scores = maxsim(own["x"], cu_x, own["y"], cu_y, reduce=reduce, directions=directions, max_seqlen_x=longest, impl=impl)
            return torch.stack(scores) if isinstance(scores, tuple) else scores[None]

        return Task(forward, own, problem.inputs["upstream"])

    return build


def _padded(score: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, bool], Tensor]) -> Callable[[Problem], Task]:
    """A provider that takes padded batches; the padding itself is not timed, and masks are left out where nothing is padded."""

    def build(problem: Problem) -> Task:
        values = problem.shape.values
        sides = {name: _pad(problem.inputs[name], values[name]) for name in ("x", "y")}
        own = {name: padded.requires_grad_() for name, (padded, _) in sides.items()}
        masks = {name: None if mask.all() else mask for name, (_, mask) in sides.items()}

        def canonical(results: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[sides[name][1]] if name in sides else tensor for name, tensor in results.items()}

        return Task(lambda: score(own["x"], own["y"], masks["x"], masks["y"], values["both"]), own, problem.inputs["upstream"], canonical)

    return build


def _both_ways(score: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """Scores from a function that sums one way: called once more for the other way, and divided for the means."""

    def scores(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None, both: bool) -> Tensor:
        row = score(x, y, mask_x, mask_y)
        if not both:
            return row[None]
        col = score(y, x, mask_y, mask_x).T
        row = row / (x.shape[1] if mask_x is None else mask_x.sum(1)[:, None])
        return torch.stack((row, col / (y.shape[1] if mask_y is None else mask_y.sum(1))))

    return scores


def _late_interaction(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Tensor:
    score: Tensor = importlib.import_module("late_interaction_kernels").maxsim(x, y, mask_x, mask_y).float()
    return score


def _flash_maxsim(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Tensor:
    lengths = (None if mask is None else mask.sum(1).int() for mask in (mask_y, mask_x))
    score: Tensor = importlib.import_module("flash_maxsim").flash_maxsim_batched_train(x, y, True, *lengths).float()
    return score


def _compiled(problem: Problem) -> Task:
    return _padded(torch.compile(_scores, dynamic=False))(problem)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """One product Tx x Ty x D; backward adds a token to a token for each maximum and side. The features and their gradients once."""
    values = problem.shape.values
    (Tx, D), Ty = problem.inputs["x"].shape, len(problem.inputs["y"])
    maxima = Tx * len(values["y"]) + (len(values["x"]) * Ty if values["both"] else 0)
    backward = mode == "forward+backward"
    moved = (Tx + Ty) * D * problem.shape.dtype.itemsize * (2 if backward else 1)
    return 2.0 * Tx * Ty * D + (4.0 * maxima * D if backward else 0.0), float(moved)


CASE = Case(
    op="maxsim",
    about="late interaction of all pairs of segments: FILIP both ways, ColBERT one way",
    formula="mean_i max_j <x_mi, y_nj> and mean_j max_i <x_mi, y_nj> for all m, n",
    limit="1 product of 2 Tx Ty D and 4 D per maximum (recomputing: 4 products)",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp", always),
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _padded(_scores)),
        Provider("torch.compile", "compiled", _compiled, why_not=needs_compiler),
        Provider("late-interaction-kernels", "rival", _padded(_both_ways(_late_interaction)), "late-interaction-kernels",
                 needs("late_interaction_kernels", cuda=True)),
        Provider("flash-maxsim", "rival", _padded(_both_ways(_flash_maxsim)), "flash-maxsim", needs("flash_maxsim", cuda=True)),
    ),
)  # fmt: skip
