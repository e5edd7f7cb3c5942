"""Small cases for pytest-benchmark: ``pytest benchmarks --benchmark-only``.

``--benchmark-autosave`` keeps a run under .benchmarks/, ``--benchmark-compare`` shows the last kept one beside this one, and with
``--benchmark-compare-fail=median:20%`` a slower median is the exit code. A provider that is wrong or fails is skipped with its reason;
ours fails instead. torch.compile, whose compiler takes longer than everybody else together, is in ``python -m benchmarks run`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import build, check_parity, results
from benchmarks.registry import OPS, Mode, find
from benchmarks.run import split_providers


def _cases() -> Iterator[Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op in OPS:
        case = find(op)
        shape = case.shapes(device.type, True)[0]
        for mode in case.modes:
            for provider in (p for p in split_providers(case, device)[0] if p.kind != "compiled"):
                yield pytest.param(op, shape, provider, mode, device, id=f"{op}-{mode}-{provider.name.replace(' ', '-')}")


@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize(("op", "shape", "provider", "mode", "device"), list(_cases()))
def test_case(benchmark: Any, op: str, shape: Any, provider: Any, mode: Mode, device: torch.device) -> None:
    case = find(op)
    problem = case.problem(shape, device)
    eager = next(p for p in case.providers if p.kind == "eager")
    tasks, left_out = build(list(dict.fromkeys((eager, provider))), problem)
    left_out |= check_parity(case, problem, tasks)[1]
    if left_out:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    benchmark.group = f"{op} {shape.name} {mode}"

    def once() -> None:
        results(tasks[provider.name], mode)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(once)
