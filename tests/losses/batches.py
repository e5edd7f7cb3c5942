"""Batches of pairs for the tests of the losses, the losses' mathematics written out, and what the processes of a group do with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.losses import ClipLoss, SigLipLoss

LOSSES = {"clip": ClipLoss, "siglip": SigLipLoss}
ALL = [(loss, strategy) for loss in LOSSES for strategy in ("gather", "ring", "grouped")]
INPUTS = ("image", "text", "scale", "bias")


def node_size(processes: int) -> int:
    """Nodes of two, or one node."""
    return processes if processes % 2 else 2


def dense(loss: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of the whole batch by its textbook formula."""
    logits = scale * image @ text.T + bias
    if loss == "siglip":
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        return F.softplus(-signs * logits).sum() / len(logits)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@dataclass(frozen=True)
class Batch:
    """A batch of sum(sizes) pairs of normalised features; ``likeness`` is the share of the image in its text.

    ``trains`` names the inputs that need a gradient; ``told``: whether the loss is told the sizes. ``node_size``: of "grouped"; left
    out, nodes of two, or of all where the number of processes is odd. ``exact``: features are multiples of 1/64, so that similarities have
    no rounding of their own in float32, in whatever order a CPU adds.
    """

    loss: str
    sizes: tuple[int, ...]
    strategy: str = "gather"
    width: int = 12
    scale: float = 10.0
    bias: float = -3.0
    likeness: float = 0.5
    dtype: torch.dtype = torch.float32
    trains: tuple[str, ...] = INPUTS
    told: bool = False
    seed: int = 0
    node_size: int | None = None
    exact: bool = False

    def module(self, **options: Any) -> nn.Module:
        """The loss of one process."""
        if self.strategy == "grouped":
            options["node_size"] = self.node_size or node_size(len(self.sizes))
        return LOSSES[self.loss](strategy=self.strategy, **options)

    def tensors(self) -> dict[str, Tensor]:
        """The whole batch: features in ``dtype``, scale and bias in float32 (float64 for float64)."""
        generator = torch.Generator().manual_seed(self.seed)
        image, noise = (torch.randn(sum(self.sizes), self.width, generator=generator, dtype=torch.float64) for _ in range(2))
        text = self.likeness * image + (1 - self.likeness) * noise
        scalars = torch.float64 if self.dtype == torch.float64 else torch.float32
        image, text = (F.normalize(side, dim=1) for side in (image, text))
        if self.exact:
            image, text = ((side * 64).round() / 64 for side in (image, text))
        return {
            "image": image.to(self.dtype),
            "text": text.to(self.dtype),
            "scale": torch.tensor(self.scale, dtype=scalars),
            "bias": torch.tensor(self.bias, dtype=scalars),
        }

    def whole(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Loss and gradients of the whole batch on one process by the textbook formula, computed in ``dtype``."""
        tensors = {name: tensor.to(dtype).requires_grad_(name in self.trains) for name, tensor in self.tensors().items()}
        loss = dense(self.loss, **tensors)
        loss.backward()
        return {"loss": loss.detach()} | {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}

    def share(self, rank: int) -> dict[str, Tensor]:
        """The tensors of one process, as leaves."""
        start = sum(self.sizes[:rank])
        tensors = self.tensors()
        for name in ("image", "text"):
            tensors[name] = tensors[name][start : start + self.sizes[rank]].clone()
        return {name: tensor.requires_grad_(name in self.trains) for name, tensor in tensors.items()}

    def call(self, place: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One process's loss, and its inputs."""
        tensors = self.share(place)
        return self.module(**options)(*tensors.values(), local_sizes=list(self.sizes) if self.told else None), tensors


def collect(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The loss and the gradients as float64 arrays, which travel between processes."""
    found = {"loss": loss.detach()} | {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def gradients(rank: int, size: int, batch: Batch) -> dict[str, np.ndarray]:
    """What one process of the group gets: its loss, and the gradients of its own features and of its copies of scale and bias."""
    loss, tensors = batch.call(rank, rank=rank, world_size=size)
    loss.backward()
    return collect(loss, tensors)


def averaged(shares: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """What DDP would make of the processes' shares: the mean of losses and scalars, and features in the order of the whole batch."""
    result = {}
    for name in shares[0]:
        arrays = [share[name] for share in shares]
        result[name] = np.concatenate(arrays) / len(arrays) if name in ("image", "text") else np.mean(arrays, axis=0)
    return {name: torch.as_tensor(array) for name, array in result.items()}
