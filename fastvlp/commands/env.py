"""What is installed, which devices there are, and which implementation each operator would use."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import pkgutil
import platform

import torch

import fastvlp
import fastvlp_kernels
from fastvlp_kernels._backend import explain

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "pillow", "pyyaml", "matplotlib", "tensorboard", "wandb",
            "cupy", "flash-attn", "xformers", "open_clip_torch", "timm")


def command(options: argparse.Namespace) -> int:
    """Print the report."""
    print(report())
    return 0


def operators() -> dict[str, tuple[str, ...]]:
    """Implementations of every operator of ``fastvlp_kernels``, in order of preference."""
    found = {}
    for module in pkgutil.iter_modules(fastvlp_kernels.__path__):
        if module.ispkg and not module.name.startswith("_"):
            # Asked from the modules, so that a new operator appears here by itself.
            found[module.name] = tuple(importlib.import_module(f"fastvlp_kernels.{module.name}.op").IMPLEMENTATIONS)
    return found


def devices() -> list[torch.device]:
    """The CPU, and the first CUDA device if there is one (all of them run the same implementations)."""
    return [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> str:
    """The whole report as text, to be pasted into an issue."""
    lines = [f"python          {platform.python_version()}, {platform.platform()}"]
    lines.append(f"fastvlp         {fastvlp.__version__}")
    lines += [f"{package:<16}{version(package) or '-'}" for package in PACKAGES]
    capability = torch.backends.cpu.get_cpu_capability()
    lines.append(f"\nCPU             {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads ({capability})")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            architecture = f"sm_{properties.major}{properties.minor}"
            lines.append(f"cuda:{index}          {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {architecture}")
    else:
        reason = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch finds none"
        lines.append(f"CUDA            no device ({reason})")
    for name in ("FASTVLP_IMPL", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            lines.append(f"{name}={os.environ[name]}")
    for device in devices():
        lines.append(f"\noperators on {device.type} (impl=None):")
        for row in explain(operators(), device):
            lines.append(f"  {row['op']:<24}{row['impl']:<11}{row['why']}".rstrip())
    forced = os.environ.get("FASTVLP_IMPL")
    if forced:
        lines.append(f"\nFASTVLP_IMPL={forced} overrides this in this process")
    return "\n".join(lines)
