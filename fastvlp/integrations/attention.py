"""Attention over segments by the names and calls of flash-attn, torch and xformers, on ``fastvlp.ops.packed_attention``.

Everywhere packed_attention runs (also on CPUs) and with what it adds: sizes and biases of keys. What it does not compute (windows, soft
caps, paged keys) is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fastvlp_kernels import packed_attention


def _refuse(function: str, **unwanted: tuple[Any, Any]) -> None:
    """Refuse arguments that are not what they must be: name=(got, allowed)."""
    for name, (got, allowed) in unwanted.items():
        # Tensors first, since comparing one gives no single answer.
        if isinstance(got, Tensor) or got != allowed:
            got = "a tensor" if isinstance(got, Tensor) else repr(got)
            raise ValueError(f"{function}: {name}={got} is not computed by packed_attention; only {name}={allowed!r} is")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    key_size: Tensor | None = None,
    key_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> Tensor:
    """flash-attn's function (FlashAttention-2's arguments): [Tq, H, d] of q [Tq, H, d], k and v [Tk, Hkv, d].

    ``causal`` is aligned at the end of each segment, as there. Always deterministic. ``key_size``, ``key_bias`` and ``prefix_len`` as in
    :func:`fastvlp.ops.packed_attention`, which says what else is refused.

    Raises:
        ValueError: a window, a soft cap, ALiBi, returned probabilities or a block table are asked for.
    """
    _refuse(
        "flash_attn_varlen_func", window_size=(tuple(window_size), (-1, -1)), softcap=(softcap, 0.0),
        alibi_slopes=(alibi_slopes, None), return_attn_probs=(return_attn_probs, False),
        block_table=(block_table, None),
    )  # fmt: skip
    # The same tensor twice means self-attention, which has one set of bounds.
    out = packed_attention(
        q, k, v, cu_seqlens_q, None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_size=key_size,
        key_bias=key_bias, prefix_len=prefix_len, causal=causal, scale=softmax_scale, dropout_p=dropout_p,
    )  # fmt: skip
    return cast(Tensor, out)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    key_size: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn``: [Tq, H, d]; ``window_size=(-1, 0)`` is causal, aligned at the end of each segment.

    Raises:
        ValueError: another window, returned statistics, used lengths or a block table are asked for; fewer key heads without enable_gqa.
    """
    # torch's name for causal: all keys before a query and none behind it.
    causal = tuple(window_size) == (-1, 0)
    _refuse(
        "varlen_attn", return_aux=(return_aux, None), window_size=((-1, -1) if causal else tuple(window_size), (-1, -1)),
        seqused_k=(seqused_k, None), block_table=(block_table, None),
    )  # fmt: skip
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"varlen_attn: {query.shape[1]} query heads and {key.shape[1]} key heads; pass enable_gqa=True to share key heads")
    return flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=causal, key_size=key_size, key_bias=key_bias
    )


@dataclass(frozen=True)
class BlockDiagonalMask:
    """xformers' mask of segments laid end to end: the queries of a segment see the keys of the same segment.

    Make one with :meth:`from_seqlens`, :meth:`from_tensor_list` or :meth:`from_tensor_lists_qkv`.

    Attributes:
        q_lengths, k_lengths: int64 [S] on the CPU. q_starts, k_starts: int32 [S + 1] on the device.
        batch_sizes: how many segments each tensor of a list gave. causal: aligned at the end of each segment.
    """

    q_lengths: Tensor
    k_lengths: Tensor
    q_starts: Tensor
    k_starts: Tensor
    batch_sizes: tuple[int, ...]
    causal: bool = False

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | str | None = None
    ) -> BlockDiagonalMask:
        """Segments of these numbers of queries and keys (None: as many as queries).

        Raises:
            ValueError: there are not equally many segments of both, or a length is negative.
        """
        q = torch.tensor(q_seqlen, dtype=torch.int64)
        k = q if kv_seqlen is None else torch.tensor(kv_seqlen, dtype=torch.int64)
        if len(q) != len(k):
            raise ValueError(f"BlockDiagonalMask: {len(q)} segments of queries and {len(k)} of keys; every segment needs both")
        for name, x in (("q_seqlen", q), ("kv_seqlen", k)):
            if len(x) and int(x.min()) < 0:
                raise ValueError(f"BlockDiagonalMask: {name} is {x.tolist()}; the lengths of segments are 0 or more")
        starts = [torch.cat((x.new_zeros(1), x.cumsum(0))).to(device, torch.int32) for x in (q, k)]
        # One tensor for both where they are alike, by which self-attention is known.
        return cls(q, k, starts[0], starts[0] if k is q else starts[1], (1,) * len(q))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The mask of tensors [B_i, M_i, ...], each row a segment, and all of them as [1, sum of B_i M_i, ...]."""
        mask, joined, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return mask, joined

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        """The mask of queries [B_i, M_i, ...] and keys [B_i, N_i, ...], and the joined queries, keys and values (or None)."""
        sizes = tuple(x.shape[0] for x in tensors_q)
        lengths = [[x.shape[1] for x in tensors for _ in range(x.shape[0])] for tensors in (tensors_q, tensors_k)]
        made = cls.from_seqlens(lengths[0], None if tensors_k is tensors_q else lengths[1], device=tensors_q[0].device)
        mask = cls(made.q_lengths, made.k_lengths, made.q_starts, made.k_starts, sizes)
        q, k = _joined(tensors_q), _joined(tensors_k)
        return mask, q, k, None if tensors_v is None else _joined(tensors_v)

    def to(self, device: torch.device | str) -> BlockDiagonalMask:
        """The mask for tensors on ``device``."""
        q_starts = self.q_starts.to(device)
        return replace(self, q_starts=q_starts, k_starts=q_starts if self.k_starts is self.q_starts else self.k_starts.to(device))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[1, sum of B_i M_i, ...] back to the tensors [B_i, M_i, ...] of the list."""
        if not torch.equal(self.q_lengths, self.k_lengths):
            raise ValueError("BlockDiagonalMask.split: queries and keys differ in number; use split_queries or split_kv")
        return self.split_queries(tensor)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """As :meth:`split`, for a tensor with a row per query."""
        return self._split(tensor, self.q_lengths)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """As :meth:`split`, for a tensor with a row per key."""
        return self._split(tensor, self.k_lengths)

    def make_causal(self) -> BlockDiagonalMask:
        """A query sees the keys up to its own place.

        Raises:
            ValueError: a segment has other numbers of queries and keys, so that places at its start and at its end differ.
        """
        if not torch.equal(self.q_lengths, self.k_lengths):
            raise ValueError("BlockDiagonalMask.make_causal: queries and keys differ in number; use make_causal_from_bottomright")
        # With equal numbers both alignments are the same.
        return self.make_causal_from_bottomright()

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        """The last query of a segment sees all its keys, the one before all but the last."""
        return replace(self, causal=True)

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The mask as a tensor of ``shape`` [..., M, N] to be added to the scores: 0 and -inf."""
        mask = torch.full((int(self.q_lengths.sum()), int(self.k_lengths.sum())), -torch.inf, dtype=dtype, device=device)
        q_start = k_start = 0
        for n, m in zip(self.q_lengths.tolist(), self.k_lengths.tolist(), strict=True):
            # Aligned at the end: the last query sees all keys, so that the diagonal is shifted by the difference of the lengths.
            hidden = torch.full((n, m), -torch.inf, dtype=dtype, device=device).triu(m - n + 1) if self.causal else 0
            mask[q_start : q_start + n, k_start : k_start + m] = hidden
            q_start, k_start = q_start + n, k_start + m
        return mask.expand(tuple(shape))

    def _split(self, tensor: Tensor, lengths: Tensor) -> list[Tensor]:
        rows, found, first = tensor.squeeze(0).split(lengths.tolist()), [], 0
        for size in self.batch_sizes:
            found.append(torch.stack(rows[first : first + size]))
            first += size
        return found


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, 1) for x in tensors])[None]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: BlockDiagonalMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
    key_size: Tensor | None = None,
) -> Tensor:
    """xformers' function: [B, M, H, K] (or [B, M, K] of one head); with a :class:`BlockDiagonalMask`, B is 1 and M all segments together.

    Raises:
        ValueError: an ``op``, another bias than BlockDiagonalMask, or shapes that do not fit.
    """
    function = "memory_efficient_attention"
    _refuse(function, op=(op, None))
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        raise ValueError(f"{function}: got {shapes}; query, key and value must be [B, M, H, K], or [B, M, K] all of them")
    if attn_bias is None:
        device = query.device
        attn_bias = BlockDiagonalMask.from_seqlens([query.shape[1]] * len(query), [key.shape[1]] * len(key), device=device)
    elif not isinstance(attn_bias, BlockDiagonalMask):
        raise ValueError(f"{function}: attn_bias is {type(attn_bias).__name__}; it must be our BlockDiagonalMask or None")
    elif len(query) != 1:
        raise ValueError(f"{function}: query has a batch of {len(query)}; with a BlockDiagonalMask all segments lie in one, [1, M, H, K]")
    # A batch of equal lengths is one row of segments; 3-d inputs have a single head.
    q, k, v = (x.flatten(0, 1) if x.ndim == 4 else x.flatten(0, 1)[:, None] for x in (query, key, value))
    out = packed_attention(
        q, k, v, attn_bias.q_starts, attn_bias.k_starts, key_size=key_size, causal=attn_bias.causal, scale=scale,
        lengths=attn_bias.q_lengths, lengths_k=attn_bias.k_lengths, dropout_p=p,
    )  # fmt: skip
    return cast(Tensor, out).to(output_dtype or query.dtype).view(*query.shape[:-1], value.shape[-1])
