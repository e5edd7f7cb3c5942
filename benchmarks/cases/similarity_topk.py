"""Exact nearest neighbours by inner product: the k most similar of N for each of M."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

CHUNK = 512
Search = Callable[[Tensor, Tensor, int], Tensor]


def shapes(device: str, quick: bool) -> list[Shape]:
    """Queries against a gallery: retrieval at 1, 10 and 64."""
    if quick:
        sizes, dtype = [(256, 1000, 64, 10), (512, 2000, 64, 1)], torch.float32
    elif device == "cuda":
        sizes, dtype = [(65_536, 65_536, 512, 10), (16_384, 1_000_000, 768, 10), (65_536, 65_536, 512, 64)], torch.bfloat16
    else:
        sizes, dtype = [(4096, 16_384, 256, 1), (4096, 16_384, 256, 10), (1024, 100_000, 256, 64)], torch.float32
    return [Shape(f"M={m} N={n} D={d} k={k}", dtype, {"m": m, "n": n, "d": d, "k": k}) for m, n, d, k in sizes]


def problem(shape: Shape, device: torch.device) -> Problem:
    """Unit vectors in random directions."""
    x, y = (F.normalize(torch.randn(shape.values[side], shape.values["d"], device=device), dim=1).to(shape.dtype) for side in ("m", "n"))
    return Problem(shape, device, {"x": x, "y": y})


def exact(problem: Problem) -> Exact:
    """The largest values in float64. Places are not compared: rounding may swap two that differ by less than it."""
    x, y, k = problem.inputs["x"], problem.inputs["y"].double(), problem.shape.values["k"]
    parts = [(x[i : i + CHUNK].double() @ y.T).topk(k, 1).values for i in range(0, len(x), CHUNK)]
    return Exact({"value": torch.cat(parts)})


def dense(x: Tensor, y: Tensor, k: int) -> Tensor:
    """One line with all similarities."""
    return (x @ y.T).float().topk(k, 1).values


def chunked(x: Tensor, y: Tensor, k: int) -> Tensor:
    """The same in chunks of rows, as evaluation scripts do where memory ends."""
    return torch.cat([dense(part, y, k) for part in x.split(CHUNK)])


def _ours(impl: str) -> Search:
    def search(x: Tensor, y: Tensor, k: int) -> Tensor:
        from fastvlp_kernels import similarity_topk

        return similarity_topk(x, y, k, impl=impl)[0]

    return search


def _task(search: Search, compiled: bool = False) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        call = torch.compile(search, dynamic=False) if compiled else search
        return Task(lambda: call(problem.inputs["x"], problem.inputs["y"], problem.shape.values["k"]), {})

    return build


def _faiss(problem: Problem) -> Task:
    """faiss's flat index of inner products, filled beforehand."""
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(problem.shape.values["d"])
    index.add(problem.inputs["y"].float().numpy())
    queries = problem.inputs["x"].float().numpy()
    return Task(lambda: torch.from_numpy(index.search(queries, problem.shape.values["k"])[0]), {})


def _faiss_why_not(device: torch.device) -> str:
    return "the flat index of faiss-cpu needs a CPU" if device.type != "cpu" else needs("faiss")(device)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """One product; both sides read once, values and places written."""
    m, n, d, k = (problem.shape.values[name] for name in ("m", "n", "d", "k"))
    return 2.0 * m * n * d, float((m + n) * d * problem.shape.dtype.itemsize + 12 * m * k)


CASE = Case(
    op="similarity_topk",
    about="the k most similar of N vectors for each of M, exactly",
    formula="the k largest <x_i, y_j> of every i, and their j",
    limit="1 product of 2 M N D",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp cpu", "ours", _task(_ours("cpu")), "fastvlp", always),
        Provider("fastvlp triton", "ours", _task(_ours("triton")), "fastvlp", needs("triton", cuda=True)),
        Provider("eager", "eager", _task(dense)),
        Provider("torch.topk in chunks", "eager", _task(chunked)),
        Provider("torch.compile", "compiled", _task(dense, compiled=True), why_not=needs_compiler),
        Provider("faiss-cpu", "rival", _faiss, "faiss-cpu", _faiss_why_not),
    ),
    modes=("forward",),
)
