"""Random shapes, dtypes and options through every operator, against its reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastvlp_kernels as kernels

# Beyond the reference's own error in that dtype, relative to the norm of all outputs or all gradients. The tests measure accuracy; this
# looks for a wrong answer.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Results = Sequence[Tensor]
Given = dict[str, Any]  # leaves by name


@dataclass(frozen=True)
class Drawn:
    """One random call: ``leaves`` may take gradients, ``call(leaves, impl)`` gives a tensor or several; ``text`` says what was drawn."""

    text: str
    leaves: dict[str, Tensor]
    call: Callable[[Given, str | None], Tensor | Results]


class Dice:
    """Random numbers and tensors from one seed, on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.plain, self.device = random.Random(seed), device
        self._generator = torch.Generator().manual_seed(seed)

    def count(self, low: int, high: int) -> int:
        """Log-uniform between the two, so that edges and tiles both come up."""
        return min(high, int(low * (high / low + 1) ** self.plain.random()))

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.plain.random() < 0.4 else None

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator).to(self.device)

    def unit(self, *size: int) -> Tensor:
        return F.normalize(self.normal(*size), dim=-1)

    def positive(self, *size: int) -> Tensor:
        return (torch.rand(size, generator=self._generator) + 0.1).to(self.device)

    def whole(self, high: int, *size: int) -> Tensor:
        """Integers in 0..high - 1."""
        return torch.randint(high, size, generator=self._generator).to(self.device)

    def lengths(self) -> list[int]:
        """A few segments, some of them empty."""
        return [self.count(1, 70) if self.plain.random() < 0.8 else 0 for _ in range(self.count(1, 12))]

    def starts(self, lengths: Sequence[int]) -> Tensor:
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(self.device, torch.int32)


def _sizes(**values: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _matrix(dice: Dice) -> tuple[int, int, dict[str, Tensor]]:
    """M, N and the leaves that the three matrix operators share."""
    M, N, D = dice.count(2, 300), dice.count(2, 300), dice.count(1, 96)
    leaves = {"x": dice.unit(M, D), "y": dice.unit(N, D), "scale": torch.tensor(dice.plain.uniform(1, 50), device=dice.device)}
    for name, n in (("row_bias", M), ("col_bias", N)):
        if dice.plain.random() < 0.3:
            leaves[name] = dice.normal(n)
    return M, N, leaves


def _ids(dice: Dice, M: int, N: int, modes: Sequence[str]) -> dict[str, Any]:
    """Ids of few kinds (below zero: none), or nothing."""
    if dice.plain.random() < 0.5:
        return {}
    kinds = dice.count(1, 40) + 2
    return {"row_ids": dice.whole(kinds, M) - 1, "col_ids": dice.whole(kinds, N) - 1, "ids": dice.plain.choice(modes)}


def similarity_logsumexp(dice: Dice) -> Drawn:
    M, N, leaves = _matrix(dice)
    for name, n in (("row_scale", M), ("col_scale", N)):
        if dice.plain.random() < 0.3:
            leaves[name] = dice.positive(n)
    options = _ids(dice, M, N, ("exclude", "only", "both"))
    options |= {"offset": dice.plain.choice((None, 0, dice.plain.randint(-M, N))), "stash_bytes": dice.plain.choice((0, 1 << 30))}
    text = _sizes(M=M, N=N, D=leaves["x"].shape[1], ids=options.get("ids"), offset=options["offset"], stash=options["stash_bytes"])
    return Drawn(f"similarity_logsumexp {text} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.similarity_logsumexp(**given, **options, impl=impl))


def pairwise_sigmoid(dice: Dice) -> Drawn:
    M, N, leaves = _matrix(dice)
    leaves["bias"] = torch.tensor(-dice.plain.uniform(0, 12), device=dice.device)
    options = _ids(dice, M, N, ("positive", "exclude"))
    options |= {"row_weight": dice.maybe(lambda: dice.positive(M)), "col_weight": dice.maybe(lambda: dice.positive(N)),
                "offset": dice.plain.choice((None, 0, dice.plain.randint(-M, N)))}
    text = _sizes(M=M, N=N, D=leaves["x"].shape[1], ids=options.get("ids"), offset=options["offset"])
    return Drawn(f"pairwise_sigmoid {text} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.pairwise_sigmoid(**given, **options, impl=impl))


def similarity_attend(dice: Dice) -> Drawn:
    M, N, leaves = _matrix(dice)
    leaves["v"] = dice.normal(N, dice.count(1, 64))
    options = _ids(dice, M, N, ("exclude", "only"))
    text = _sizes(M=M, N=N, D=leaves["x"].shape[1], E=leaves["v"].shape[1], ids=options.get("ids"))
    return Drawn(f"similarity_attend {text} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.similarity_attend(**given, **options, impl=impl))


def maxsim(dice: Dice) -> Drawn:
    xs, ys, D = dice.lengths(), dice.lengths(), dice.count(1, 64)
    leaves = {"x": dice.unit(sum(xs), D), "y": dice.unit(sum(ys), D)}
    reduce, cu_x, cu_y = dice.plain.choice(("mean", "sum")), dice.starts(xs), dice.starts(ys)
    return Drawn(f"maxsim {_sizes(x=xs, y=ys, D=D, reduce=reduce)}", leaves,
                 lambda given, impl: kernels.maxsim(given["x"], cu_x, given["y"], cu_y, reduce=reduce, impl=impl))


def packed_attention(dice: Dice) -> Drawn:
    keys = dice.lengths()
    queries = keys if dice.plain.random() < 0.6 else [dice.count(1, 40) for _ in keys]
    heads_k, width = dice.count(1, 4), dice.count(1, 32)
    heads, T = heads_k * dice.count(1, 3), sum(keys)
    leaves = {"q": dice.normal(sum(queries), heads, width), "k": dice.normal(T, heads_k, width), "v": dice.normal(T, heads_k, width)}
    options: dict[str, Any] = {"causal": dice.plain.random() < 0.4, "return_key_mass": dice.plain.random() < 0.4}
    options["key_size"] = dice.maybe(lambda: dice.whole(4, T).float())
    if dice.plain.random() < 0.3:
        leaves["key_bias"] = dice.normal(T)
    if options["causal"]:
        options["prefix_len"] = dice.maybe(lambda: torch.minimum(dice.whole(30, len(keys)), torch.tensor(keys).to(dice.device)))
    cu_q, cu_k = dice.starts(queries), dice.starts(keys)
    if dice.plain.random() < 0.3:
        types = dice.count(1, 5)
        options |= {"token_type": dice.whole(types, sum(queries)), "token_type_k": dice.whole(types, T)}
        options["sees"] = dice.whole(2, types, types).bool()

    drawn = [name for name, value in options.items() if value is not None and value is not False]
    return Drawn(f"packed_attention {_sizes(q=queries, k=keys, H=heads, Hkv=heads_k, d=width)} {' '.join(drawn)}", leaves,
                 lambda given, impl: kernels.packed_attention(**given, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options, impl=impl))


def merge_plan(dice: Dice) -> Drawn:
    """Matching and merging; the metric's products are exact in every dtype, so that ties are ties for everybody."""
    lengths = dice.lengths()
    T, D = sum(lengths), dice.count(4, 32)
    places = dice.positive(T, D).topk(4, 1).indices
    metric = torch.zeros(T, D, device=dice.device).scatter_(1, places, (2 * dice.whole(2, T, 4) - 1).float())
    how_many = {"r": dice.plain.choice((0, dice.count(1, 30), dice.plain.random(), dice.whole(20, len(lengths)).cpu()))}
    options: dict[str, Any] = how_many if dice.plain.random() < 0.7 else {"threshold": dice.plain.choice((0.25, 0.5))}
    options |= {"protected": dice.plain.choice((0, 0, 1, 2)), "keep_order": dice.plain.random() < 0.7}
    size, mode, cu = dice.maybe(lambda: dice.whole(4, T).float() + 1), dice.plain.choice(("mean", "sum", "amax")), dice.starts(lengths)

    def call(given: Given, impl: str | None) -> Results:
        plan = kernels.merge_plan(metric, cu, **options, lengths=torch.tensor(lengths), impl=impl)
        merged, sizes = plan.merge(given["x"], size, mode)
        return plan.source, plan.order, plan.cu_seqlens, merged, sizes, plan.unmerge(merged)

    return Drawn(f"merge_plan {_sizes(lengths=lengths, D=D, mode=mode, **options)}", {"x": dice.normal(T, dice.count(1, 40))}, call)


def token_select(dice: Dice) -> Drawn:
    lengths = dice.lengths()
    T = sum(lengths)
    scores, cu = dice.whole(9, T).float(), dice.starts(lengths)  # many ties
    keep = dice.plain.choice((dice.count(1, 40), dice.plain.random(), dice.whole(30, len(lengths)).cpu()))
    protected = dice.plain.choice((0, 0, 1, 3))

    def call(given: Given, impl: str | None) -> Results:
        kept = kernels.token_select(scores, cu, keep, lengths=torch.tensor(lengths), protected=protected, impl=impl)
        return kept.index, kept.cu_seqlens, kept.take(given["x"])

    return Drawn(f"token_select {_sizes(lengths=lengths, keep=keep, protected=protected)}", {"x": dice.normal(T, dice.count(1, 40))}, call)


def segment_pool(dice: Dice) -> Drawn:
    lengths = dice.lengths()
    leaves = {"x": dice.normal(sum(lengths), dice.count(1, 80))}
    if dice.plain.random() < 0.4:
        leaves["weight"] = dice.positive(sum(lengths))
    mode = "mean" if "weight" in leaves else dice.plain.choice(("mean", "max"))
    cu = dice.starts(lengths)

    host = torch.tensor(lengths)
    return Drawn(f"segment_pool {_sizes(lengths=lengths, mode=mode, C=leaves['x'].shape[1])} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.segment_pool(given["x"], cu, mode, given.get("weight"), lengths=host, impl=impl))


def patch_embed(dice: Dice) -> Drawn:
    P, C = dice.plain.choice((1, 2, 4, 7)), dice.count(1, 40)
    grid = torch.tensor([[dice.count(1, 9), dice.count(1, 9)] for _ in range(dice.count(1, 8))])
    patches = int(grid.prod(1).sum())
    pixels = dice.whole(256, 3 * P * P * patches).to(torch.uint8)
    leaves = {"weight": dice.normal(C, 3 * P * P)}
    if dice.plain.random() < 0.5:
        leaves["bias"] = dice.normal(C)
    positions = dice.plain.choice((None, "rows and columns", "grid"))
    if positions == "rows and columns":
        leaves |= {"rows": dice.normal(12, C), "cols": dice.normal(12, C)}
    elif positions == "grid":
        leaves["grid"] = dice.normal(dice.count(1, 8), dice.count(1, 8), C)
    rotary = dice.plain.choice((10.0, 10_000.0)) if C % 4 == 0 else None
    keep = None if dice.plain.random() < 0.5 else (dice.positive(patches).cpu() < 0.6).nonzero().squeeze(1)

    def call(given: Given, impl: str | None) -> Results:
        tables = (given["rows"], given["cols"]) if positions == "rows and columns" else given.get("grid")
        out = kernels.patch_embed(pixels, grid * P, given["weight"], given.get("bias"), patch_size=P, mean=0.5, std=(0.5, 0.4, 0.3),
                                  positions=tables, rotary=rotary, keep=keep, impl=impl)  # fmt: skip
        assert out.pos is not None
        return out.x, out.pos, out.cu_seqlens

    kept = None if keep is None else len(keep)
    sizes = _sizes(grid=grid.tolist(), P=P, C=C, positions=positions, rotary=rotary, kept=kept)
    return Drawn(f"patch_embed {sizes} {' '.join(leaves)}", leaves, call)


def linear_cross_entropy(dice: Dice) -> Drawn:
    T, V, D = dice.count(1, 300), dice.count(1, 2000), dice.count(1, 64)
    leaves = {"x": dice.normal(T, D), "weight": dice.normal(V, D) * D**-0.5}
    if dice.plain.random() < 0.5:
        leaves["bias"] = dice.normal(V)
    targets, listed = dice.whole(V, T), dice.plain.random() < 0.3
    options: dict[str, Any] = {"label_smoothing": dice.plain.choice((0.0, 0.1)), "z_loss": dice.plain.choice((0.0, 0.01)),
                               "reduction": dice.plain.choice(("mean", "sum", "none")),
                               "classes": torch.cat((targets, dice.whole(V, 20))).unique() if listed else None}  # fmt: skip
    targets = targets.masked_fill(dice.positive(T) < 0.1 + 0.5 * dice.plain.random(), -100)
    text = _sizes(T=T, V=V, D=D, **{name: value for name, value in options.items() if name != "classes"}, listed=listed)
    return Drawn(f"linear_cross_entropy {text} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.linear_cross_entropy(**given, targets=targets, **options, impl=impl))


def similarity_topk(dice: Dice) -> Drawn:
    """Features of small whole numbers, whose products are exact in every dtype, so that ties are ties for everybody."""
    M, N, D, k = dice.count(1, 300), dice.count(1, 3000), dice.count(1, 24), dice.count(1, 100)
    leaves = {"x": dice.whole(5, M, D).float() - 2, "y": dice.whole(5, N, D).float() - 2}
    options = _ids(dice, M, N, ("exclude",))
    options |= {"offset": dice.plain.choice((None, 0, dice.plain.randint(-M, N))), "columns": dice.plain.random() < 0.5}
    text = _sizes(M=M, N=N, D=D, k=k, ids=options.pop("ids", None), offset=options["offset"], columns=options["columns"])
    return Drawn(f"similarity_topk {text}", leaves, lambda given, impl: kernels.similarity_topk(**given, k=k, **options, impl=impl))


def residual_norm(dice: Dice) -> Drawn:
    T, C = dice.count(1, 300), dice.count(3, 400)
    leaves = {"x": dice.normal(T, C), "v": dice.normal(T, C), "weight": dice.normal(C)}
    leaves |= {name: dice.normal(C) for name in ("bias", "gamma") if dice.plain.random() < 0.5}
    kind = dice.plain.choice(("layer", "rms"))

    def call(given: Given, impl: str | None) -> Results:
        vectors = (given["weight"], given.get("bias"))
        return kernels.residual_norm(given["x"], given["v"], *vectors, gamma=given.get("gamma"), kind=kind, impl=impl)

    return Drawn(f"residual_norm {_sizes(T=T, C=C, kind=kind)} {' '.join(leaves)}", leaves, call)


def bias_activation(dice: Dice) -> Drawn:
    T, H, kind = dice.count(1, 300), 2 * dice.count(1, 300), dice.plain.choice(("gelu", "geglu", "relu2"))
    leaves = {"x": dice.normal(T, H)} | ({"bias": dice.normal(H)} if dice.plain.random() < 0.7 else {})
    return Drawn(f"bias_activation {_sizes(T=T, H=H, kind=kind)} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.bias_activation(given["x"], given.get("bias"), kind, impl=impl))


def grouped_linear(dice: Dice) -> Drawn:
    T, width, out, types = dice.count(1, 300), dice.count(1, 64), dice.count(1, 64), dice.count(1, 5)
    leaves = {"x": dice.normal(T, width), "weight": dice.normal(types, out, width) * width**-0.5}
    leaves |= {"bias": dice.normal(types, out)} if dice.plain.random() < 0.5 else {}
    kinds = dice.whole(types, T)
    return Drawn(f"grouped_linear {_sizes(T=T, width=width, out=out, types=types)} {' '.join(leaves)}", leaves,
                 lambda given, impl: kernels.grouped_linear(**given, types=kinds, impl=impl))


def bi_wkv(dice: Dice) -> Drawn:
    lengths, H, K, V = dice.lengths(), dice.count(1, 4), dice.count(1, 40), dice.count(1, 40)
    T, starts, scale = sum(lengths), dice.starts(lengths), dice.plain.uniform(0.1, 2)
    leaves = {name: dice.normal(T, H, width) for name, width in (("r", K), ("k", K), ("v", V), ("w", K))} | {"u": dice.normal(H, K)}
    return Drawn(f"bi_wkv {_sizes(lengths=lengths, H=H, K=K, V=V, scale=round(scale, 2))}", leaves,
                 lambda given, impl: kernels.bi_wkv(**given, cu_seqlens=starts, scale=scale, impl=impl))


OPERATORS = (similarity_logsumexp, pairwise_sigmoid, similarity_attend, maxsim, packed_attention, patch_embed, merge_plan, token_select,
             segment_pool, linear_cross_entropy, similarity_topk, residual_norm, bias_activation,
             grouped_linear, bi_wkv)  # fmt: skip
# What a dtype is drawn for; scalars, biases and sizes stay in float32.
_FEATURES = ("x", "y", "v", "q", "k", "r", "weight", "rows", "cols", "grid")


def case(seed: int, folder: Path, device: torch.device) -> int:
    """One random call of one operator; returns the number of faults survived, none.

    Raises:
        AssertionError: the operator and its reference disagree; the message says what was called.
    """
    dice = Dice(seed, device)
    drawn = OPERATORS[seed % len(OPERATORS)](dice)
    dtype = dice.plain.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    leaves = {name: x.to(dtype) if name in _FEATURES else x for name, x in drawn.leaves.items()}
    weights: list[Tensor] = []
    exact, ours, same = (_run(drawn, leaves, impl, double, weights, dice) for impl, double in
                         (("reference", True), (None, False), ("reference", False)))  # fmt: skip
    for what, mine, eager, true in zip(("outputs", "gradients"), ours, same, exact, strict=True):
        _compare(f"{drawn.text}, {dtype}: {what}", mine, eager, true, ALLOWED[dtype])
    return 0


def _run(
    drawn: Drawn, leaves: dict[str, Tensor], impl: str | None, double: bool, weights: list[Tensor], dice: Dice
) -> tuple[Results, Results]:
    """Outputs and, where all of them are finite, gradients of their weighted sum; the first call draws the weights."""
    given = {name: (x.double() if double else x.clone()).requires_grad_() for name, x in leaves.items()}
    found = drawn.call(given, impl)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    differentiable = [out for out in outputs if out.requires_grad]
    if not weights:
        weights += [dice.normal(*out.shape) for out in differentiable]
    gradients: Results = []
    if differentiable and all(out.isfinite().all() for out in differentiable):
        total = torch.stack([(out.double() * weight.double()).sum() for out, weight in zip(differentiable, weights, strict=True)]).sum()
        gradients = list(torch.autograd.grad(total, list(given.values()), allow_unused=True, materialize_grads=True))
    return [out.detach() for out in outputs], gradients


def _compare(name: str, ours: Results, same: Results, exact: Results, allowed: float) -> None:
    """Integers equal, infinities at the same places, and the rest together no worse than the reference in the same dtype."""
    assert len(ours) == len(exact), f"{name}: {len(ours)} of {len(exact)} are there"
    parts: list[list[Tensor]] = [[], [], []]
    for k, (mine, eager, true) in enumerate(zip(ours, same, exact, strict=True)):
        assert mine.shape == true.shape, f"{name}: number {k} has shape {tuple(mine.shape)}, not {tuple(true.shape)}"
        finite = true.isfinite()
        assert torch.equal(mine[~finite].double(), true[~finite].double()), f"{name}: number {k} differs where it is not finite"
        if not true.is_floating_point():
            assert torch.equal(mine, true), f"{name}: number {k} differs at {int((mine != true).nonzero()[0, 0])}"
            continue
        for part, value in zip(parts, (mine, eager, true), strict=True):
            part.append(value[finite].double())
    if not parts[0]:
        return
    mine, eager, true = (torch.cat(part) for part in parts)
    size = true.norm().clamp_min(1e-30)
    error, other = ((mine - true).norm() / size).item(), ((eager - true).norm() / size).item()
    assert error <= other + allowed, f"{name}: off by {error:.2e} of their norm (the reference in that dtype: {other:.2e})"
