"""Online best fit: each item goes to the open bin that it fills best; bins stay open while the stream passes."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from torch import Tensor


class Packer:
    """Packs a stream of lengths into bins of at most ``budget`` tokens.

    An item goes to the open bin that it leaves with the least space, but not with a gap that is too small for the shortest item so
    far and more than a thousandth of the budget, while another bin can take it. A bin is handed out when it is full, or when it is the
    fullest of ``open_bins`` and another must be opened.
    Items are numbered from 0 as they are added.

    Args:
        budget: tokens in one bin.
        open_bins: how many bins wait for a fitting item; more waste less and hold more items back.
    """

    def __init__(self, budget: int, open_bins: int = 32):
        if budget < 1 or open_bins < 1:
            raise ValueError(f"Packer: budget {budget} and open_bins {open_bins} must both be at least 1")
        self.budget, self.open_bins = budget, open_bins
        self._count = 0
        self._shortest = budget
        # Sorted numbers space * open_bins + slot: one list carries the order and says which bin each space belongs to.
        self._spaces: list[int] = []
        self._bins: list[list[int]] = [[] for _ in range(open_bins)]  # item, length, item, length, ...
        self._free = list(range(open_bins))
        self._tolerance = budget // 1000 * open_bins + open_bins

    def add(self, length: int) -> list[int] | None:
        """Add the next item. Returns the bin (item numbers in the order they came) that this closes, or None.

        Raises:
            ValueError: the length is below 1 or above the budget; the item is not added and takes no number.
        """
        if not 0 < length <= self.budget:
            raise ValueError(_refusal(self._count, length, self.budget))
        item = self._count
        self._count = item + 1
        if length < self._shortest:
            self._shortest = length
        spaces, slots = self._spaces, self.open_bins
        need = length * slots
        place = bisect_left(spaces, need)
        if place < len(spaces):
            # The space that would be left is too small for any item so far and too large to waste: a roomier bin, or a new one.
            if self._tolerance <= spaces[place] - need < self._shortest * slots:
                roomier = bisect_left(spaces, need + self._shortest * slots, place)
                if roomier < len(spaces):
                    place = roomier
                elif self._free:
                    return self._open(item, length)
            left = spaces.pop(place) - need
            items = self._bins[left % slots]
            items += (item, length)
            if left >= slots:
                insort(spaces, left)
                return None
            self._free.append(left)
            return items[::2]
        return self._open(item, length)

    def _open(self, item: int, length: int) -> list[int] | None:
        if length == self.budget:
            return [item]
        closed = None
        if not self._free:
            self._free.append(self._spaces.pop(0) % self.open_bins)
            closed = self._bins[self._free[0]][::2]
        slot = self._free.pop()
        self._bins[slot] = [item, length]
        insort(self._spaces, (self.budget - length) * self.open_bins + slot)
        return closed

    def flush(self) -> list[list[int]]:
        """Close and return what is still open, packed again with the longest first where that saves bins. Numbering goes on."""
        slots = [space % self.open_bins for space in self._spaces]
        left = [self._bins[slot] for slot in slots]
        self._free += slots
        self._spaces.clear()
        again = _longest_first([pair for items in left for pair in zip(items[1::2], items[::2], strict=True)], self.budget)
        return again if len(again) < len(left) else [items[::2] for items in left]


def pack(lengths: Sequence[int] | Tensor, budget: int, open_bins: int = 32) -> list[list[int]]:
    """Bins of indices into ``lengths``, each of at most ``budget`` tokens: every index once, by online best fit.

    Raises:
        ValueError: a length is below 1 or above the budget.
    """
    packer = Packer(budget, open_bins)
    # Looked up once, as it is called for every sample of a data set.
    add = packer.add
    bins = [closed for length in _plain(lengths) if (closed := add(length)) is not None]
    return bins + packer.flush()


def microbatches(lengths: Sequence[int] | Tensor, budget: int) -> list[list[int]]:
    """Micro-batches of at most ``budget`` tokens; indices sorted by length inside each, so that equal lengths lie together.

    Raises:
        ValueError: a length is below 1 or above the budget.
    """
    plain = _plain(lengths)
    return [sorted(sorted(indices), key=plain.__getitem__) for indices in pack(plain, budget)]


def _longest_first(items: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Best fit of (length, item) pairs over as many bins as it takes."""
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []
    for length, item in sorted(items, key=lambda pair: -pair[0]):
        place = bisect_left(spaces, (length, 0))
        if place == len(spaces):
            bins.append([])
            spaces.append((budget, len(bins) - 1))
        space, which = spaces.pop(place)
        bins[which].append(item)
        insort(spaces, (space - length, which))
    return bins


def _refusal(item: int, length: int, budget: int) -> str:
    if length < 1:
        return f"packing: item {item} has length {length}; lengths are at least 1 (drop empty samples first)"
    return f"packing: item {item} has {length} tokens, over the budget of {budget}; raise it to at least {length}, or cut or drop the item"


def _plain(lengths: Sequence[int] | Tensor) -> Sequence[int]:
    return lengths.tolist() if isinstance(lengths, Tensor) else lengths
