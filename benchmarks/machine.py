"""What the numbers were measured on: the device's name, its limits, versions and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.rivals import version

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Limits:
    """The best rates that this device reached in this run. flops: per second, by dtype. copy: bytes read and written per second."""

    flops: dict[torch.dtype, float]
    copy: float

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The least time for that work: the larger of arithmetic and traffic."""
        return max(flops / self.flops[dtype], moved / self.copy)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """A short name that serves as folder: ``h200``, ``cpu-amd-epyc-2core``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace("nvidia", "")
    else:
        model = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
            model = found.group(1) if found else model
        name = f"cpu {re.sub(r'processor|cpu|@.*|[(]r[)]|[(]tm[)]', '', model.lower())} {cores()}core"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def load() -> float | None:
    """Processes that wanted to run over the last minute; timings with more than a small fraction of the cores in use are not clean."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def environment() -> dict[str, str]:
    """The environment of a process that imports this checkout, installed or not."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def commit() -> str:
    """The commit of the checkout, with ``+`` where tracked code differs from it; empty outside a repository."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return ""
    code = ["fastvlp", "kernels", "benchmarks", ":!benchmarks/results"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True, check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")


def describe(device: torch.device) -> dict[str, str | int]:
    """What every row carries about the machine and the software."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton") or "",
        "python": platform.python_version(),
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(function, device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def measure_limits(device: torch.device, dtypes: set[torch.dtype], quick: bool = False) -> Limits:
    """The best matrix-product rate of each dtype and the best copy rate, on random data.

    Products are square and as wide as memory-bound edges do not matter; copies are several times any cache.
    """
    sizes = (512,) if quick else (8192, 16384) if device.type == "cuda" else (2048, 4096)
    flops = {}
    for dtype in dtypes:
        rates = []
        for n in sizes:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty(n, n, device=device, dtype=dtype)
            rates.append(2 * n**3 / _best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, 2 if quick else 10))
        flops[dtype] = max(rates)
    count = 2**22 if quick else 2**30 if device.type == "cuda" else 2**26
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return Limits(flops, 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, 3 if quick else 10))
