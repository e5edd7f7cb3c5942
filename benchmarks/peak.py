"""How far memory grows during one call.

    python -m benchmarks.peak MODULE ARGUMENT...     in a process of its own, of the function that MODULE.task(ARGUMENT, ...) returns

Linux keeps a high-water mark of resident memory (VmHWM) that a process can reset by writing 5 to /proc/self/clear_refs; the mark less
the memory before the call is the answer: everything the call touched, scratch and results included.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import ROOT, environment

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory grew at most during one call, what it returned included; None where it cannot be measured.

    CUDA: the allocator's peak. CPU: resident memory, which only means something in a process that is warm and does nothing else.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del kept
        return peak - before
    if not _CLEAR.exists():
        return None
    _return_free_memory()
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    kept = call()
    peak = _resident("VmHWM")
    del kept
    return peak - before


def elsewhere(*command: str) -> int | None:
    """What ``python -m COMMAND...`` prints as its last line, {"extra_bytes": ...}.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    peak = json.loads(done.stdout.splitlines()[-1])["extra_bytes"]
    return None if peak is None else int(peak)


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


if __name__ == "__main__":
    module, *arguments = sys.argv[1:]
    task = importlib.import_module(module).task(*arguments)
    task()
    print(json.dumps({"extra_bytes": growth(task, torch.device("cpu"))}))
