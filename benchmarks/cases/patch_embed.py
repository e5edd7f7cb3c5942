"""Ragged uint8 images of a batch to tokens: normalisation, patches, projection and factorised positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, InapplicableError, Mode, Problem, Provider, Shape, Task, needs, needs_compiler

PATCH, SIDE = 16, 16  # pixels of a patch; patches in the longest row or column
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
NAMES = ("weight", "bias", "rows", "cols")


def shapes(device: str, quick: bool) -> list[Shape]:
    """Images of 8 to 16 patches a side, whole and with half of the patches dropped."""
    if quick:
        sizes, dtype = [(3, 32, 1.0), (3, 32, 0.5)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(256, 768, 1.0), (256, 768, 0.5)], torch.bfloat16
    else:
        sizes, dtype = [(32, 384, 1.0), (32, 384, 0.5)], torch.float32
    return [Shape(f"{s} images C={c}{'' if keep == 1 else f' keep={keep}'}", dtype, {"s": s, "c": c, "keep": keep}) for s, c, keep in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Random bytes; sides uniformly distributed, a random half of the patches kept."""
    s, c = shape.values["s"], shape.values["c"]
    grids = torch.randint(SIDE // 2, SIDE + 1, (s, 2))
    total = int(grids.prod(1).sum())
    kept = torch.randperm(total)[: int(total * shape.values["keep"])].sort().values
    inputs = {
        "pixels": torch.randint(0, 256, (3 * PATCH**2 * total,), dtype=torch.uint8, device=device),
        "sizes": PATCH * grids,
        "keep": None if shape.values["keep"] == 1 else kept,
        "weight": (torch.randn(c, 3 * PATCH**2, device=device) * 0.02).to(shape.dtype),
        "upstream": torch.randn(len(kept), c, device=device).to(shape.dtype),
    }
    for name, size in (("bias", (c,)), ("rows", (SIDE, c)), ("cols", (SIDE, c))):
        inputs[name] = torch.randn(*size, device=device).to(shape.dtype)
    return Problem(shape, device, inputs)


def _places(sizes: Tensor) -> Tensor:
    """Row and column of every patch: [T, 2]."""
    return torch.cat([torch.cartesian_prod(torch.arange(m), torch.arange(n)) for m, n in (sizes // PATCH).tolist()])


def _project(patches: Tensor, places: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Patches [T, P P 3] of bytes to tokens, in the dtype of the weight."""
    mean, std = (torch.tensor(values, dtype=weight.dtype, device=weight.device).repeat(PATCH**2) for values in (MEAN, STD))
    x = F.linear((patches.to(weight.dtype) / 255 - mean) / std, weight, bias)
    return x + rows[places[:, 0]] + cols[places[:, 1]]


def _unfold(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Patches [T, P P 3] of every image after the other."""
    parts = []
    for image, (h, w) in zip(pixels.split((3 * sizes.prod(1)).tolist()), sizes.tolist(), strict=True):
        parts.append(image.view(h // PATCH, PATCH, w // PATCH, 3 * PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2))
    return torch.cat(parts)


def exact(problem: Problem) -> Exact:
    """The same in float64."""
    inputs = problem.inputs
    leaves = [inputs[name].double().requires_grad_() for name in NAMES]
    keep = slice(None) if inputs["keep"] is None else inputs["keep"]
    places = _places(inputs["sizes"])[keep].to(problem.device)
    value = _project(_unfold(inputs["pixels"], inputs["sizes"])[keep], places, *leaves)
    gradients = torch.autograd.grad(value, leaves, inputs["upstream"].double())
    return Exact({"value": value.detach()} | dict(zip(NAMES, gradients, strict=True)))


def _task(embed: Callable[[Problem, dict[str, Tensor]], Callable[[], Tensor]]) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        leaves = {name: problem.inputs[name].detach().requires_grad_() for name in NAMES}
        return Task(embed(problem, leaves), leaves, problem.inputs["upstream"])

    return build


def _ours(impl: str, drop_after: bool = False) -> Callable[[Problem], Task]:
    def embed(problem: Problem, leaves: dict[str, Tensor]) -> Callable[[], Tensor]:
        from fastvlp_kernels import patch_embed

        pixels, sizes, keep = (problem.inputs[name] for name in ("pixels", "sizes", "keep"))
        weight, bias, rows, cols = leaves.values()

        def tokens(keep: Tensor | None) -> Tensor:
            return patch_embed(
                pixels, sizes, weight, bias, patch_size=PATCH, mean=MEAN, std=STD, positions=(rows, cols), keep=keep, impl=impl
            ).x

        if not drop_after:
            return lambda: tokens(keep)
        if keep is None:
            raise InapplicableError("nothing is dropped")
        index = keep.to(problem.device)
        return lambda: tokens(None).index_select(0, index)

    return _task(embed)


def _eager(compiled: bool) -> Callable[[Problem], Task]:
    """Patches cut out image by image, then one product; dropped ones are left out before it."""

    def embed(problem: Problem, leaves: dict[str, Tensor]) -> Callable[[], Tensor]:
        pixels, sizes = problem.inputs["pixels"], problem.inputs["sizes"]
        keep = None if problem.inputs["keep"] is None else problem.inputs["keep"].to(problem.device)
        places = _places(sizes).to(problem.device)
        places = places if keep is None else places[keep]
        run = torch.compile(_project, dynamic=False) if compiled else _project

        def forward() -> Tensor:
            patches = _unfold(pixels, sizes)
            return run(patches if keep is None else patches[keep], places, *leaves.values())

        return forward

    return _task(embed)


def _convolution(problem: Problem, leaves: dict[str, Tensor]) -> Callable[[], Tensor]:
    """As timm and open_clip do it: pictures padded to the largest, a strided convolution, dropping after it."""
    pixels, sizes, device = problem.inputs["pixels"], problem.inputs["sizes"], problem.device
    side = SIDE * PATCH
    grid = torch.arange(SIDE)
    real = ((grid[:, None] < (sizes // PATCH)[:, 0, None, None]) & (grid < (sizes // PATCH)[:, 1, None, None])).flatten()
    index = real.nonzero()[:, 0] if problem.inputs["keep"] is None else real.nonzero()[:, 0][problem.inputs["keep"]]
    index = index.to(device)
    weight, bias, rows, cols = leaves.values()
    mean, std = (torch.tensor(values, dtype=weight.dtype, device=device)[:, None, None] for values in (MEAN, STD))

    def forward() -> Tensor:
        batch = torch.zeros(len(sizes), side, side, 3, dtype=torch.uint8, device=device)
        for i, (image, (h, w)) in enumerate(zip(pixels.split((3 * sizes.prod(1)).tolist()), sizes.tolist(), strict=True)):
            batch[i, :h, :w] = image.view(h, w, 3)
        kernel = weight.unflatten(1, (PATCH, PATCH, 3)).permute(0, 3, 1, 2)
        x = F.conv2d((batch.permute(0, 3, 1, 2).to(weight.dtype) / 255 - mean) / std, kernel, bias, stride=PATCH)
        x = x + rows.T[None, :, :, None] + cols.T[None, :, None]
        return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, index)

    return forward


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """A product with the patches each way; their bytes read, tokens written or their gradients read."""
    (tokens, c), backward = problem.inputs["upstream"].shape, mode == "forward+backward"
    values = 3 * PATCH**2
    moved = tokens * values + tokens * c * problem.inputs["upstream"].element_size()
    return 2.0 * tokens * values * c * (1 + backward), float(moved * (1 + backward))


CASE = Case(
    op="patch_embed",
    about="uint8 images of 8 to 16 patches a side to tokens with factorised positions",
    formula="W (pixel - mean) / std + b + rows[row] + cols[col] of every patch kept",
    limit="2 products of 2 T 768 C, or T (768 + 2 C) bytes moved each way",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp"),
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("fastvlp cpu, dropped after", "ours", _ours("cpu", drop_after=True), "fastvlp"),
        Provider("fastvlp triton, dropped after", "ours", _ours("triton", drop_after=True), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _eager(False)),
        Provider("torch.compile", "compiled", _eager(True), why_not=needs_compiler),
        Provider("padded convolution", "eager", _task(_convolution)),
    ),
)
