"""What the kernels of packed attention share: which tokens a program has, how it reads them, and the running softmax."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NO_STEP = 1 << 20
WHOLE_USE = 0.6  # least share of the columns of a tile that real keys fill, on average, for a tile of all keys


class Side(NamedTuple):
    """Where the segments of the queries or of the keys start, and what the host knows of their lengths."""

    cu: Tensor  # int32 or int64 [S+1]
    tokens: int
    longest: int | None

    @property
    def segments(self) -> int:
        return len(self.cu) - 1

    @property
    def typical(self) -> int:
        """The longest length where it is known, else twice the mean."""
        return self.longest if self.longest is not None else min(self.tokens, 2 * triton.cdiv(self.tokens, max(1, self.segments)))

    def tiles(self, block: int) -> tuple[int, int, bool]:
        """Number of tiles, tiles per segment, and whether segments must be searched."""
        slots = self.tokens // block + self.segments
        if self.longest is not None:
            blocks = max(1, triton.cdiv(self.longest, block))
            # As many tiles for every segment as the longest has, unless most of them would be empty: then a search finds the segment.
            if self.segments * blocks <= 2 * slots:
                return self.segments * blocks, blocks, False
        return slots, NO_STEP, True

    def whole(self, most: int) -> int:
        """Columns of tiles that hold all keys of any segment and waste little, or 0."""
        if self.longest is None:
            return 0
        width = 192 if 128 < self.longest <= 192 else max(16, triton.next_power_of_2(self.longest))
        return width if width <= most and (width <= 64 or self.tokens >= WHOLE_USE * self.segments * width) else 0


def padded(width: int) -> int:
    """The power of two that a head width is padded to, on chip only."""
    return max(16, triton.next_power_of_2(width))


def rows_of(longest: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(longest)))


@triton.jit
def tile(ptr, first, offs, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, BLOCK] of the tokens first + offs, 0 outside. Only ``first`` is a 64-bit number: those of elements would fill registers."""
    cols = tl.arange(0, BLOCK)
    at = ptr + first.to(tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    x = tl.load(at, mask=inside[:, None] & (cols < WIDTH)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store(ptr, value, first, offs, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of ``tile``."""
    cols = tl.arange(0, BLOCK)
    at = ptr + first.to(tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def fill(ptr, first, length, block, blocks, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """NaN behind the ``blocks`` tiles of a segment of ``length``: a longest length that is too small must not go unseen."""
    offs = tl.arange(0, ROWS)
    nothing = tl.full((ROWS, BLOCK), float("nan"), tl.float32)
    for rest in range((blocks + block) * ROWS, length, blocks * ROWS):
        store(ptr, nothing, first + rest, offs, rest + offs < length, stride, WIDTH, BLOCK)


@triton.jit
def key_terms(size_ptr, bias_ptr, first, offs, inside):
    """What is added to the scores of keys, in powers of 2 (-inf: the key is hidden), and their sizes."""
    term = tl.zeros(offs.shape, tl.float32)
    size = inside.to(tl.float32)
    if bias_ptr is not None:
        term += tl.load(bias_ptr + first + offs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if size_ptr is not None:
        size = tl.load(size_ptr + first + offs, mask=inside, other=0.0).to(tl.float32)
    # Not size > 0: a NaN has to come out as one.
    return tl.where(inside & ~(size <= 0), term, float("-inf")), size


@triton.jit
def types_of(ptr, first, offs, inside):
    """The bits of the types of tokens; 0, which none shares, outside."""
    return tl.load(ptr + first + offs, mask=inside, other=0)


@triton.jit
def limits(prefix_ptr, segment, rows, n, m):
    """Behind the last key that each query of a causal segment sees."""
    limit = rows + (m - n + 1)
    if prefix_ptr is not None:
        limit = tl.maximum(limit, tl.load(prefix_ptr + segment).to(tl.int32))
    return limit


@triton.jit
def attend(s, v, size_ptr, size, highest, total, acc, PRECISION: tl.constexpr):
    """The highest score of each row, its sum and its unnormalised result, after the keys with scores s [rows, keys] too."""
    higher = tl.maximum(highest, tl.max(s, 1))
    # No key seen yet: -inf minus -inf would be NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - shift[:, None])
    if size_ptr is not None:
        p *= size[None, :]
    # What was summed so far, in units of the new maximum.
    shrink = tl.exp2(highest - shift)
    return higher, total * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def finish(out_ptr, lse_ptr, highest, total, acc, first, offs, inside, H, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store the results of rows, 0 for those without keys, and their lse."""
    some = total != 0
    # +inf for rows without keys: the backward pass subtracts it, and every probability is 0.
    lse = tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + first + offs, lse, mask=inside)
    store(out_ptr, acc / tl.where(some, total, 1.0)[:, None], first, offs, inside, H * E, E, BLOCK_E)


def operands(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors with features next to each other, and what divides their strides: 8 elements are 16 bytes of half precision."""
    dense = [x if x.stride(2) == 1 else x.contiguous() for x in tensors]
    aligned = all(stride % 8 == 0 for x in dense for stride in x.stride()[:2])
    return dense, 8 if aligned else 1


def key_options(k: Tensor, key_size: Tensor | None, key_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Sizes and bias as kernels read them, and the stride from one head's bias to the next."""
    bias = None if key_bias is None else key_bias.contiguous()
    return None if key_size is None else key_size.contiguous(), bias, k.shape[0] if bias is not None and bias.ndim == 2 else 0


def new(like: Tensor, whole: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """For results of which kernels write the tokens of segments: zeros unless these are known to be all."""
    return like.new_empty(shape, dtype=dtype) if whole else like.new_zeros(shape, dtype=dtype)
