"""What the token operators share: lengths on the host, counts per segment, and padded batches of segments of similar lengths."""

import itertools
import numbers
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check

SPREAD = 1.25  # a padded batch holds segments up to this much longer than its shortest
NARROW = 16  # segments this short lie in one batch all the same


class Batch(NamedTuple):
    """``segments`` int64 [B] of similar lengths: their ``tokens`` int64 [B, width] (a valid index everywhere), real where ``inside``.

    full: all lengths are equal, so that all tokens are real. start: the first token, where they are one range of tokens in their order.
    """

    segments: Tensor
    tokens: Tensor
    inside: Tensor
    full: bool
    start: int | None

    def read(self, x: Tensor) -> Tensor:
        """The rows [B, width, ...] of ``x`` [T, ...]; a view where the tokens are one range."""
        if self.start is not None:
            return x.narrow(0, self.start, self.tokens.numel()).unflatten(0, self.tokens.shape)
        return x.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)

    def write(self, values: Tensor, x: Tensor) -> None:
        """Put ``values`` [B, width] of the real tokens into ``x`` [T]."""
        if self.start is not None:
            x.narrow(0, self.start, self.tokens.numel()).copy_(values.flatten())
        else:
            # Padding points at real tokens and must not overwrite them.
            real = self.inside.flatten().nonzero().squeeze(1)
            x.index_copy_(0, self.tokens.flatten().index_select(0, real), values.flatten().index_select(0, real))


def batches(lengths: Tensor, device: torch.device, limit: int, square: bool = False) -> Iterator[Batch]:
    """The segments that are not empty, shortest first, in batches of at most ``limit`` padded tokens (or squares of the width)."""
    sizes = lengths.tolist()
    starts = [end - n for end, n in zip(itertools.accumulate(sizes), sizes, strict=True)]
    # By length, so that neighbours pad each other little.
    order = sorted((s for s, n in enumerate(sizes) if n), key=sizes.__getitem__)
    last = 0
    while last < len(order):
        first, widest = last, max(NARROW, int(sizes[order[last]] * SPREAD))
        while last < len(order) and (width := sizes[order[last]]) <= widest:
            if last > first and (last + 1 - first) * (width**2 if square else width) > limit:
                break
            last += 1
        chosen = order[first:last]
        width, full = sizes[chosen[-1]], sizes[chosen[0]] == sizes[chosen[-1]]
        # Segments of one length that also lie one after the other (a batch of equal images) are read as a view, without a gather.
        together = full and starts[chosen[-1]] - starts[chosen[0]] == (len(chosen) - 1) * width
        segments, start, count = torch.tensor([chosen, [starts[s] for s in chosen], [sizes[s] for s in chosen]], device=device)
        place = torch.arange(width, device=device)
        inside = place < count[:, None]
        # Padding repeats the first token of its segment, so that every index is valid and a gather needs no mask.
        tokens = start[:, None] + (place if full else place * inside)
        yield Batch(segments, tokens, inside, full, starts[chosen[0]] if together else None)


def segment_starts(op: str, name: str, starts: Tensor) -> Tensor:
    """``starts``, refused unless they are integers [S+1]; contiguous, as kernels read them (``cu_seqlens[::2]`` is a view with strides)."""
    if starts.ndim != 1 or starts.shape[0] == 0 or starts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} is {starts.dtype} {tuple(starts.shape)}; it must be int32 [S+1]: 0, then where each segment ends")
    return starts.contiguous()


def check_lengths(op: str, name: str, lengths: Tensor | None, segments: int) -> None:
    """Refuse lengths that are no integers [S] on the CPU."""
    _check.vector(op, name, lengths, segments, integer=True)
    if lengths is not None and lengths.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {lengths.device}; it is for the host and must be on the CPU (Packed.lengths is)")


def check_longest(op: str, name: str, longest: int | None, lengths: Tensor | None = None) -> None:
    """Refuse a longest length below 0, or below one of ``lengths``, where the host knows them.

    Where only the device does, kernels give NaN: to the segments that are longer, or to all results.
    """
    if longest is None:
        return
    # True is an int in Python, and a length of 1 by accident.
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)) or longest < 0:
        raise ValueError(f"{op}: {name}={longest}; it must be the length of the longest segment, an int, or None where it is not known")
    if lengths is not None and len(lengths) and int(lengths.max()) > longest:
        raise ValueError(f"{op}: {name}={longest}, but there is a segment of {int(lengths.max())}; pass {int(lengths.max())}, or None")


def check_segments(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor, lengths: Tensor | None) -> Tensor:
    """``cu_seqlens`` as kernels read it; refused where it or ``lengths`` cannot cut ``tokens`` [T, ...] into segments."""
    _check.plain_tensors(op, 2, **{name: tokens, "cu_seqlens": cu_seqlens})
    cu_seqlens = segment_starts(op, "cu_seqlens", cu_seqlens)
    check_lengths(op, "lengths", lengths, cu_seqlens.shape[0] - 1)
    return cu_seqlens


def number_of_tokens(op: str, name: str, number: int | float | Tensor, segments: int) -> tuple[float, bool, Tensor | None]:
    """What ``counted`` takes: the number, whether it is a share, and the tensor of one number per segment, if it is one.

    Counts are integers (NumPy's too), shares floating-point numbers from 0 to 1: 1 is one token and 1.0 is all.

    Raises:
        TypeError, ValueError: it is neither a count, nor a share, nor a tensor [S] of either.
    """
    if isinstance(number, Tensor):
        _check.plain_tensors(op, **{name: number})
        _check.vector(op, name, number, segments, integer=not number.is_floating_point())
        if number.device.type == "cpu" and not torch.compiler.is_compiling() and not _allowed(number):
            raise ValueError(f"{op}: {name} is {number.tolist()}; it must hold counts of 0 or more (integers) or shares (floats, 0 to 1)")
        return 0.0, False, number
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{op}: {name} is {type(number).__name__}; it must be an int, a float or a tensor with one number per segment")
    share = not isinstance(number, numbers.Integral)
    if number < 0 or (share and not number <= 1):
        raise ValueError(f"{op}: {name} is {number}; it must be a count of 0 or more (an int) or a share of the tokens (a float, 0 to 1)")
    return float(number), share, None


def _allowed(numbers: Tensor) -> bool:
    return bool((numbers >= 0).all()) and (not numbers.is_floating_point() or bool((numbers <= 1).all()))


def check_protected(op: str, protected: int) -> None:
    """Refuse what is no number of tokens."""
    if isinstance(protected, bool) or not isinstance(protected, int) or protected < 0:
        raise ValueError(f"{op}: protected is {protected}; it must be an int of 0 or more, the leading tokens of a segment that stay")


def read_lengths(op: str, name: str, cu_seqlens: Tensor, given: str, lengths: Tensor | None) -> Tensor:
    """int64 [S] on the CPU: ``lengths``, held against ``cu_seqlens`` where that is on the CPU too, or read from it where they are None."""
    if lengths is not None and cu_seqlens.device.type != "cpu":
        return lengths.long()
    starts = cu_seqlens.tolist()  # lists: a few operators on few numbers take longer
    if starts[0] != 0:
        raise ValueError(f"{op}: {name} starts at {starts[0]}; it must start at 0")
    found = [end - start for start, end in itertools.pairwise(starts)]
    if lengths is None:
        return torch.tensor(found, dtype=torch.int64)
    if lengths.tolist() != found:
        raise ValueError(f"{op}: {given} {lengths.tolist()} are not those of {name}, {found}; leave {given} out")
    return lengths.long()


def known_lengths(op: str, cu_seqlens: Tensor, lengths: Tensor | None, total: int) -> Tensor | None:
    """``host_lengths``, but None where only the device knows them."""
    # Reading the device would make the host wait for all that is queued on it.
    return None if lengths is None and cu_seqlens.device.type != "cpu" else host_lengths(op, cu_seqlens, lengths, total)


def host_lengths(op: str, cu_seqlens: Tensor, lengths: Tensor | None, total: int) -> Tensor:
    """int64 [S] on the CPU; read from the device where the caller did not give them.

    Raises:
        ValueError: they are no lengths, not those of cu_seqlens, or do not sum to ``total``.
    """
    lengths = read_lengths(op, "cu_seqlens", cu_seqlens, "lengths", lengths)
    counts = lengths.tolist()
    if min(counts, default=0) < 0:
        raise ValueError(f"{op}: a segment has a negative length; cu_seqlens must start at 0 and never decrease")
    if sum(counts) != total:
        raise ValueError(f"{op}: the segments hold {sum(counts)} tokens, but there are {total} rows")
    return lengths


def counted(lengths: Tensor, number: float, share: bool, each: Tensor | None) -> Tensor:
    """How many tokens of each segment a number means, int64 [S]: a share of its length rounded down, or the number itself.

    ``each`` [S], where given, holds a number per segment instead: floating-point numbers are shares, integers counts.
    """
    if each is not None:
        each = each.to(lengths.device)
        return (lengths.double() * each.double()).floor().long() if each.is_floating_point() else each.long()
    # In float32 a product that is whole could be rounded to just below and lose one token.
    return (lengths.double() * number).floor().long() if share else torch.full_like(lengths, int(number))
