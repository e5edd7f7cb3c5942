"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages the trainable parameters of a model: a <- d a + (1 - d) w, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    Args:
        model: whose parameters are averaged, in their own dtype and on their own device.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model carries the averages inside this context, and its own weights again after it."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """Averages and the number of updates."""
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state_dict()``."""
        if state["averages"].keys() != self.averages.keys():
            raise ValueError("the averaged weights of the checkpoint belong to another model; start over with --resume none")
        for name, average in state["averages"].items():
            self.averages[name].copy_(average)
        self.updates = state["updates"]

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
