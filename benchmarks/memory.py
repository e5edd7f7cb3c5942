"""Peak memory of one provider on the CPU, measured in a process of its own.

    python -m benchmarks.memory OP SHAPE PROVIDER MODE

Linux keeps a high-water mark of resident memory (VmHWM) that a process can reset by writing 5 to /proc/self/clear_refs.
The inputs are made, the provider is warmed up on a small problem (libraries, thread pools; torch.compile on the problem
itself, whose compiler would count otherwise), the mark is reset, one call is made while its results are kept, and the mark
less the memory before the call is the answer: everything the call touched, scratch and results included.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import torch

from benchmarks import registry
from benchmarks.measure import results

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def _return_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_growth(op: str, shape: str, provider_name: str, mode: registry.Mode) -> int | None:
    """Bytes; None on a system without /proc/self/clear_refs."""
    if not _CLEAR.exists():
        return None
    device = torch.device("cpu")
    case = registry.find(op)
    provider = case.find_provider(provider_name)
    task = provider.build(case.problem(case.find_shape(shape, "cpu"), device))
    warm = task if provider.kind == "compiled" else provider.build(case.problem(case.shapes("cpu", True)[0], device))
    results(warm, mode)
    _return_free_memory()
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    kept = results(task, mode)
    growth = _resident("VmHWM") - before
    del kept
    return growth


if __name__ == "__main__":
    op, shape, provider, mode = sys.argv[1:]
    print(json.dumps({"extra_bytes": peak_growth(op, shape, provider, "forward" if mode == "forward" else "forward+backward")}))
