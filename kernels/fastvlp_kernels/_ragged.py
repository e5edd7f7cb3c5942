"""What the token operators share: lengths on the host, counts per segment, and padded batches of segments of similar lengths."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check

SPREAD = 1.25  # a padded batch holds segments up to this much longer than its shortest
NARROW = 16  # segments this short lie in one batch all the same


class Batch(NamedTuple):
    """``segments`` int64 [B] of similar lengths: their ``tokens`` int64 [B, width] (a valid index everywhere), real where ``inside``.

    full: all lengths are equal, so that all tokens are real.
    """

    segments: Tensor
    tokens: Tensor
    inside: Tensor
    full: bool


def batches(lengths: Tensor, device: torch.device, limit: int, square: bool = False) -> Iterator[Batch]:
    """The segments that are not empty, shortest first, in batches of at most ``limit`` padded tokens (or squares of the width)."""
    order = torch.argsort(lengths, stable=True)
    starts = (lengths.cumsum(0) - lengths)[order].to(device)
    sizes = lengths[order].tolist()
    counts, order = lengths[order].to(device), order.to(device)
    last = int((lengths == 0).sum())
    while last < len(sizes):
        first, widest = last, max(NARROW, int(sizes[last] * SPREAD))
        while last < len(sizes) and sizes[last] <= widest:
            cost = sizes[last] ** 2 if square else sizes[last]
            if last > first and (last + 1 - first) * cost > limit:
                break
            last += 1
        place = torch.arange(sizes[last - 1], device=device)
        inside = place < counts[first:last, None]
        tokens = torch.where(inside, starts[first:last, None] + place, starts[first:last, None])
        yield Batch(order[first:last], tokens, inside, sizes[first] == sizes[last - 1])


def check_segments(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor, lengths: Tensor | None) -> None:
    """Refuse ``cu_seqlens`` or ``lengths`` that cannot cut ``tokens`` [T, ...] into segments."""
    _check.plain_tensors(op, **{name: tokens, "cu_seqlens": cu_seqlens})
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{op}: cu_seqlens is {got}; it must be int32 [S+1]: 0, then where each segment ends")
    _check.vector(op, "lengths", lengths, cu_seqlens.shape[0] - 1, integer=True)
    if lengths is not None and lengths.device.type != "cpu":
        raise ValueError(f"{op}: lengths is on {lengths.device}; it is for the host and must be on the CPU (Packed.lengths is)")


def check_number(op: str, name: str, number: int | float | Tensor, segments: int) -> None:
    """Refuse a number of tokens that is neither a count, nor a share from 0 to 1, nor a tensor [S] of either."""
    if isinstance(number, Tensor):
        _check.plain_tensors(op, **{name: number})
        _check.vector(op, name, number, segments, integer=not number.is_floating_point())
    elif isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{op}: {name} is {type(number).__name__}; it must be an int, a float or a tensor with one number per segment")
    elif number < 0 or (isinstance(number, float) and not number <= 1):
        raise ValueError(f"{op}: {name} is {number}; it must be a count of 0 or more (an int) or a share of the tokens (a float, 0 to 1)")


def host_lengths(op: str, cu_seqlens: Tensor, lengths: Tensor | None, total: int) -> Tensor:
    """int64 [S] on the CPU; read from the device where the caller did not give them.

    Raises:
        ValueError: they are no lengths, not those of cu_seqlens, or do not sum to ``total``.
    """
    if lengths is None or cu_seqlens.device.type == "cpu":
        starts = cu_seqlens.cpu()
        if starts[0] != 0:
            raise ValueError(f"{op}: cu_seqlens starts at {int(starts[0])}; it must start at 0")
        if lengths is not None and not torch.equal(lengths.long(), starts.diff().long()):
            raise ValueError(f"{op}: lengths {lengths.tolist()} are not those of cu_seqlens, {starts.diff().tolist()}; leave lengths out")
        lengths = starts.diff()
    lengths = lengths.long()
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"{op}: a segment has a negative length; cu_seqlens must start at 0 and never decrease")
    if int(lengths.sum()) != total:
        raise ValueError(f"{op}: the segments hold {int(lengths.sum())} tokens, but there are {total} rows")
    return lengths


def counted(lengths: Tensor, number: float, share: bool, each: Tensor | None) -> Tensor:
    """How many tokens of each segment a number means, int64 [S]: a share of its length rounded down, or the number itself.

    ``each`` [S], where given, holds a number per segment instead: floating-point numbers are shares, integers counts.
    """
    if each is not None:
        each = each.to(lengths.device)
        return (lengths.double() * each.double()).floor().long() if each.is_floating_point() else each.long()
    return (lengths.double() * number).floor().long() if share else torch.full_like(lengths, int(number))
