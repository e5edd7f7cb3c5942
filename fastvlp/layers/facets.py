"""FLAME's facet-decoupled attention: one pass of a causal text tower over a caption and several prompts that do not see one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp.layers.pairs import Pairs
from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed

MOST_FACETS = 31  # beside the prefix: packed_attention knows 32 types of tokens


@dataclass(frozen=True, eq=False)
class FacetMask:
    """Who sees whom among packed texts, each a prefix with its facets behind it; :func:`facet_mask` makes it.

    Attributes:
        lengths: int64 [S] on the CPU, the tokens of each text: ``Packed.of(x, mask.lengths)``.
        starts: int32 [S+1], where each text starts. facet: int64 [T], 0 for the prefix, then 1, 2, ...
        sees: bool [facets + 1, facets + 1], which facets (row) see which (column): the prefix and itself.
        position: int64 [T], the place of a token where its facet alone follows the prefix: with these positions (``position_ids``, also
            rotary) a pass over all facets equals one pass for each. The released FLAME numbers the tokens of a text through instead.
        last: int64 [facets of all texts], the last token of each facet, whose output is its embedding.
    """

    lengths: Tensor
    starts: Tensor
    facet: Tensor
    sees: Tensor
    position: Tensor
    last: Tensor
    pairs: Pairs

    @property
    def block_mask(self) -> Any:
        """FlexAttention's BlockMask for the packed tokens, [1, 1, T, T]; its ``mask_mod`` composes with others."""
        return self.pairs.block_mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention for q [T, H, d], k and v [T, Hkv, d]; Hkv divides H. An ``Attend``, which :class:`fastvlp.layers.Block` takes."""
        longest = int(self.lengths.max()) if len(self.lengths) else None
        out = packed_attention(
            q, k, v, self.starts, max_seqlen_q=longest, causal=True, token_type=self.facet, sees=self.sees, lengths=self.lengths
        )
        return cast(Tensor, out)

    def dense(self) -> Tensor:
        """bool [S, 1, N, N], True where the query sees the key, for texts padded behind their tokens to the longest (``Packed.to_padded``).

        A place of padding sees itself. Models of transformers take it as ``attention_mask`` with attn_implementation="sdpa".
        """
        width = int(self.lengths.max()) if len(self.lengths) else 0
        place = torch.arange(width, device=self.facet.device)
        tokens, real = Packed.of(torch.arange(len(self.facet), device=self.facet.device), self.lengths).to_padded()
        seen = cast(Any, self.pairs.seen)(tokens[:, :, None], tokens[:, None]) & real[:, None] & real[:, :, None]
        # A row of padding that saw nothing would be a softmax over nothing, NaN, which masking afterwards does not remove.
        return (seen | (place == place[:, None]))[:, None]


def facet_mask(prefix: Sequence[int], facets: Sequence[int] | Sequence[Sequence[int]], device: torch.device | str = "cpu") -> FacetMask:
    """Facet-decoupled attention (FLAME, https://arxiv.org/abs/2411.11927), causal: a token sees the prefix of its text and its own facet.

    Args:
        prefix: the numbers of tokens of each text before its facets, [S].
        facets: the numbers of tokens of the facets: those of every text alike (prompts do not change), or [S] of such lists.

    Raises:
        ValueError: a facet without tokens, a negative prefix, other numbers of texts, or more than 31 facets.
    """
    per_text = facets if any(isinstance(sizes, Sequence) for sizes in facets) else [facets] * len(prefix)
    if len(per_text) != len(prefix):
        raise ValueError(f"facet_mask: {len(prefix)} prefixes and facets of {len(per_text)} texts; every text needs both")
    sizes: list[int] = []
    kinds: list[int] = []
    # Every facet is numbered as if it came right behind the prefix, so that its rotary or learned places are those of a pass for it alone.
    bases: list[int] = []
    for text, (shared, own) in enumerate(zip(prefix, cast(Sequence[Sequence[int]], per_text), strict=True)):
        if shared < 0 or min(own, default=1) < 1:
            raise ValueError(f"facet_mask: text {text} has a prefix of {shared} tokens and facets of {list(own)}; facets have 1 or more")
        sizes += [shared, *own]
        kinds += range(len(own) + 1)
        bases += [0, *[shared] * len(own)]
    most = max(kinds, default=0)
    if most > MOST_FACETS:
        raise ValueError(f"facet_mask: a text has {most} facets; at most {MOST_FACETS} are allowed, so pass the others as a second batch")
    sees = torch.eye(most + 1, dtype=torch.bool)
    sees[:, 0] = True
    counts, kind = torch.tensor(sizes, dtype=torch.int64), torch.tensor(kinds, dtype=torch.int64)
    ends = counts.cumsum(0)
    position = torch.arange(int(counts.sum())) + (torch.tensor(bases, dtype=torch.int64) - ends + counts).repeat_interleave(counts)
    facet = kind.repeat_interleave(counts).to(device, non_blocking=True)
    lengths = torch.tensor([shared + sum(own) for shared, own in zip(prefix, cast(Any, per_text), strict=True)], dtype=torch.int64)

    def seen(i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((facet[j] == 0) | (facet[j] == facet[i]))

    last = (ends[kind > 0] - 1).to(device, non_blocking=True)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    starts, sees, position = (x.to(device, non_blocking=True) for x in (starts, sees, position))
    return FacetMask(lengths, starts, facet, sees, position, last, Pairs.of(lengths, device, seen=seen, causal=True))
