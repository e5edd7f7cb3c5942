"""Attention with a mask or a bias for every pair of tokens of a segment: FlexAttention on CUDA devices, bounded batches elsewhere."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels.packed_attention.runs import Run, plan

PairFunction = Callable[[Tensor, Tensor], Tensor]
BLOCK = 128  # the sides of FlexAttention's blocks
SCORES = 1 << 22  # held at once where they are dense


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of query and key of packed tokens; made once per batch, for all layers.

    ``seen`` and ``index`` map the numbers of query and key tokens (integers 0..T-1, of shapes that broadcast) to a value for each pair.
    FlexAttention compiles them and refuses numbers that change from batch to batch: those must be in tensors.

    Attributes:
        owner: int64 [T], the segment of each token.
        runs: segments of equal lengths that lie together in ``order``: int64 [T], or None where they do in the batch itself.
        seen: whether the query sees the key, for pairs of one segment; None: it does. causal: it never sees a later one.
        index: the row of a table of biases that the pair takes.
        alike: every segment has the same ``index`` for its pairs.
    """

    owner: Tensor
    runs: tuple[Run, ...]
    order: Tensor | None
    seen: PairFunction | None = None
    causal: bool = False
    index: PairFunction | None = None
    alike: bool = False

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str, **functions: Any) -> Pairs:
        """Those of segments of these ``lengths``, int64 [S] on the CPU."""
        counts = tuple(lengths.tolist())
        runs, order = plan(counts, counts)
        owner = torch.arange(len(counts)).repeat_interleave(lengths)
        return cls(_moved(owner, device), runs, None if order is None else _moved(order.q, device), **functions)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, table: Tensor | None = None, log_size: Tensor | None = None
    ) -> Tensor:
        """softmax over the keys j that i sees of scale <q_i, k_j> + table[index(i, j)] + log_size_j, times v: [T, H, e].

        Args:
            q: [T, H, d]. k: [T, Hkv, d]. v: [T, Hkv, e]. Hkv divides H; every query must see a key. The result has the dtype of v, and in
                FlexAttention the products do. scale: None means 1 / sqrt(d).
            table: [rows, H], has a gradient; through FlexAttention it is summed by atomics, not in the same order every time.
            log_size: [T], has none.
        """
        if q.shape[0] != self.owner.shape[0]:
            raise ValueError(
                f"Pairs: q has {q.shape[0]} tokens, the batch that the pairs were made for {self.owner.shape[0]}; make them for it"
            )
        return (self._flex if flexes(v) else self._dense)(q, k, v, scale, table, log_size)

    @functools.cached_property
    def block_mask(self) -> Any:
        """The mask as FlexAttention's BlockMask, made from the ends of blocks: nothing of T x T is stored, also while it is made."""
        owner, seen = self.owner, self.seen
        # Segments lie in order, so that two blocks share one exactly when the ranges of their first and last owners overlap.
        first = owner[::BLOCK]
        last = F.pad(owner, (0, -len(owner) % BLOCK), value=len(owner))[BLOCK - 1 :: BLOCK]
        overlap = (first[:, None] <= last) & (first <= last[:, None])
        # A mask that is causal by tokens is causal by blocks, too; the mask function still decides inside the blocks on the diagonal.
        if self.causal:
            overlap = overlap.tril()

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = owner[i] == owner[j]
            return same if seen is None else same & seen(i, j)

        # A stable sort puts the blocks that are read first, in their order; from_kv_blocks reads only as many as the count says.
        columns = overlap.int().argsort(dim=1, descending=True, stable=True).int()
        made = _flex_attention().BlockMask.from_kv_blocks
        tokens = len(owner), len(owner)
        return made(overlap.sum(1).int()[None, None], columns[None, None], BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=tokens)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, table: Tensor | None, log_size: Tensor | None) -> Tensor:
        index = cast(PairFunction, self.index)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if table is not None:
                s = s + table[index(i, j), h]
            return s if log_size is None else s + log_size[j]

        modify = None if table is None and log_size is None else score
        # Without compilation FlexAttention makes the whole matrix of scores.
        attend = _compiled_flex() if q.device.type == "cuda" else _flex_attention().flex_attention
        operands = (x.to(v.dtype).transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = attend(*operands, score_mod=modify, block_mask=self.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, table: Tensor | None, log_size: Tensor | None) -> Tensor:
        """Holds SCORES scores, or those of one segment; backward computes them again where there are more."""
        tokens = torch.arange(len(self.owner), device=q.device) if self.order is None else self.order
        if self.order is not None:
            q, k, v = (x.index_select(0, self.order) for x in (q, k, v))
        pieces = []
        # Segments of one length are one dense batch without padding; only so many at a time that the bound holds.
        for run in self.runs:
            step = max(1, SCORES // max(1, q.shape[1] * run.n**2))
            pieces += [(run.q_start + i * run.n, min(step, run.batch - i), run.n) for i in range(0, run.batch if run.n else 0, step)]
        # Autograd would keep the scores of every piece, and with that all of them.
        again = torch.is_grad_enabled() and q.shape[1] * sum(batch * n**2 for _, batch, n in pieces) > SCORES
        outs = [v.new_empty(0, q.shape[1], v.shape[2])]
        for start, batch, n in pieces:
            rows = slice(start, start + batch * n)
            inputs = (q[rows], k[rows], v[rows], tokens[rows].view(batch, n), scale, table, log_size)
            outs.append(checkpoint(self._piece, *inputs, use_reentrant=False, preserve_rng_state=False) if again else self._piece(*inputs))
        out = torch.cat(outs)
        return out if self.order is None else torch.empty_like(out).index_copy(0, self.order, out)

    def _piece(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float | None, table: Tensor | None, log_size: Tensor | None
    ) -> Tensor:
        """[batch * n, H, e] of segments whose tokens are the rows of ``tokens`` [batch, n]."""
        i, j = tokens[:, :, None], tokens[:, None]
        dtype, given = q.dtype, v.dtype
        mask = None if self.seen is None else self.seen(i, j)[:, None]
        bias = None if log_size is None else log_size[j][:, None]
        if table is not None:
            # Where all segments have the same places (windows), one table of biases serves the whole batch.
            rows = cast(PairFunction, self.index)(*((i[:1], j[:1]) if self.alike else (i, j)))
            relative = table.index_select(0, rows.flatten()).unflatten(0, rows.shape).permute(0, 3, 1, 2)
            bias = relative if bias is None else relative + bias
        if bias is not None:
            dtype = sum_dtype(dtype)
            mask = bias.to(dtype) if mask is None else bias.to(dtype).masked_fill(~mask, -torch.inf)
        q, k, v = (x.to(dtype).unflatten(0, tokens.shape).transpose(1, 2) for x in (q, k, v))
        # Autocast would round the scores' bias to 16 bits again.
        with torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1).to(given)


def flexes(v: Tensor) -> bool:
    """Whether FlexAttention computes this with a backward, and in kernels: not on CPUs, in float64 or for heads narrower than 16."""
    return v.device.type == "cuda" and v.dtype != torch.float64 and v.shape[2] >= 16 and v.shape[0] > 0


def _flex_attention() -> Any:
    return importlib.import_module("torch.nn.attention.flex_attention")


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(_flex_attention().flex_attention)


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    return x.to(device, non_blocking=True)
