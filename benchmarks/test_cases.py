"""Small cases for pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import check_parity, results
from benchmarks.registry import OPS, Mode, find
from benchmarks.run import split_providers


def _cases() -> Iterator[Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op in OPS:
        case = find(op)
        shape = case.shapes(device.type, True)[0]
        for mode in case.modes:
            for provider in split_providers(case, device)[0]:
                yield pytest.param(op, shape, provider, mode, device, id=f"{op}-{mode}-{provider.name.replace(' ', '-')}")


@pytest.mark.parametrize(("op", "shape", "provider", "mode", "device"), _cases())
def test_case(benchmark: Any, op: str, shape: Any, provider: Any, mode: Mode, device: torch.device) -> None:
    case = find(op)
    problem = case.problem(shape, device)
    eager = next(p for p in case.providers if p.kind == "eager")
    tasks = {p.name: p.build(problem) for p in dict.fromkeys((eager, provider))}
    _, left_out = check_parity(case, problem, tasks)
    assert not left_out
    benchmark.group = f"{op} {shape.name} {mode}"

    def once() -> None:
        results(tasks[provider.name], mode)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(once)
