"""Objectives of fastvlp.losses beside CLIP's and SigLIP's own, against their formulas over whole matrices: one size for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from benchmarks.cases import contrastive
from benchmarks.measure import results
from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, needs_compiler

SCALE, BIAS, TEACHER_SCALE = 20.0, -10.0, 30.0
TAU, SOFT, RANK, DISTILL = 0.01, 0.2, 1 / 16, 0.2
CANDIDATES, TOKENS, HEADS, PATCHES, CAPTIONS = 15, 8, 4, 49, 3


class Objective(NamedTuple):
    """A loss as functions of named inputs: the pairs x and y as far as they are ``trained``, scale, and what ``draw(x, y)`` gives."""

    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    products: tuple[float, float]  # of 2 B C D operations that it takes at least, forward and forward + backward
    draw: Callable[[Tensor, Tensor], dict[str, Any]] = lambda x, y: {}
    trained: tuple[str, ...] = ("x", "y", "scale")  # get gradients
    columns: Callable[[int], int] = lambda b: b  # C
    share: int = 1  # B is the case's divided by it
    ties: bool = False  # rounding decides the order of some pairs


def losses() -> Any:
    return importlib.import_module("fastvlp.losses")


def unit(like: Tensor, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, device=like.device), dim=-1).to(like.dtype)


def similar(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Products in the dtype of the features, everything after them in that of the scale."""
    return scale * (x @ y.mT).to(scale.dtype)


def pairs(S: Tensor, target: Tensor | None = None) -> Tensor:
    """Both directions' mean cross-entropy against the diagonal, or against ``target`` and its transpose with rows that sum to 1."""
    own = torch.arange(len(S), device=S.device)
    of_rows, of_columns = (own, own) if target is None else (F.normalize(target, 1.0, 1), F.normalize(target.T, 1.0, 1))
    return (F.cross_entropy(S, of_rows) + F.cross_entropy(S.T, of_columns)) / 2


def eye(S: Tensor) -> Tensor:
    return torch.eye(len(S), dtype=torch.bool, device=S.device)


def hard_negatives(x: Tensor, y: Tensor, scale: Tensor, negatives: Tensor) -> Tensor:
    S, own = similar(x, y, scale), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(torch.cat([S, similar(x, negatives, scale)], 1), own) + F.cross_entropy(S.T, own)) / 2


def debiased(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    E = similar(x, y, scale).exp()
    total, n = torch.zeros_like(scale), len(E) - 1
    for rows in (E, E.T):
        positive, mean = rows.diagonal(), rows.masked_fill(eye(E), 0).sum(1) / n
        g = torch.maximum((mean - TAU * positive) / (1 - TAU), (-scale).exp())
        total = total - (positive / (positive + n * g)).log().mean() / 2
    return total


def focal(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    S = similar(x, y, scale) + BIAS
    S = torch.where(eye(S), S, -S)
    return ((-S).sigmoid() * -F.logsigmoid(S)).sum() / len(S)


def softened(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    S, total = similar(x, y, scale), torch.zeros_like(scale)
    for logits, side in ((S, x), (S.T, y)):
        like = similar(side, side, scale).detach().masked_fill(eye(S), -torch.inf).softmax(1)
        total = total + F.cross_entropy(logits, SOFT * like + (1 - SOFT) * eye(S)) / 2
    return total


def ranked(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    def list_mle(A: Tensor, B: Tensor) -> Tensor:
        A = A.gather(1, B.argsort(dim=1, descending=True, stable=True))
        return (A.flip(1).logcumsumexp(1).flip(1) - A).mean()

    S, of_x, of_y = similar(x, y, scale), similar(x, x, scale), similar(y, y, scale)
    return pairs(S) + RANK * (list_mle(of_x, of_y) + list_mle(of_y, of_x) + list_mle(S, S.T) + list_mle(S.T, S))


def prototypical(x: Tensor, prototypes: Tensor, scale: Tensor, assignments: Tensor, teacher: Tensor) -> Tensor:
    targets = similar(teacher, teacher, torch.full_like(scale, TEACHER_SCALE)).softmax(1)
    return F.cross_entropy(similar(x, prototypes, scale), targets[assignments])


def probabilistic(x: Tensor, y: Tensor, scale: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    S = similar(x, y, scale) - scale / 2 * (of_x.exp().sum(1)[:, None] + of_y.exp().sum(1)) + BIAS
    return -F.logsigmoid(torch.where(eye(S), S, -S)).sum() / len(S)


def distilled(x: Tensor, y: Tensor, scale: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    S, T = similar(x, y, scale), similar(*teacher, torch.full_like(scale, TEACHER_SCALE))
    return pairs(S) + (F.cross_entropy(S, T.softmax(1)) + F.cross_entropy(S.T, T.T.softmax(1))) / 2


def dynamic(x: Tensor, y: Tensor, scale: Tensor, candidates: Tensor, scores: Tensor) -> Tensor:
    chosen = torch.cat([torch.arange(len(x), device=x.device)[:, None], candidates], 1)
    S, T = similar(x[:, None], y[chosen], scale)[:, 0] + BIAS, scores.to(scale.dtype)
    entropy = -(T.softmax(1) * T.log_softmax(1)).sum(1)
    doubt, label = entropy / entropy.sum(), torch.zeros_like(S)
    label[:, 0] = 1
    wrong = F.binary_cross_entropy_with_logits(S, label, reduction="none").mean(1)
    return DISTILL * (1 - doubt).square().softmax(0) @ (S - T).square().mean(1) + (1 - DISTILL) * doubt @ wrong


def clustered(x: Tensor, y: Tensor, scale: Tensor, prototypes: Tensor, assignments: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    instances = pairs(similar(x, teacher[0], scale)) + pairs(similar(y, teacher[1], scale))
    return pairs(similar(x, y, scale)) + F.cross_entropy(similar(x, prototypes, scale), assignments) + instances / 2


def mixed(y: Tensor, scale: Tensor, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    weights = torch.einsum("nhc,mkhc->mnhk", queries, keys).to(scale.dtype).softmax(-1)
    of_images = F.normalize(torch.einsum("mnhk,mkhe->mnhe", weights.to(values.dtype), values).flatten(2), dim=2)
    S = scale * torch.einsum("mnd,nd->mn", of_images, y).to(scale.dtype) + BIAS
    return -F.logsigmoid(torch.where(eye(S), S, -S)).sum() / len(S)


def grouped(patches: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    p, c = F.normalize(patches, dim=2), F.normalize(captions, dim=2)
    s = (c @ p.mT).to(scale.dtype)
    low, high = s.amin(2, keepdim=True), s.amax(2, keepdim=True)
    weight = (s - low) / (high - low)
    weight = weight.masked_fill(weight < 0.1, 0)
    groups = F.normalize((weight / weight.sum(2, keepdim=True)).to(p.dtype) @ p, dim=2)
    return pairs(similar(groups.flatten(0, 1), c.flatten(0, 1), scale))


def packed_groups(patches: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    from fastvlp_kernels import Packed

    both = (Packed.of(side.flatten(0, 1), [side.shape[1]] * len(side)) for side in (patches, captions))
    return losses().grouping_loss(*both, scale)


def _prototypes(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """As many as pairs, each the cluster of one."""
    return {"prototypes": unit(x, *x.shape), "assignments": torch.randperm(len(x), device=x.device)}


def _teacher(x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {"teacher": (unit(x, *x.shape), unit(x, *x.shape))}


def _variances(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {name: torch.randn(x.shape, device=x.device).to(x.dtype) - 8 for name in ("of_x", "of_y")}


def _candidates(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    candidates, scores = losses().hard_candidates(*_teacher(x, y)["teacher"], min(CANDIDATES, len(y) - 1), 5.0)
    return {"candidates": candidates, "scores": scores}


def _mixture(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    b, d = x.shape
    of_images = [torch.randn(b, TOKENS, HEADS, d // HEADS, device=x.device).to(x.dtype) for _ in range(2)]
    return {"keys": of_images[0], "values": of_images[1], "queries": unit(x, b, HEADS, d // HEADS)}


def _groups(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"patches": unit(x, len(x), PATCHES, x.shape[1]), "captions": unit(x, len(x), CAPTIONS, x.shape[1])}


# Similarities that have gradients take three products, symmetric ones within a side two, targets one.
OBJECTIVES = {
    "several positives": Objective(
        lambda x, y, scale, ids: losses().contrastive_loss(x, y, scale, ids=ids),
        lambda x, y, scale, ids: pairs(similar(x, y, scale), (ids[:, None] == ids).to(scale.dtype)),
        (1, 3), lambda x, y: {"ids": torch.arange(len(x), device=x.device) // 2},
    ),
    "debiased": Objective(lambda x, y, scale: losses().contrastive_loss(x, y, scale, tau_plus=TAU), debiased, (1, 3)),
    "hard negatives": Objective(
        lambda x, y, scale, negatives: losses().contrastive_loss(x, y, scale, text_negatives=negatives), hard_negatives,
        (2, 6), lambda x, y: {"negatives": unit(x, *x.shape)}, ("x", "y", "scale", "negatives"),
    ),
    "distillation": Objective(
        lambda x, y, scale, teacher: sum(losses().DistillClipLoss()(x, y, scale, *teacher, TEACHER_SCALE)), distilled, (2, 4), _teacher,
    ),
    "DCD": Objective(
        lambda x, y, scale, candidates, scores: losses().dcd_loss(x, y, candidates, scores, scale, BIAS, distill=DISTILL), dynamic,
        (1, 3), _candidates, columns=lambda b: min(CANDIDATES + 1, b),
    ),
    "clusters and instances": Objective(
        lambda x, y, scale, prototypes, assignments, teacher: losses().cluster_instance_loss(
            x, y, *teacher, prototypes, assignments, scale), clustered,
        (4, 10), lambda x, y: _prototypes(x, y) | _teacher(x, y), ("x", "y", "scale", "prototypes"),
    ),
    "ProtoCLIP": Objective(
        lambda x, prototypes, scale, assignments, teacher: losses().proto_clip_loss(
            x, prototypes, assignments, scale, teacher=teacher, teacher_scale=TEACHER_SCALE), prototypical,
        (2, 4), lambda x, y: _prototypes(x, y) | {"teacher": unit(x, *x.shape)}, ("x", "scale", "prototypes"),
    ),
    "LightCLIP": Objective(lambda x, y, scale: losses().light_clip_loss(x, y, scale, soft=SOFT), softened, (3, 5)),
    "RankCLIP": Objective(lambda x, y, scale: losses().rank_clip_loss(x, y, scale), ranked, (3, 7), share=2, ties=True),
    "focal sigmoid": Objective(lambda x, y, scale: losses().focal_sigmoid_loss(x, y, scale, BIAS), focal, (1, 3)),
    "ProLIP": Objective(
        lambda x, y, scale, of_x, of_y: losses().prolip_loss(x, of_x, y, of_y, scale, BIAS), probabilistic,
        (1, 3), _variances, ("x", "y", "scale", "of_x", "of_y"),
    ),
    "Llip": Objective(
        lambda y, scale, keys, values, queries: losses().llip_loss(keys, values, queries, y, scale, BIAS), mixed,
        (2 * TOKENS + 1, 3 * (2 * TOKENS + 1)), _mixture, ("y", "scale", "keys", "values", "queries"), share=8,
    ),
    "grouping": Objective(
        packed_groups, grouped, (CAPTIONS**2, 3 * CAPTIONS**2), _groups, ("patches", "scale", "captions"), share=8,
    ),
}  # fmt: skip


def shapes(device: str, quick: bool) -> list[Shape]:
    """One for each objective, those of tokens with fewer pairs."""
    b, d = (64, 32) if quick else (8192, 512) if device == "cuda" else (2048, 256)
    dtype = torch.bfloat16 if device == "cuda" and not quick else torch.float32
    sizes = {name: b // objective.share for name, objective in OBJECTIVES.items()}
    return [Shape(f"{name} B={size} D={d}", dtype, {"objective": name, "b": size, "d": d}) for name, size in sizes.items()]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Pairs as in the contrastive cases, and what the objective draws."""
    objective = OBJECTIVES[shape.values["objective"]]
    drawn = dict(contrastive.pairs(shape, device, SCALE, None).inputs)
    drawn |= objective.draw(drawn["x"], drawn["y"])
    return Problem(shape, device, {name: value for name, value in drawn.items() if name in objective.trained or name not in ("x", "y")})


def _task(loss: Callable[..., Tensor], problem: Problem) -> Task:
    trained = OBJECTIVES[problem.shape.values["objective"]].trained
    leaves = {name: problem.inputs[name].detach().requires_grad_() for name in trained}
    given = {**problem.inputs, **leaves}
    return Task(lambda: loss(**given), leaves)


def _build(side: str, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        loss = getattr(OBJECTIVES[problem.shape.values["objective"]], side)
        return _task(torch.compile(loss, dynamic=False) if compiled else loss, problem)

    return build


def exact(problem: Problem) -> Exact:
    """The formula in float64. Where ties are rounded apart, also with features moved by a few roundings of float32."""
    objective = OBJECTIVES[problem.shape.values["objective"]]

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def found(nudge: float) -> dict[str, Tensor]:
        inputs = tree_map(wide, dict(problem.inputs))
        for name in objective.trained:
            inputs[name] = inputs[name] * (1 + nudge * torch.randn_like(inputs[name]))
        return results(_task(objective.eager, Problem(problem.shape, problem.device, inputs)), "forward+backward")

    right, undecided = found(0.0), {}
    if objective.ties:
        undecided = {name: 2 * ((value - right[name]).norm() / right[name].norm()).item() for name, value in found(2.0**-22).items()}
    features = next(name for name in objective.trained if name != "scale")
    terms = (problem.inputs[features].double() * right[features]).abs().sum() / SCALE
    return Exact(right, {"scale": terms}, undecided)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """The products of the objective; its features are read once, and with gradients written once."""
    objective, (b, d) = OBJECTIVES[problem.shape.values["objective"]], (problem.shape.values[name] for name in ("b", "d"))
    backward = mode == "forward+backward"
    moved = sum(problem.inputs[name].nbytes for name in objective.trained) * (2 if backward else 1)
    return objective.products[backward] * 2.0 * b * objective.columns(b) * d, float(moved)


CASE = Case(
    op="objectives",
    about="objectives of fastvlp.losses against their formulas over whole matrices, one size for each",
    formula="docstrings of fastvlp.losses",
    limit="3 products of 2 B B D for each matrix of similarities that has gradients, 1 for each of targets",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp", "ours", _build("ours"), "fastvlp"),
        Provider("eager", "eager", _build("eager")),
        Provider("torch.compile", "compiled", _build("eager", compiled=True), why_not=needs_compiler),
    ),
)
