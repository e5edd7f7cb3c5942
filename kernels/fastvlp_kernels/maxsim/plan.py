"""How ``cpu.py`` orders the segments of a side and cuts them into tiles, so that a maximum per segment is a few wide operations."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# PyTorch reduces the last dimension of [rows, segments, length] fast from this length on; below it, going token by token is faster
# where that many segments share each step.
LONG = 64
MANY = 8


class Piece(NamedTuple):
    """Segments of a tile that are reduced together.

    ``alive`` empty: ``number`` segments of one ``length``, one after the other, or a part of one segment that is longer than a tile.
    Otherwise segments of descending lengths, token by token: the first tokens of all, the second tokens of the alive[1] segments that
    have two, and so on.
    """

    start: int  # the first token, within the tile
    segment: int  # the first segment, in the order of the plan
    number: int
    length: int  # of the longest
    size: int  # tokens
    begins: bool = True
    ends: bool = True
    alive: tuple[int, ...] = ()

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def segments(self) -> slice:
        return slice(self.segment, self.segment + self.number)

    def steps(self) -> Iterator[tuple[int, slice, slice]]:
        """Token by token: which, where in the tile, and the segments (within the piece) that have it."""
        start = self.start
        for token, count in enumerate(self.alive):
            yield token, slice(start, start + count), slice(count)
            start += count


class Tile(NamedTuple):
    tokens: slice
    pieces: tuple[Piece, ...]

    @property
    def segments(self) -> slice:
        return slice(self.pieces[0].segment, self.pieces[-1].segments.stop)

    @property
    def begins(self) -> bool:
        return self.pieces[0].begins

    @property
    def ends(self) -> bool:
        return self.pieces[-1].ends


class Plan(NamedTuple):
    """Tiles, where the segments and tokens in their order come from, and the segment of each token, by its place in that order.

    The tensors are int64 on the CPU. Empty segments have no tile.
    """

    tiles: tuple[Tile, ...]
    segments: Tensor
    tokens: Tensor
    owners: Tensor


def check(name: str, starts: tuple[int, ...], tokens: int) -> None:
    """Refuse offsets that are none.

    Raises:
        ValueError: they do not start at 0, decrease, or end behind the tokens.
    """
    if starts[0] != 0:
        raise ValueError(f"maxsim: cu_{name} starts at {starts[0]}; it must start at 0")
    if any(start > end for start, end in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"maxsim: cu_{name} decreases, which would be a segment of negative length; it must never decrease")
    if starts[-1] > tokens:
        raise ValueError(f"maxsim: cu_{name} ends at {starts[-1]}, but {name} has {tokens} rows; it must end there or before")


def _fitting(lengths: list[int], place: int, room: int, alike: bool) -> int:
    """How many from ``place`` on are not 0 and together fill no more than ``room``; ``alike``: of one length."""
    last = place
    while last < len(lengths) and lengths[last] and lengths[last] <= room and (not alike or lengths[last] == lengths[place]):
        room -= lengths[last]
        last += 1
    return last - place


@functools.lru_cache(maxsize=64)
def plan(starts: tuple[int, ...], size: int, columns: bool) -> Plan:
    """Tiles of at most ``size`` tokens, segments [starts[s], starts[s+1]), longest first; with ``columns`` short ones token by token."""
    given = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    order = sorted(range(len(given)), key=lambda segment: -given[segment])
    lengths = [given[segment] for segment in order]
    segments = torch.tensor(order, dtype=torch.int64)
    begins = torch.tensor(starts)[segments]
    tiles: list[Tile] = []
    tokens: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    owners: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    pieces: list[Piece] = []
    first = used = place = 0

    def close() -> None:
        nonlocal first, used
        if pieces:
            tiles.append(Tile(slice(first, first + used), tuple(pieces)))
            first, used = first + used, 0
            pieces.clear()

    while place < len(order) and lengths[place] > 0:
        length = lengths[place]
        if length > size - used:
            close()
        number = _fitting(lengths, place, size - used, alike=False)
        if columns and length <= LONG and number >= MANY:
            alive = tuple(sum(n > token for n in lengths[place : place + number]) for token in range(length))
            tokens += [begins[place : place + count] + token for token, count in enumerate(alive)]
            owners += [torch.arange(place, place + count) for count in alive]
            pieces.append(Piece(used, place, number, length, sum(alive), alive=alive))
            used += sum(alive)
        else:
            # A segment that is longer than a tile is alone, and cut.
            number = max(1, _fitting(lengths, place, size - used, alike=True))
            tokens.append((begins[place : place + number, None] + torch.arange(length)).flatten())
            owners.append(torch.arange(place, place + number).repeat_interleave(length))
            for part in range(0, length, size):
                n = min(size, length - part)
                pieces.append(Piece(used, place, number, n, number * n, part == 0, part + n == length))
                used += number * n
                if length > size:
                    close()
        place += number
    close()
    return Plan(tuple(tiles), segments, torch.cat(tokens), torch.cat(owners))
