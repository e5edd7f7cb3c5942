"""One layer's token merging: matching by the keys and the size-weighted mean, as ToMe does it in every block of a ViT."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

WIDTH = 64  # of a head: what is compared

Match = tuple[Tensor, Tensor, Tensor]  # the tokens of even place that stay, those that go, and the places of their matches


def shapes(device: str, quick: bool) -> list[Shape]:
    """Images of 224 pixels with a class token: those of ViT-B/16 in TARGETS on GPUs, those of ViT-S on CPUs."""
    if quick:
        sizes, dtype = [(4, 17, 32, 3)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(256, 197, 768, 13), (64, 577, 1024, 23)], torch.bfloat16
    else:
        sizes, dtype = [(32, 197, 384, 8)], torch.float32
    return [Shape(f"B={b} N={n} C={c} r={r}", dtype, {"b": b, "n": n, "c": c, "r": r}) for b, n, c, r in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Normally distributed keys [B, N, 64] and tokens [B, N, C], and sizes from 1 to 4."""
    b, n, c, r = (shape.values[name] for name in ("b", "n", "c", "r"))
    inputs = {
        "metric": torch.randn(b, n, WIDTH, device=device).to(shape.dtype),
        "x": torch.randn(b, n, c, device=device).to(shape.dtype),
        "size": torch.randint(1, 5, (b, n), device=device).float(),
        "upstream": torch.randn(b, n - r, c, device=device).to(shape.dtype),
    }
    return Problem(shape, device, inputs)


def match(metric: Tensor, r: int, precise: bool = False) -> Match:
    """Even places to odd places, the class token at place 0 protected; compared in float32 or in float64."""
    unit = F.normalize(metric.double() if precise else metric.float(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    best, match = similarity.max(2)
    best[:, 0] = -torch.inf
    order = best.argsort(1, descending=True)
    return order[:, r:].sort(1).values, order[:, :r], match.gather(1, order[:, :r])


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def merge(x: Tensor, size: Tensor, matched: Match) -> tuple[Tensor, Tensor]:
    """The means [B, N - r, C] and the sizes [B, N - r]."""
    stay, go, to = matched
    size = size[..., None].to(x.dtype)
    sums = []
    for values in (x * size, size):
        a, b = values[:, ::2], values[:, 1::2]
        b = b.scatter_reduce(1, to[..., None].expand(-1, -1, b.shape[2]), _rows(a, go), "sum")
        sums.append(torch.cat((_rows(a, stay), b), 1))
    return sums[0] / sums[1], sums[1].squeeze(-1)


def exact(problem: Problem) -> Exact:
    """The same in float64."""
    x = problem.inputs["x"].double().requires_grad_()
    matched = match(problem.inputs["metric"], problem.shape.values["r"], precise=True)
    value, _ = merge(x, problem.inputs["size"].double(), matched)
    (gradient,) = torch.autograd.grad(value, x, problem.inputs["upstream"].double())
    return Exact({"value": value.detach(), "x": gradient})


def _ours(impl: str) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        from fastvlp_kernels import Packed, merge_plan

        metric = Packed.from_padded(problem.inputs["metric"])
        x = problem.inputs["x"].detach().requires_grad_()
        size, r = problem.inputs["size"].flatten(), problem.shape.values["r"]

        def forward() -> Tensor:
            plan = merge_plan(metric.x, metric.cu_seqlens, r, lengths=metric.lengths, protected=1, keep_order=False, impl=impl)
            return plan.merge(x.flatten(0, 1), size)[0].unflatten(0, (x.shape[0], -1))

        return Task(forward, {"x": x}, problem.inputs["upstream"])

    return build


def _eager(compiled: bool) -> Callable[[Problem], Task]:
    """Dense tensors, sort, gather and scatter_reduce."""

    def build(problem: Problem) -> Task:
        x, r = problem.inputs["x"].detach().requires_grad_(), problem.shape.values["r"]

        def layer(metric: Tensor, x: Tensor, size: Tensor) -> Tensor:
            with torch.no_grad():
                matched = match(metric, r)
            return merge(x, size, matched)[0]

        run = torch.compile(layer, dynamic=False) if compiled else layer
        return Task(lambda: run(problem.inputs["metric"], x, problem.inputs["size"]), {"x": x}, problem.inputs["upstream"])

    return build


def _tomesd(problem: Problem) -> Task:
    """tomesd matches every patch to one of each 2 x 2 square; the class token is put back in front."""
    find = importlib.import_module("tomesd.merge").bipartite_soft_matching_random2d
    metric, size, r = problem.inputs["metric"], problem.inputs["size"], problem.shape.values["r"]
    x, side = problem.inputs["x"].detach().requires_grad_(), int((metric.shape[1] - 1) ** 0.5)

    def forward() -> Tensor:
        with torch.no_grad():
            join, _ = find(metric[:, 1:].float(), side, side, 2, 2, r, no_rand=True)
        weight = size[:, 1:, None].to(x.dtype)
        return torch.cat((x[:, :1], join(x[:, 1:] * weight, mode="sum") / join(weight, mode="sum")), 1)

    return Task(forward, {"x": x}, problem.inputs["upstream"])


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """N / 2 x N / 2 similarities per image; the metric and the tokens read, the merged ones written, and backward the other way."""
    b, n, c, r = (problem.shape.values[name] for name in ("b", "n", "c", "r"))
    tokens = b * (2 * n - r) * c * (2 if mode == "forward+backward" else 1)
    return 2.0 * b * (n // 2) * ((n + 1) // 2) * WIDTH, float(problem.inputs["x"].element_size() * (tokens + b * n * WIDTH))


CASE = Case(
    op="token_merge",
    about="one layer of ToMe: matching by keys of width 64, size-weighted means, a class token protected",
    formula="out_j = sum_i s_i x_i / sum_i s_i over the tokens i of row j; r tokens go to their nearest of odd place",
    limit="(2 N - r) C elements per image moved each way, and N d once",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp", always),
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _eager(False)),
        Provider("torch.compile", "compiled", _eager(True), why_not=needs_compiler),
        Provider("tomesd", "rival", _tomesd, "tomesd", needs("tomesd"), same_function=False),
    ),
)
