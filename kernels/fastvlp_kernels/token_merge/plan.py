"""What ``merge_plan`` returns: who merges with whom, and the merging itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp_kernels import _check, _op
from fastvlp_kernels.packed import Packed, check_segments_of

from . import reference

MODES = ("mean", "sum", "amax")


@dataclass(frozen=True)
class MergePlan:
    """A matching of tokens by :func:`merge_plan`, to be applied to any tensors that have a row per token.

    Attributes:
        source: int64 [T]: the row of the result that each token went to. ``later.source[earlier.source]`` follows two mergings.
        order, starts: int64 [T] and [total + 1]: row j is made of the tokens order[starts[j]:starts[j + 1]], the one that stayed first.
        cu_seqlens: int32 on the device, where the segments of the result start; with the ghost segment, where there is one.
        lengths: int64 on the CPU, the lengths of the result's segments; None where only the device knows them.
        total: rows of the result. impl: who computes.
        before: int64 [S] on the CPU, the lengths of the segments that were matched; None where only the device knows them.
    """

    source: Tensor
    order: Tensor
    starts: Tensor
    cu_seqlens: Tensor
    lengths: Tensor | None
    total: int
    impl: str
    before: Tensor | None = None

    def merge(self, x: Tensor, size: Tensor | None = None, mode: str = "mean") -> tuple[Tensor, Tensor]:
        """Rows of merged tokens, and their sizes.

        Sums are in float32 (float64 for float64) and rounded once; a row of one token is that token to the bit. Gradients go to
        ``x`` and ``size``; that of a maximum goes to the first token of the row that has it.

        Args:
            x: [T, ...] floating point.
            size: [T], how many patches each token stands for, also the weights of the mean; None: 1 each.
            mode: "mean", "sum" (without weights) or "amax".

        Returns:
            x: [total, ...] in its dtype. size: [total], the sums, float32 (float64 for float64). Rows that hold no token are 0.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit, an unknown mode.
            RuntimeError: a second or a forward-mode derivative is asked for.
        """
        self._check(x, self.source.shape[0], "merge", size=size)
        if self.impl != "reference":
            _op.refuse_forward_mode("MergePlan.merge", x, size)
        if mode not in MODES:
            raise ValueError(f"MergePlan.merge: mode={mode!r} is unknown; allowed: {', '.join(MODES)}")
        if size is not None:
            _check.vector("MergePlan.merge", "size", size, self.source.shape[0])
        flat = x.reshape(x.shape[0], x.shape[1:].numel())
        if self.impl == "reference":
            out, sizes = reference.merge(flat, size, self.order, self.starts, mode)
        else:
            impl = "cpu" if x.dtype == torch.float64 or (size is not None and size.dtype == torch.float64) else self.impl
            out, sizes = torch.ops.fastvlp.token_merge(flat, size, self.source, self.order, self.starts, mode, impl)
        return out.reshape(self.total, *x.shape[1:]), sizes

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every token the row it went to: [total, ...] to [T, ...], differentiable."""
        self._check(x, self.total, "unmerge")
        if self.impl == "reference" or _op.has_tangent(x):
            return x[self.source]
        flat = x.reshape(x.shape[0], x.shape[1:].numel())
        impl = "cpu" if x.dtype == torch.float64 else self.impl
        out = torch.ops.fastvlp.token_unmerge(flat, self.source, self.order, self.starts, impl)
        return out.reshape(self.source.shape[0], *x.shape[1:])

    def apply(self, packed: Packed) -> Packed:
        """Merge a packed batch: means weighted by size, sizes added up, the positions of the tokens that stayed.

        Where only the device knows the lengths (``lengths`` is None), it is asked for them, which synchronises: ``Packed`` holds them on
        the CPU. Rows that hold no token have size 0 and position -1.

        Raises:
            ValueError, TypeError: its segments are not those that were matched.
        """
        check_segments_of("MergePlan.apply", packed, self.before)
        x, size = self.merge(packed.x, packed.size)
        lengths = self.cu_seqlens.diff().to("cpu", torch.int64) if self.lengths is None else self.lengths
        # A tensor's value is nothing that a graph may depend on: the longest before merging bounds the one after it.
        if torch.compiler.is_compiling():
            longest = packed.total if self.lengths is None else packed.max_seqlen
        else:
            longest = int(lengths.max()) if len(lengths) else 0
        pos = packed.pos
        if pos is not None and self.total:
            # A merged token is at the place of the one that stayed, the first of its row; empty rows are nowhere.
            stayed = pos.index_select(0, self.order[self.starts[:-1].clamp_max(pos.shape[0] - 1)])
            pos = torch.where((self.starts.diff() > 0)[:, None], stayed, -1)
        return dataclasses.replace(
            packed, x=x, cu_seqlens=self.cu_seqlens, lengths=lengths, total=self.total, max_seqlen=longest, size=size, pos=pos
        )

    def _check(self, x: Tensor, rows: int, what: str, size: Tensor | None = None) -> None:
        op = f"MergePlan.{what}"
        _check.plain_tensors(op, source=self.source, x=x, size=size)
        if x.ndim == 0 or x.shape[0] != rows:
            raise ValueError(f"{op}: x has shape {tuple(x.shape)}; the plan is for {rows} rows")
        if x.dtype not in _check.FLOATS:
            raise TypeError(f"{op}: x is {x.dtype}; allowed: float32, bfloat16, float16, float64")
