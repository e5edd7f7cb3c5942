"""The one layout that every token operator reads and writes: segments of different lengths, end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check


@dataclass(frozen=True)
class Packed:
    """Segments (images, captions) laid end to end in one tensor.

    Make one with :meth:`of`, :meth:`from_list` or :meth:`from_padded`; the plain constructor checks nothing.

    Attributes:
        x: [T, ...] the tokens of all segments.
        cu_seqlens: int32 [S+1] on the device of ``x``: where each segment starts; the last entry is where the last one ends.
        lengths: int64 [S] on the CPU, known to the host so that nothing has to ask the device.
        total: T. max_seqlen: the longest segment (0 without segments).
        size: float32 [T] or None: how many patches each token stands for.
        pos: int32 [T, 3] or None: (frame, row, column); text and register tokens carry (index, -1, -1).
    """

    x: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    total: int
    max_seqlen: int
    size: Tensor | None = None
    pos: Tensor | None = None

    def __len__(self) -> int:
        """The number of segments."""
        return self.lengths.shape[0]

    @classmethod
    def of(cls, x: Tensor, lengths: Sequence[int] | Tensor, size: Tensor | None = None, pos: Tensor | None = None) -> Packed:
        """Cut ``x`` [T, ...] into segments of these lengths (a sequence or an integer tensor [S]; on a CUDA device it costs one sync).

        Raises:
            ValueError, TypeError: the lengths are not counts that sum to T, or ``size`` is not [T], or ``pos`` not [T, 3].
        """
        _check.plain_tensors("Packed", x=x, size=size, pos=pos)
        counts = _lengths(lengths)
        if x.ndim == 0 or int(counts.sum()) != x.shape[0]:
            raise ValueError(f"Packed: the lengths sum to {int(counts.sum())}, x has shape {tuple(x.shape)}; its rows are the tokens")
        total = x.shape[0]
        for name, extra, shape in (("size", size, (total,)), ("pos", pos, (total, 3))):
            if extra is not None and tuple(extra.shape) != shape:
                raise ValueError(f"Packed: {name} has shape {tuple(extra.shape)}; with {total} tokens it must be {shape}")
        longest = int(counts.max()) if len(counts) else 0
        return cls(x, _starts(counts, x.device), counts, total, longest, size, pos)

    @classmethod
    def from_list(cls, segments: Sequence[Tensor], pos: Sequence[Tensor] | None = None) -> Packed:
        """Lay tensors [n_i, ...] (and their ``pos`` [n_i, 3]) end to end. At least one is needed; it may be empty."""
        if not segments:
            raise ValueError("Packed.from_list: got no tensors; pass at least one [n, ...]: it says width, dtype and device (n may be 0)")
        _check.plain_tensors("Packed.from_list", len(segments), **{f"segments[{place}]": tensor for place, tensor in enumerate(segments)})
        like = segments[0]
        for place, tensor in enumerate(segments):
            if tensor.ndim == 0 or tensor.shape[1:] != like.shape[1:] or tensor.dtype != like.dtype:
                raise ValueError(
                    f"Packed.from_list: segments[{place}] is {tensor.dtype} of shape {tuple(tensor.shape)} and segments[0] {like.dtype} of"
                    f" shape {tuple(like.shape)}; all must be [n, ...] alike but for n"
                )
        return cls.of(torch.cat(list(segments)), [len(s) for s in segments], pos=None if pos is None else torch.cat(list(pos)))

    @classmethod
    def from_padded(cls, x: Tensor, lengths: Sequence[int] | Tensor | None = None, mask: Tensor | None = None) -> Packed:
        """Drop the padding of ``x`` [B, N, ...].

        Args:
            lengths: how many leading tokens of each row are real (None: all); or the mask, as a boolean tensor.
            mask: bool [B, N], True where a token is real, anywhere in its row. On a CUDA device it costs one sync.

        Raises:
            ValueError: lengths outside 0..N, or a mask of another shape, or both are given.
        """
        if isinstance(lengths, Tensor) and lengths.dtype == torch.bool:
            lengths, mask = None, lengths
        if lengths is not None and mask is not None:
            raise ValueError("Packed.from_padded: got lengths and a mask; pass one of them")
        if x.ndim < 2:
            raise ValueError(f"Packed.from_padded: x has shape {tuple(x.shape)}; it must be [B, N, ...]")
        rows, width = x.shape[:2]
        flat = x.flatten(0, 1)
        if mask is not None:
            if mask.shape != (rows, width) or mask.dtype != torch.bool:
                raise ValueError(f"Packed.from_padded: mask is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool ({rows}, {width})")
            index = mask.flatten().nonzero().squeeze(1)
            return cls.of(flat.index_select(0, index), mask.sum(1))
        if lengths is None:
            return cls.of(flat, [width] * rows)
        counts = _lengths(lengths)
        if len(counts) != rows or (rows and int(counts.max()) > width):
            raise ValueError(f"Packed.from_padded: lengths {counts.tolist()} for x {tuple(x.shape)}; allowed: {rows} of 0 to {width}")
        if int(counts.sum()) == rows * width:
            return cls.of(flat, counts)
        places = _places(_starts(counts, x.device), int(counts.sum()), width)
        return cls.of(flat.index_select(0, places), counts)

    def to_padded(self, value: float = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Pad every segment with ``value`` to ``width`` tokens (None: the longest segment).

        Returns:
            x: [S, width, ...], and the mask: bool [S, width] on the device of ``x``, True where a token is real.
        """
        width = self.max_seqlen if width is None else width
        if width < self.max_seqlen:
            raise ValueError(f"Packed.to_padded: width {width} is less than the longest segment, {self.max_seqlen}")
        rows = len(self)
        mask = torch.arange(width, device=self.x.device) < self.cu_seqlens.diff()[:, None]
        # Nothing to pad: a view.
        if rows * width == self.total:
            return self.x.unflatten(0, (rows, width)), mask
        places = _places(self.cu_seqlens, self.total, width)
        padded = self.x.new_full((rows * width, *self.x.shape[1:]), value).index_copy(0, places, self.x)
        return padded.unflatten(0, (rows, width)), mask

    def segments(self) -> list[Tensor]:
        """The segments as views [n_i, ...] of ``x``."""
        return list(self.x.split(self.lengths.tolist()))

    def replace(self, **changes: Any) -> Packed:
        """The same segments with other contents: ``replace(x=...)``, ``replace(size=...)``, ``replace(pos=...)``."""
        for name, value in changes.items():
            if name not in ("x", "size", "pos"):
                raise ValueError(f"Packed.replace: cannot change {name}; only x, size and pos (other segments: Packed.of)")
            if value is not None and value.shape[0] != self.total:
                raise ValueError(f"Packed.replace: {name} has {value.shape[0]} rows; these segments have {self.total} tokens")
        return dataclasses.replace(self, **changes)

    def take(self, rows: Sequence[int] | Tensor) -> Packed:
        """Segments by number, in this order and again where asked; ``size`` and ``pos`` come along. Rows on a CUDA device cost one sync."""
        index = rows.detach() if isinstance(rows, Tensor) else torch.tensor(rows, dtype=None if len(rows) else torch.int64)
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"Packed.take: rows are {index.dtype} {tuple(index.shape)}; they must be integers [n], numbers of segments")
        index = index.to("cpu", torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(f"Packed.take: rows go from {int(index.min())} to {int(index.max())}; there are segments 0 to {len(self) - 1}")
        return self._pieces(self.lengths.cumsum(0)[index] - self.lengths[index], self.lengths[index])

    def repeat(self, n: int) -> Packed:
        """Each segment ``n`` times in a row: segment i becomes segments n i to n i + n - 1."""
        return self.take(torch.arange(len(self)).repeat_interleave(n))

    def first(self, lengths: int | Sequence[int] | Tensor | Packed) -> Packed:
        """The first tokens of each segment: so many of all, so many of each [S], or as many as another's segments have."""
        counts = self._counts("first", lengths)
        return self._pieces(self.lengths.cumsum(0) - self.lengths, counts)

    def last(self, lengths: int | Sequence[int] | Tensor | Packed) -> Packed:
        """The last tokens of each segment: so many of all, so many of each [S], or as many as another's segments have."""
        counts = self._counts("last", lengths)
        return self._pieces(self.lengths.cumsum(0) - counts, counts)

    def join(self, *others: Packed) -> Packed:
        """Segment i of this, then segment i of each of the others, as one segment.

        ``pos`` stays if all have one. If one has a ``size``, the tokens of those without stand for one patch each.

        Raises:
            ValueError: the others have other numbers of segments or another width, or ids are to be joined with features.
        """
        parts = (self, *others)
        for part in others:
            if len(part) != len(self):
                raise ValueError(f"Packed.join: got {len(self)} segments and {len(part)}; as many are needed (repeat and take make them)")
        whole = Packed.cat(parts)
        lengths = torch.stack([part.lengths for part in parts], 1).flatten()
        starts = (whole.lengths.cumsum(0) - whole.lengths).view(len(parts), len(self)).T.flatten()
        # Pieces in the order of the result, with lengths known on the host: one gather per tensor and no wait for the device.
        joined = whole._pieces(starts, lengths)
        return Packed.of(joined.x, torch.stack([part.lengths for part in parts]).sum(0), joined.size, joined.pos)

    def split(self, *parts: Sequence[int] | Tensor | Packed) -> tuple[Packed, ...]:
        """What :meth:`join` joined: of each segment the first ``parts[0]`` tokens, the next ``parts[1]``, and so on.

        Args:
            parts: integers [S], or a ``Packed`` whose lengths count. Together they are the lengths of these segments.
        """
        counts = [part.lengths if isinstance(part, Packed) else _lengths(part) for part in parts]
        if not counts or any(len(c) != len(self) for c in counts) or not torch.equal(torch.stack(counts).sum(0), self.lengths):
            given = " + ".join(str(c.tolist()) for c in counts) or "nothing"
            raise ValueError(f"Packed.split: the parts are {given}; together they must be the lengths, {self.lengths.tolist()}")
        starts, pieces = self.lengths.cumsum(0) - self.lengths, []
        for count in counts:
            pieces.append(self._pieces(starts, count))
            starts = starts + count
        return tuple(pieces)

    @staticmethod
    def cat(parts: Sequence[Packed]) -> Packed:
        """The segments of several, one batch after the other (what micro-batches gave). ``pos`` and ``size`` as in :meth:`join`."""
        if not parts:
            raise ValueError("Packed.cat: got no batches; pass at least one Packed")
        like = parts[0].x
        for part in parts:
            if part.x.shape[1:] != like.shape[1:] or part.x.is_floating_point() != like.is_floating_point():
                got = f"tokens are {like.dtype} {tuple(like.shape)} and {part.x.dtype} {tuple(part.x.shape)}"
                raise ValueError(f"Packed: {got}; they must be alike but for their number (features of one width, or ids)")
        if len(parts) == 1:
            return parts[0]
        positions = [part.pos for part in parts if part.pos is not None]
        pos = torch.cat(positions) if len(positions) == len(parts) else None
        size = None
        if any(part.size is not None for part in parts):
            # A token without a size stands for itself alone.
            size = torch.cat([torch.ones(part.total, device=like.device) if part.size is None else part.size for part in parts])
        return Packed.of(torch.cat([part.x for part in parts]), torch.cat([part.lengths for part in parts]), size, pos)

    def _counts(self, name: str, lengths: int | Sequence[int] | Tensor | Packed) -> Tensor:
        if isinstance(lengths, Packed):
            lengths = lengths.lengths
        counts = _lengths([lengths] * len(self) if isinstance(lengths, int) else lengths)
        if len(counts) != len(self) or bool((counts > self.lengths).any()):
            asked = f"asked for {counts.tolist()} tokens of segments of {self.lengths.tolist()}"
            raise ValueError(f"Packed.{name}: {asked}; allowed: 0 to all of each")
        return counts

    def _pieces(self, starts: Tensor, lengths: Tensor) -> Packed:
        """Segments of ``lengths`` that begin at the tokens ``starts``, both int64 on the CPU. The device is not asked anything."""
        total, device = int(lengths.sum()), self.x.device
        shift = starts - (lengths.cumsum(0) - lengths)
        counts = lengths.to(device, non_blocking=True)
        # The output size is told, or PyTorch would read the sum of the counts from the device.
        shift = shift.to(device, non_blocking=True).repeat_interleave(counts, output_size=total)
        index = torch.arange(total, device=device) + shift
        size, pos = (None if extra is None else extra.index_select(0, index) for extra in (self.size, self.pos))
        longest = int(lengths.max()) if len(lengths) else 0
        return Packed(self.x.index_select(0, index), _starts(lengths, device), lengths, total, longest, size, pos)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """Move everything but ``lengths``, which stays on the CPU."""
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        x, cu_seqlens = self.x.to(device, non_blocking=non_blocking), self.cu_seqlens.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, x=x, cu_seqlens=cu_seqlens, size=move(self.size), pos=move(self.pos))


def check_packed(op: str, width: int | None = None, /, **given: Any) -> None:
    """Refuse by name what is no ``Packed``, and tokens that are not [T, ``width``]."""
    for name, packed in given.items():
        if not isinstance(packed, Packed):
            raise TypeError(f"{op}: {name} is {type(packed).__name__}; it must be Packed: make one with Packed.of(tokens, lengths)")
        if width is not None and packed.x.shape[1:] != (width,):
            raise ValueError(f"{op}: the tokens of {name} have shape {tuple(packed.x.shape)}; this layer was made for [T, {width}]")


def check_segments_of(op: str, packed: Packed, lengths: Tensor | None) -> None:
    """Refuse a batch whose segments are not of ``lengths`` [S], as far as the host knows these."""
    check_packed(op, packed=packed)
    if lengths is None or torch.compiler.is_compiling() or torch.equal(lengths, packed.lengths):
        return
    raise ValueError(f"{op}: made for segments of {lengths.tolist()} tokens, but these have {packed.lengths.tolist()}; make one for these")


def _lengths(lengths: Sequence[int] | Tensor) -> Tensor:
    counts = lengths.detach() if isinstance(lengths, Tensor) else torch.tensor(lengths, dtype=None if len(lengths) else torch.int64)
    if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"Packed: lengths are {counts.dtype} of shape {tuple(counts.shape)}; they must be integers [S], one per segment")
    counts = counts.to("cpu", torch.int64)
    if len(counts) and int(counts.min()) < 0:
        raise ValueError(f"Packed: segment {int(counts.argmin())} has length {int(counts.min())}; lengths are 0 or more")
    return counts


def _starts(lengths: Tensor, device: torch.device) -> Tensor:
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=starts[1:])
    return starts.to(device, non_blocking=True)


def _places(cu_seqlens: Tensor, total: int, width: int) -> Tensor:
    """Where the packed tokens lie in the flattened [S, width]: int64 [T] on the device, which is not asked anything."""
    padding = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device) * width - cu_seqlens[:-1]
    return torch.arange(total, device=cu_seqlens.device) + padding.repeat_interleave(cu_seqlens.diff(), output_size=total)
