"""The negative log-likelihood of words, summed over each caption of a packed batch, without the logits of all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels import linear_cross_entropy
from fastvlp_kernels.packed import Packed, check_packed, check_segments_of

IGNORE = -100
LOGITS = 1 << 24  # at most so many are held at a time: 64 MiB in float32

Head = nn.Linear | Tensor


def word_nll(hidden: Packed, head: Head, targets: Tensor) -> Tensor:
    """-log p(target | hidden state) in nats, summed over each segment: [S], float32 (float64 for float64). An empty segment has 0.

    Args:
        hidden: packed [T, C]. head: the matrix of the logits, a Linear or a weight [V, C] (of tied word embeddings).
        targets: integers [T] from 0 to V - 1, or -100 for tokens that do not count.
    """
    weight, bias = (head, None) if isinstance(head, Tensor) else (head.weight, head.bias)
    check_packed("word_nll", weight.shape[1], hidden=hidden)
    if targets.shape != (hidden.total,) or targets.is_floating_point():
        raise ValueError(f"word_nll: targets are {targets.dtype} {tuple(targets.shape)}; they must be integers ({hidden.total},)")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))]
        if len(wrong):
            raise ValueError(f"word_nll: a target is {int(wrong[0])}; allowed: 0 to {len(weight) - 1}, and {IGNORE} for none")
    nll = linear_cross_entropy(hidden.x, weight, targets.long(), bias, ignore_index=IGNORE, reduction="none")
    counts = hidden.lengths.to(nll.device, non_blocking=True)
    owner = torch.arange(len(hidden), device=nll.device).repeat_interleave(counts, output_size=hidden.total)
    return nll.new_zeros(len(hidden)).index_add(0, owner, nll)


def next_token_nll(hidden: Packed, head: Head, texts: Packed) -> Tensor:
    """-log p of each caption's tokens but the first, given those before them, in nats, summed: [S].

    Args:
        hidden: packed [T, C], the states at the tokens of ``texts``. head: as in :func:`word_nll`. texts: packed ids [T].
    """
    check_segments_of("next_token_nll", hidden, texts.lengths)
    return word_nll(hidden, head, _next(texts))


@torch.no_grad()
def next_token_hits(hidden: Packed, head: Head, texts: Packed) -> Tensor:
    """How many of each caption's tokens but the first are the likeliest one, given those before them: int64 [S].

    Arguments as in :func:`next_token_nll`.
    """
    check_segments_of("next_token_hits", hidden, texts.lengths)
    weight, bias = (head, None) if isinstance(head, Tensor) else (head.weight, head.bias)
    step = max(1, LOGITS // weight.shape[0])
    likeliest = torch.cat([F.linear(x, weight, bias).argmax(1) for x in hidden.x.split(step)])
    owner = torch.arange(len(texts)).repeat_interleave(texts.lengths).to(likeliest.device)
    return torch.zeros(len(texts), dtype=torch.int64, device=owner.device).index_add(0, owner, (likeliest == _next(texts)).long())


def _next(texts: Packed) -> Tensor:
    """The token after each, and IGNORE at the end of each caption: int64 [T]."""
    targets = texts.x.long().roll(-1)
    if texts.total:
        # The last token of each caption predicts nothing. An empty one points at the end of the one before, or of the last: both are ends.
        ends = (texts.cu_seqlens[1:].long() - 1) % texts.total
        targets = targets.index_fill(0, ends, IGNORE)
    return targets
