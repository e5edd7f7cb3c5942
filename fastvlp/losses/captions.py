"""The negative log-likelihood of words, summed over each caption of a packed batch, without the logits of all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels import linear_cross_entropy, similarity_attend, similarity_logsumexp
from fastvlp_kernels.packed import Packed, check_packed, check_segments_of

IGNORE = -100
LOGITS = 1 << 24  # at most so many are held at a time: 64 MiB in float32

Head = nn.Linear | Tensor


def word_nll(hidden: Packed, head: Head, targets: Tensor) -> Tensor:
    """-log p(target | state) in nats, summed over each segment: [S], float32 (float64 for float64).

    Args:
        hidden: packed [T, C]. head: a Linear, or a weight [V, C] (tied word embeddings). targets: integers [T] below V, or -100: not
            counted.

    Raises:
        ValueError: the targets do not fit.
    """
    weight, bias = (head, None) if isinstance(head, Tensor) else (head.weight, head.bias)
    check_packed("word_nll", weight.shape[1], hidden=hidden)
    if targets.shape != (hidden.total,) or targets.is_floating_point():
        raise ValueError(f"word_nll: targets are {targets.dtype} {tuple(targets.shape)}; they must be integers ({hidden.total},)")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))]
        if len(wrong):
            raise ValueError(f"word_nll: a target is {int(wrong[0])}; allowed: 0 to {len(weight) - 1}, and {IGNORE} for none")
    return segment_sum(linear_cross_entropy(hidden.x, weight, targets.long(), bias, ignore_index=IGNORE, reduction="none"), hidden)


def hidden_words(text: Packed, masked: Packed) -> Tensor:
    """Which tokens of ``text`` another id stands for in ``masked``, the same captions with words hidden: bool [T]."""
    return masked.x != text.x


def masked_word_nll(hidden: Packed, head: Head, text: Packed, masked: Packed) -> Tensor:
    """-log p of the words that ``masked`` hides (BERT), summed over each segment: [S]; ``hidden``: the states at its tokens."""
    return word_nll(hidden, head, text.x.masked_fill(~hidden_words(text, masked), IGNORE))


def segment_sum(values: Tensor, packed: Packed) -> Tensor:
    """The sum of ``values`` [T] over each segment of ``packed``: [S]."""
    # The lengths are on the host, so the output size is known and the device is not asked.
    counts = packed.lengths.to(values.device, non_blocking=True)
    owner = torch.arange(len(packed), device=values.device).repeat_interleave(counts, output_size=packed.total)
    return values.new_zeros(len(packed)).index_add(0, owner, values)


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
    # The argmax needs logits, but never those of all tokens at once.
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


def word_kl(hidden: Packed, head: nn.Linear, taught: Packed, taught_head: nn.Linear, temperature: float = 1.0) -> Tensor:
    """temperature^2 * KL(teacher | student) of the words at each token, summed over each segment: [S] (Hinton et al. 2015,
    arXiv:1503.02531).

    No logits of all tokens are stored; the teacher gets no gradient.

    Args:
        hidden, taught: packed [T, C] and [T, E] of the same segments. head, taught_head: to V words, with biases.
    """
    check_segments_of("word_kl", hidden, taught.lengths)
    if head.bias is None or taught_head.bias is None or len(head.weight) != len(taught_head.weight):
        raise ValueError(f"word_kl: the heads are {tuple(head.weight.shape)} and {tuple(taught_head.weight.shape)}; they must have as many "
                         "words, and biases")
    s, t = hidden.x.to(head.weight.dtype), taught.x.detach().to(head.weight.dtype)
    mine, theirs = torch.cat([head.weight, head.bias[:, None]], 1), torch.cat([taught_head.weight, taught_head.bias[:, None]], 1).detach()
    # With p the teacher's softmax, KL = sum_j p_j (t_j - s_j) - log-sum-exp(t) + log-sum-exp(s), and sums of p_j s_j need no s_j.
    mean, of_teacher = similarity_attend(t, theirs[:, :-1], torch.cat([theirs, mine], 1), 1 / temperature,
                                         col_bias=theirs[:, -1] / temperature)
    t_mean, s_mean = mean.split([theirs.shape[1], mine.shape[1]], 1)
    expected = torch.linalg.vecdot(t, t_mean[:, :-1]) + t_mean[:, -1] - torch.linalg.vecdot(s, s_mean[:, :-1]) - s_mean[:, -1]
    of_student = similarity_logsumexp(s, head.weight, 1 / temperature, col_bias=head.bias / temperature)[0]
    return segment_sum(temperature**2 * (expected / temperature - of_teacher + of_student), hidden)
