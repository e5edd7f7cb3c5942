"""Peak memory of one provider on the CPU, measured in a process of its own.

    python -m benchmarks.memory OP SHAPE PROVIDER MODE

The inputs are made, the provider is warmed up on a small problem (libraries, thread pools; torch.compile on the problem
itself, whose compiler would count otherwise), and the growth of memory during one call is printed (benchmarks/peak.py).
"""

from __future__ import annotations

import contextlib
import json
import sys

import torch

from benchmarks import registry
from benchmarks.measure import results
from benchmarks.peak import growth


def peak_growth(op: str, shape: str, provider_name: str, mode: registry.Mode) -> int | None:
    """Bytes; None on a system without /proc/self/clear_refs."""
    device = torch.device("cpu")
    case = registry.find(op)
    provider = case.find_provider(provider_name)
    task = provider.build(case.problem(case.find_shape(shape, "cpu"), device))
    results(task if provider.kind == "compiled" else _small(case, provider, device) or task, mode)
    return growth(lambda: results(task, mode), device)


def _small(case: registry.Case, provider: registry.Provider, device: torch.device) -> registry.Task | None:
    """The first small size that the provider is for."""
    for shape in case.shapes(device.type, True):
        with contextlib.suppress(registry.InapplicableError):
            return provider.build(case.problem(shape, device))
    return None


if __name__ == "__main__":
    op, shape, provider, mode = sys.argv[1:]
    print(json.dumps({"extra_bytes": peak_growth(op, shape, provider, "forward" if mode == "forward" else "forward+backward")}))
