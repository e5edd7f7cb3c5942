"""Log-sum-exps as pairs, because one float32 number near 100 is rounded to 4e-6, and every probability would be off by as much."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogSumExp(NamedTuple):
    """log(sum of exp(S)) = reference + log. Gradients flow through ``log`` alone, which stands for the whole.

    Attributes:
        reference: a number close to the log-sum-exp; -inf where nothing was summed.
        log: of the sum of exp(S - reference), so that exp((S - reference) - log) errs as a softmax does; 0 where nothing was summed.
    """

    reference: Tensor
    log: Tensor

    def value(self) -> Tensor:
        """Both in one number."""
        return self.reference + self.log

    def minus(self, other: LogSumExp | Tensor) -> Tensor:
        """The log-sum-exp minus a logit or another one: what nearly cancels is subtracted first."""
        if isinstance(other, LogSumExp):
            return (self.reference - other.reference) + (self.log - other.log)
        return (self.reference - other) + self.log

    def probability(self, logit: Tensor) -> Tensor:
        """exp(logit - log-sum-exp), float64; 0 where nothing was summed."""
        # The two large numbers cancel first, and exactly; what is left is small and keeps its digits.
        p = ((logit.double() - self.reference.double()) - self.log.double()).exp()
        return p.masked_fill(self.reference == -torch.inf, 0.0)

    def at(self, where: slice) -> LogSumExp:
        """Some of the log-sum-exps."""
        return LogSumExp(self.reference[where], self.log[where])


def from_sums(reference: Tensor, total: Tensor, dtype: torch.dtype) -> LogSumExp:
    """Of ``total``, sums of exp(S - reference) that are 0 where nothing was summed, as two numbers of ``dtype``."""
    shift, rest = reference.double(), total.double().log()
    # The first number is the sum rounded, the second what the rounding lost.
    near = (shift + rest).to(dtype)
    return LogSumExp(near, torch.where(near.isinf(), 0.0, (shift - near.double()) + rest).to(dtype))


def logsumexp(S: Tensor, axis: int) -> LogSumExp:
    """Of a matrix that exists, differentiable as often as wished."""
    # Detached: the result does not depend on which reference is taken, so its gradient is zero.
    reference = S.detach().amax(axis)
    shift = torch.where(reference.isfinite(), reference, 0.0)
    log = (S - shift.unsqueeze(axis)).logsumexp(axis)
    return LogSumExp(reference, log.masked_fill(reference == -torch.inf, 0.0))


def merge(*parts: LogSumExp) -> LogSumExp:
    """The log-sum-exp of everything that the parts sum."""
    # As above: any reference will do, and this one lies so near the sum that ``log`` is about 0.
    with torch.no_grad():
        values = torch.stack([part.reference.double() + part.log.double() for part in parts])
        reference = values.logsumexp(0).to(parts[0].reference.dtype)
    empty = reference == -torch.inf
    shift = torch.where(reference.isfinite(), reference, 0.0).double()
    log = torch.stack([(part.reference.double() - shift) + part.log.double() for part in parts]).logsumexp(0)
    return LogSumExp(reference, log.masked_fill(empty, 0.0).to(reference.dtype))
