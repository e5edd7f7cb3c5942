"""The softmax contrastive loss of several nested prefixes of the features (Matryoshka), summed, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import contrastive, similarity_logsumexp
from benchmarks.cases.similarity_logsumexp import SCALE
from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler


def shapes(device: str, quick: bool) -> list[Shape]:
    """Four prefixes, each twice as wide as the one before."""
    if quick:
        b, widths, dtype = 128, (8, 16, 32, 64), torch.float32
    elif device == "cuda":
        b, widths, dtype = 32768, (64, 128, 256, 512), torch.bfloat16
    else:
        b, widths, dtype = 2048, (64, 128, 256, 512), torch.float32
    return [Shape(f"B={b} D={'/'.join(map(str, widths))}", dtype, {"b": b, "d": widths[-1], "widths": widths})]


def _prefixes(x: Tensor, y: Tensor, widths: Sequence[int]) -> list[list[Tensor]]:
    return [[F.normalize(side[:, :width], dim=1) for side in (x, y)] for width in widths]


def eager(x: Tensor, y: Tensor, scale: Tensor, widths: Sequence[int]) -> Tensor:
    """A matrix of logits for each prefix."""
    return torch.stack([similarity_logsumexp.eager(a, b, scale) for a, b in _prefixes(x, y, widths)]).sum()


def exact(problem: Problem) -> Exact:
    """The sum of the exact losses of the prefixes, their gradients taken through the normalisation; float64."""
    x, y = leaves = [problem.inputs[name].double().requires_grad_() for name in ("x", "y")]
    sums = {name: torch.zeros((), dtype=torch.float64, device=problem.device) for name in ("value", "scale", "terms")}
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for prefix in _prefixes(x, y, problem.shape.values["widths"]):
        inputs = {"x": prefix[0].detach(), "y": prefix[1].detach(), "scale": problem.inputs["scale"]}
        one = similarity_logsumexp.exact(Problem(problem.shape, problem.device, inputs))
        found = torch.autograd.grad(prefix, leaves, [one.results["x"], one.results["y"]])
        gradients = [total + part for total, part in zip(gradients, found, strict=True)]
        for name, part in (("value", one.results["value"]), ("scale", one.results["scale"]), ("terms", one.terms["scale"])):
            sums[name] += part
    return Exact({"value": sums["value"], "x": gradients[0], "y": gradients[1], "scale": sums["scale"]}, {"scale": sums["terms"]})


def _task(loss: Callable[..., Tensor], compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        widths, make = problem.shape.values["widths"], contrastive.compiled_task if compiled else contrastive.loss_task
        return make(lambda x, y, scale: loss(x, y, scale, widths))(problem)

    return build


def _ours(impl: str) -> Provider:
    def build(problem: Problem) -> Task:
        from fastvlp.losses import contrastive_loss

        return _task(lambda x, y, scale, widths: contrastive_loss(x, y, scale, prefixes=widths, impl=impl))(problem)

    return Provider(f"fastvlp {impl}", "ours", build, "fastvlp", needs("triton", cuda=True) if impl == "triton" else always)


def _memeff(problem: Problem) -> Task:
    """memeff takes the temperature as a number: no gradient of the scale."""
    own = contrastive.leaves(problem)
    del own["scale"]
    loss = importlib.import_module("memeff").MemoryEfficientMatryoshkaCLIPLoss(
        problem.shape.values["widths"], temperature=1 / SCALE, normalized_inputs=True, stable=False)  # fmt: skip
    return Task(lambda: loss(own["x"], own["y"]), own)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """The widest prefix's products contain the others'."""
    return contrastive.work(problem, mode, {"forward": 1, "forward+backward": 4})


def _separately(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Every prefix's own products; the matrices of logits are kept."""
    widths = problem.shape.values["widths"]
    units = sum(widths) / widths[-1]
    return contrastive.work(problem, mode, {"forward": units, "forward+backward": 3 * units})


CASE = Case(
    op="matryoshka",
    about="softmax contrastive losses of nested prefixes of the features, each normalised by itself, with learnable scale",
    formula="sum_p ClipLoss(scale, x[:, :p] / |x[:, :p]|, y[:, :p] / |y[:, :p]|)",
    limit="4 products of 2 B B D for the widest prefix, which contain the others'",
    shapes=shapes,
    problem=lambda shape, device: contrastive.pairs(shape, device, SCALE, None),
    exact=exact,
    work=work,
    providers=(
        _ours("cpu"),
        _ours("triton"),
        Provider("eager", "eager", _task(eager), work=_separately),
        Provider("torch.compile", "compiled", _task(eager, compiled=True), why_not=needs_compiler, work=_separately),
        Provider("memeff", "rival", _memeff, "memeff", needs("memeff", cuda=True)),
    ),
)
