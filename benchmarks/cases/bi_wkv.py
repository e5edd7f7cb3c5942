"""RWKV-CLIP's bidirectional linear attention over packed images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, needs, needs_compiler

NAMES = ("r", "k", "v", "w", "u")
CHUNK = 32  # of the count of operations

Function = Callable[..., Tensor]  # of r, k, v, w and u


def shapes(device: str, quick: bool) -> list[Shape]:
    """Images of 14 x 14 patches: the one of TARGETS, 10 heads of 64, on GPUs."""
    if quick:
        sizes, dtype = [(2, 50, 2, 16)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(256, 196, 10, 64), (256, 196, 8, 80)], torch.bfloat16
    else:
        sizes, dtype = [(16, 196, 6, 64)], torch.float32
    return [Shape(f"B={b} T={n} H={h} K={k}", dtype, {"b": b, "n": n, "h": h, "k": k}) for b, n, h, k in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Normally distributed; rates of decay exp(w) about 0.1."""
    b, n, h, k = (shape.values[name] for name in ("b", "n", "h", "k"))
    inputs = {name: torch.randn(b * n, h, k, device=device) for name in NAMES[:4]} | {"u": torch.randn(h, k, device=device)}
    inputs["w"] = inputs["w"] / 2 - 2
    inputs["upstream"] = torch.randn(b * n, h, k, device=device)
    return Problem(shape, device, {name: x.to(shape.dtype) for name, x in inputs.items()})


def _steps(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """[B, N, H, K] token after token, a state in each direction."""
    out, decay = (r * u * k).sum(-1, keepdim=True) * v, torch.exp(-torch.exp(w))
    for step in (1, -1):
        rows, state = [], k.new_zeros(*k[:, 0].shape, v.shape[-1])
        for r_, k_, v_, d_ in list(zip(*(x.unbind(1) for x in (r, k, v, decay)), strict=True))[::step]:
            rows.append((r_[..., None, :] @ state)[..., 0, :])
            state = d_[..., None] * state + k_[..., None] * v_[..., None, :]
        out = out + torch.stack(rows[::step], 1)
    return out


def _dense(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """[B, N, H, K] with all pairs of tokens, one image after the other, as the decay of each pair and channel is N N H K numbers."""
    rows = []
    for r_, k_, v_, w_ in zip(r, k, v, w, strict=True):
        past = F.pad(-torch.exp(w_), (0, 0, 0, 0, 1, 0)).cumsum(0)
        t = torch.arange(len(v_), device=v.device)
        forward = past[:-1, None] - past[None, 1:]
        log = torch.where((t[:, None] > t)[..., None, None], forward, forward.transpose(0, 1))
        weight = torch.where((t[:, None] == t)[..., None, None], u, torch.exp(log))
        rows.append(torch.einsum("thk,tshk,shk,shv->thv", r_, weight, k_, v_))
    return torch.stack(rows)


def exact(problem: Problem) -> Exact:
    """The recurrence in float64."""
    leaves = [problem.inputs[name].double().requires_grad_() for name in NAMES]
    value = _padded(problem, _steps)(*leaves)
    gradients = torch.autograd.grad(value, leaves, problem.inputs["upstream"].double())
    return Exact({"value": value.detach()} | dict(zip(NAMES, gradients, strict=True)))


def _padded(problem: Problem, function: Function) -> Function:
    """Of packed tensors [B N, H, K], one of [B, N, H, K]."""
    shape = (problem.shape.values["b"], problem.shape.values["n"])

    def run(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return function(*(x.unflatten(0, shape) for x in (r, k, v, w)), u).flatten(0, 1)

    return run


def _task(problem: Problem, run: Function) -> Task:
    leaves = {name: problem.inputs[name].detach().requires_grad_() for name in NAMES}
    return Task(lambda: run(*leaves.values()), leaves, problem.inputs["upstream"])


def _ours(impl: str) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        from fastvlp_kernels import bi_wkv

        b, n = problem.shape.values["b"], problem.shape.values["n"]
        starts, lengths = torch.arange(0, b * n + 1, n, dtype=torch.int32, device=problem.device), torch.full((b,), n)
        return _task(problem, lambda r, k, v, w, u: bi_wkv(r, k, v, w, u, starts, lengths=lengths, impl=impl))

    return build


def _eager(function: Function, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        run = torch.compile(function, dynamic=False) if compiled else function
        return _task(problem, _padded(problem, run))

    return build


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """Chunks of 32 tokens: states made and read in both directions, and products with one another; backward twice as much."""
    b, n, h, k = (problem.shape.values[name] for name in ("b", "n", "h", "k"))
    elements, backward = b * n * h * k, mode == "forward+backward"
    flops = 2.0 * elements * (4 * k + 2 * CHUNK)
    # r, k, v, w read and y written; backward these and dy read and four gradients written
    return flops * (3 if backward else 1), float(problem.inputs["v"].element_size() * elements * (5 + 9 * backward))


CASE = Case(
    op="bi_wkv",
    about="bidirectional WKV of RWKV-CLIP, decay by channel and token",
    formula="r_t (sum_{s<t} D(s,t) k_s v_s' + u k_t v_t' + sum_{s>t} D(t,s) k_s v_s'), D(a,b) = prod_{a<j<b} exp(-exp(w_j))",
    limit="5 T H K elements moved forward, 9 backward (2 T H K (4 K + 64) operations and twice that)",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp"),
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("eager recurrence", "eager", _eager(_steps)),
        Provider("eager all pairs", "eager", _eager(_dense)),
        Provider("torch.compile all pairs", "compiled", _eager(_dense, True), why_not=needs_compiler),
    ),
)
