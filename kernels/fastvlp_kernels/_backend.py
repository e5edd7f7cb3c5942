"""What is installed, what a device can run, and which implementation computes an operator."""

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence

import torch

# Kernels of others that need a CUDA device: their import packages, and how to get them.
LIBRARIES = {
    "flash-attn": ("flash_attn", "pip install flash-attn --no-build-isolation, or pip install flash-attn-4"),
    "xformers": ("xformers", "pip install xformers"),
}


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def interpreting() -> bool:
    """True when Triton runs its kernels in Python on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(impl: str, device: torch.device) -> str:
    """The reason why ``impl`` cannot run on ``device`` here; an empty string when it can."""
    if impl == "triton":
        if not _installed("triton"):
            return "Triton is not installed: pip install 'fastvlp[cuda]'"
        if device.type != "cuda" and not interpreting():
            return f"Triton needs a CUDA device and the tensors are on {device.type} (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    elif impl == "cuda":
        if not _installed("cupy"):
            return "CuPy is not installed: pip install 'fastvlp[cuda]'"
        if device.type != "cuda":
            return f"it needs a CUDA device and the tensors are on {device.type}"
    elif impl in LIBRARIES:
        package, how = LIBRARIES[impl]
        if not _installed(package):
            return f"{package} is not installed: {how}"
        if device.type != "cuda":
            return f"it needs a CUDA device and the tensors are on {device.type}"
        # flash-attn ships no code for older chips; xformers does.
        if impl != "xformers" and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a CUDA device of compute capability 8.0 (A100) or more"
    return ""


def choose(op: str, impl: str | None, device: torch.device, implementations: Sequence[str]) -> str:
    """The implementation that computes ``op`` on ``device``.

    ``implementations`` is in order of preference; the first that can run is taken unless ``impl`` or the
    environment variable FASTVLP_IMPL names one.

    Raises:
        ValueError: the name is not one of ``implementations``.
        RuntimeError: it is, but cannot run here.
    """
    named = impl if impl is not None else os.environ.get("FASTVLP_IMPL")
    if named is None:
        # The list is by preference and holds one that runs everywhere, so there always is a first.
        return next(name for name in implementations if not why_not(name, device))
    if named not in implementations:
        source = "impl" if impl is not None else "FASTVLP_IMPL"
        raise ValueError(f"{op}: {source}={named!r} is unknown; allowed: {', '.join(implementations)}")
    # An implementation that was asked for by name is never silently replaced: a measurement would then be of something else.
    reason = why_not(named, device)
    if reason:
        raise RuntimeError(f"{op}: impl={named!r} cannot run here: {reason}")
    return named


def explain(operators: Mapping[str, Sequence[str]], device: torch.device) -> list[dict[str, str]]:
    """One row per operator: what would compute it on ``device`` and why the preferred ones would not."""
    rows = []
    for op, implementations in operators.items():
        chosen = choose(op, None, device, implementations)
        passed = implementations[: list(implementations).index(chosen)]
        rows.append({"op": op, "impl": chosen, "why": "; ".join(f"not {name}: {why_not(name, device)}" for name in passed)})
    return rows
