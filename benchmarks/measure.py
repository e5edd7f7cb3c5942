"""Timing, parity and memory of the providers of one problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.machine import synchronise
from benchmarks.peak import elsewhere, growth
from benchmarks.registry import Case, Exact, InapplicableError, Mode, Problem, Provider, Task

# How much larger than eager's our error against float64 may be, relative to the norm of the result; below each dtype's own rounding.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float64: 1e-12}
# Past this the other side does not compute the same function.
DIFFERENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2, torch.float64: 1e-6}


class ParityError(AssertionError):
    """A provider's results differ from the exact ones by more than they may."""


@dataclass(frozen=True)
class Budget:
    """How long to measure one shape in one mode: at least ``min_rounds``, then until ``seconds`` have passed or ``max_rounds``."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = Budget(seconds=10, min_rounds=5, max_rounds=100)
QUICK = Budget(seconds=1, min_rounds=3, max_rounds=20)


def budget(quick: bool, seconds: float | None) -> Budget:
    """QUICK or FULL, with ``seconds`` where they are given."""
    chosen = QUICK if quick else FULL
    return chosen if seconds is None else replace(chosen, seconds=seconds)


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 <= q <= 100, with linear interpolation between the sorted samples."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def results(task: Task, mode: Mode) -> dict[str, Tensor]:
    """The value, and in "forward+backward" the gradient of every leaf; forward alone, or without leaves, runs without autograd."""
    if mode == "forward" or not task.leaves:
        with torch.no_grad():
            return {"value": task.forward()}
    value = task.forward()
    gradients = torch.autograd.grad(value, list(task.leaves.values()), task.upstream)
    return {"value": value.detach()} | dict(zip(task.leaves, gradients, strict=True))


def errors(task: Task, exact: Exact) -> dict[str, float]:
    """The relative error of the value and of every gradient that the provider has; NaN where something is NaN."""
    found = task.canonical(results(task, "forward+backward"))
    relative = {}
    for name, actual in found.items():
        right = exact.results[name].to(actual.device)
        size = exact.terms.get(name, right).to(actual.device).norm().clamp_min(torch.finfo(torch.float64).tiny)
        relative[name] = ((actual.detach().double() - right).norm() / size).item()
    return relative


def failure(error: Exception) -> str:
    """What went wrong, on one line."""
    lines = str(error).strip().splitlines() or [""]
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"fails: {type(error).__name__}: {lines[0][:200]}"


def build(providers: Sequence[Provider], problem: Problem) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks by name, and with the reason those that this size is not for, and rivals and compilers that cannot even begin."""
    tasks: dict[str, Task] = {}
    left_out: dict[str, str] = {}
    for provider in providers:
        try:
            tasks[provider.name] = provider.build(problem)
        except InapplicableError as reason:
            left_out[provider.name] = str(reason)
        except Exception as error:
            if provider.kind in ("ours", "eager"):
                raise
            left_out[provider.name] = failure(error)
    return tasks, left_out


def check_parity(case: Case, problem: Problem, tasks: Mapping[str, Task]) -> tuple[dict[str, float], dict[str, str]]:
    """Compare everybody with float64 before anything is timed.

    The worst relative error of each provider, and the others that are left out: rivals that fail or compute something else, and
    whoever else runs out of memory. Where eager did, ours only has to be the same function.

    Raises:
        ParityError: our error exceeds that of eager PyTorch in the same dtype by more than TOLERANCE, or eager itself is wrong.
    """
    exact, dtype = case.exact(problem), problem.shape.dtype
    worst: dict[str, float] = {}
    left_out: dict[str, str] = {}
    found: dict[str, dict[str, float]] = {}
    comparable = [p for p in case.providers if p.name in tasks and p.same_function]
    for provider in comparable:
        try:
            found[provider.name] = errors(tasks[provider.name], exact)
        except Exception as raised:
            if provider.kind == "ours" or (provider.kind == "eager" and not isinstance(raised, torch.OutOfMemoryError)):
                raise
            left_out[provider.name] = failure(raised)
    eager = found.get(next(p.name for p in comparable if p.kind == "eager"), {})
    for provider in [p for p in comparable if p.name in found]:
        worst[provider.name] = max(found[provider.name].values())
        for name, error in found[provider.name].items():
            allowed = eager[name] + TOLERANCE[dtype] if provider.kind == "ours" and eager else DIFFERENT[dtype]
            allowed += exact.undecided.get(name, 0.0)
            if error <= allowed:
                continue
            message = f"{name} is off by {error:.2e} of its size (allowed: {allowed:.2e}, eager: {eager.get(name, math.nan):.2e})"
            if provider.kind != "rival":
                raise ParityError(f"{case.op}, {problem.shape.name}, {provider.name}: {message}; nothing was timed")
            left_out.setdefault(provider.name, f"wrong: {message}")
    return worst, left_out


def interleave(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Who runs when: everybody once per round, and every round begins with the next one, so that drift falls on all alike."""
    return [[names[(start + i) % len(names)] for i in range(len(names))] for start in range(rounds)]


class Clock:
    """Times one call on a device, with the caches flushed before it: events on CUDA, the performance counter elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(2**28 if device.type == "cuda" else 2**27, dtype=torch.int8, device=device)

    def seconds(self, function: Callable[[], object]) -> float:
        """How long the call took on the device."""
        self._flush.fill_(1)
        synchronise(self.device)
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin


def sample(functions: Mapping[str, Callable[[], object]], clock: Clock, budget: Budget) -> dict[str, list[float]]:
    """Seconds of every call, by name, after one call of each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    for number, order in enumerate(interleave(list(functions), budget.max_rounds)):
        if number >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        for name in order:
            taken[name].append(clock.seconds(functions[name]))
    return taken


def paired_ratio(other: Sequence[float], this: Sequence[float]) -> float:
    """How many times faster this is than the other: the median over rounds, because both of a round met the same conditions."""
    return percentile([o / t for o, t in zip(other, this, strict=True)], 50)


def extra_bytes(case: Case, problem: Problem, provider: Provider, task: Task, mode: Mode) -> int | None:
    """Peak memory beyond the inputs, results included; None where it cannot be measured.

    CUDA: the allocator's peak. CPU: the growth of resident memory in a process of its own (benchmarks/memory.py).
    """
    if problem.device.type == "cuda":
        return growth(lambda: results(task, mode), problem.device)
    return elsewhere("benchmarks.memory", case.op, problem.shape.name, provider.name, mode)
