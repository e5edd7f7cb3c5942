"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastvlp.train.parallel import local_tensor


class Ema:
    """Averages the trainable parameters of a model: a <- d a + (1 - d) w, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    Sharded parameters have sharded averages. Those of 16-bit weights are kept in float32, where small steps are not rounded away.

    Args:
        model: whose parameters are averaged. decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # In 16 bits a step of 1 - decay is below half a unit of the average, which would never move.
        self.averages = {name: _wide(p.detach()).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Move the averages towards the present weights where ``counts``, 0-d on their device, is true; the host is not asked."""
        # A short warm-up, or the average would stay near the random start for 1 / (1 - decay) steps.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [local_tensor(average) for average in self.averages.values()]
        weights = [_wide(local_tensor(p)) for p in self.parameters.values()]
        # A step that was skipped has weight 0: a product instead of a branch, which would ask the device.
        torch._foreach_lerp_(averages, weights, [counts.to(average.dtype) * (1 - decay) for average in averages])
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

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _wide(parameter: Tensor) -> Tensor:
    return parameter.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter
