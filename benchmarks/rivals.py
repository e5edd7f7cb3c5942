"""The other packages that the benchmarks and tests compare with: which are installed, and how to import them."""

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType
from typing import Any

import torch

_kept_alive: list[torch.library.Library] = []


def version(distribution: str) -> str | None:
    """The installed version of a distribution such as ``open_clip_torch``; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_torchvision() -> None:
    """torchvision, also where its compiled operators were built for another torch, for packages that import it.

    It registers meta kernels for its operators ``nms`` and ``qnms``; where its compiled library does not load, these do not exist and the
    import fails. They are declared here, without a kernel.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        importlib.import_module("torchvision")


def import_open_clip() -> ModuleType:
    """open_clip, after torchvision.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise ModuleNotFoundError("open_clip is not installed; install it with: pip install 'fastvlp[bench]'")
    import_torchvision()
    return importlib.import_module("open_clip")


def clip_loss(fused: bool, **options: Any) -> Any:
    """CLIP's loss with these constructor arguments: ours (``fused``) or open_clip's own."""
    if fused:
        from fastvlp.losses import ClipLoss

        return ClipLoss(**options)
    import_open_clip()
    return importlib.import_module("open_clip.loss").ClipLoss(**options)
