"""What systems have in common that predict a caption word by word: its likelihood, and writing one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlp.data.batch import Batch
from fastvlp.data.patches import pack_texts
from fastvlp.losses import next_token_hits, next_token_nll, word_nll
from fastvlp.systems.system import Outputs, System
from fastvlp_kernels.packed import Packed


class Captioner(System):
    """-log p(word | picture, words before it), the mean over words. A subclass says what the states are, and has the head ``words``."""

    def states(self, images: Packed, texts: Packed) -> Packed:
        """Hidden states [T, C] at the tokens of ``texts``, each of which sees the picture and the words up to its own."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> Outputs:
        return {"words_loss": batch.per_token(self.caption_nll(batch.image, batch.text), "words")}

    def counts(self, batch: Batch) -> dict[str, int]:
        # The first token of a caption is given, not predicted.
        return {"words": batch.text.total - len(batch)}

    def caption_nll(self, images: Packed, texts: Packed) -> Tensor:
        return next_token_nll(self.states(images, texts), self.words, texts)

    def caption_hits(self, images: Packed, texts: Packed) -> Tensor:
        return next_token_hits(self.states(images, texts), self.words, texts)

    def next_words(self, images: Packed, texts: Packed) -> Tensor:
        """Logits [n, V] of the word that follows each caption's last."""
        return self.words(self.states(images, texts).last(1).x)

    def generate(self, images: Any, **options: Any) -> list[list[int]]:
        """Token ids of a caption for each picture (see ``prepared``), without its start and end.

        ``options``: those of :func:`write`; ``start`` and ``end`` are the tokenizer's or the field's ``ends``, where there are any.
        """
        images = self.prepared("image", images)
        start, end = self.tokenizer.start if self.tokenizer else [], self.tokenizer.end if self.tokenizer else []
        # A field's own ends win: the tokenizer of a recipe that sets them has none.
        ends = getattr(self.fields.get("text"), "ends", None) or ((start[0], end[-1]) if start and end else None)
        options = ({} if ends is None else {"start": ends[:1], "end": ends[1]}) | options
        if not {"start", "end"} <= options.keys():
            raise ValueError(
                f"{type(self).__name__}.generate: neither tokenizer nor field says where a caption starts and ends; pass start= "
                "and end=, or train with Caption(ends=...)"
            )
        return write(lambda rows, texts: self.next_words(images.take(rows), texts), len(images), **options, device=images.x.device)


class MaskedCaptioner(Captioner):
    """A captioner that predicts a word at a hidden place behind those before it, and so takes a pass for every word.

    A subclass says what the states are, and has ``words`` and ``mask_id``, which stands for a hidden word.
    """

    def hide_ends(self, masked: Packed, which: Tensor) -> Packed:
        """The masked captions with their last token hidden, too, where ``which``, bool [S]: so writing learns when to stop."""
        ends = masked.cu_seqlens[1:].long() - 1
        return masked.replace(x=masked.x.index_copy(0, ends, torch.where(which, self.mask_id, masked.x[ends])))

    def caption_nll(self, images: Packed, texts: Packed) -> Tensor:
        rows, states, words = self._each_word(images, texts)
        nll = word_nll(states, self.words, words)
        # A caption of one token has no word to predict, and keeps 0.
        return nll.new_zeros(len(texts)).index_add(0, rows, nll)

    @torch.no_grad()
    def caption_hits(self, images: Packed, texts: Packed) -> Tensor:
        rows, states, words = self._each_word(images, texts)
        return words.new_zeros(len(texts)).index_add(0, rows, (self.words(states.x).argmax(1) == words).to(words.dtype))

    def _each_word(self, images: Packed, texts: Packed) -> tuple[Tensor, Packed, Tensor]:
        """Of every word but the first of each caption: the caption's number, the state of a hidden word in its place, and the word."""
        counts = texts.lengths - 1
        rows = torch.arange(len(texts)).repeat_interleave(counts)
        # The n-th word of a caption sees the n before it: one pass with a copy of the caption for each of its words.
        known = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows] + 1
        begun = texts.take(rows).first(known + 1)
        return rows.to(texts.x.device), self._behind(images.take(rows), begun.first(known)), begun.last(1).x

    def next_words(self, images: Packed, texts: Packed) -> Tensor:
        return self.words(self._behind(images, texts).x)

    def _behind(self, images: Packed, texts: Packed) -> Packed:
        """The state of a hidden word behind each caption: one token a segment."""
        lengths = texts.cu_seqlens.diff()
        # A hidden word stands where the next word would, and knows by its place which one it is.
        place = torch.stack([lengths, *[torch.full_like(lengths, -1)] * 2], 1)
        hidden = Packed.of(texts.x.new_full((len(texts),), self.mask_id), [1] * len(texts), pos=place)
        return self.states(images, texts.join(hidden)).last(1)


@torch.no_grad()
def write(
    follow: Callable[[list[int], Packed], Tensor],
    count: int,
    *,
    start: Sequence[int],
    end: int,
    most: int = 20,
    top_p: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """``count`` captions, each word the most likely one, or with ``top_p`` a random one.

    Every step computes all words of the unfinished captions again: correct with any system, and quadratic in their length.

    Args:
        follow: numbers of captions and what they say so far, packed ids -> logits [n, V] of the next word of each.
        start: ids that all begin with, at least one. end: the id that ends one. most: longest caption in words, without the end.
        top_p: draw among the fewest words that together have at least this probability (Holtzman et al. 2019, arXiv:1904.09751), from
            ``generator`` (on the CPU). temperature: divides the logits first.

    Raises:
        ValueError: ``start`` is empty, or ``most``, ``top_p`` or ``temperature`` is out of range.
    """
    if not start or most < 1 or not temperature > 0 or not (top_p is None or 0 < top_p <= 1):
        raise ValueError(
            f"write: start is {list(start)}, most {most}, top_p {top_p} and temperature {temperature}; start holds an id, most "
            "is at least 1, top_p above 0 and at most 1, temperature positive"
        )
    captions: list[list[int]] = [list(start) for _ in range(count)]
    open_ = list(range(count))
    for _ in range(most):
        if not open_:
            break
        # In float64, so that sums of probabilities add no rounding of their own before top_p cuts them.
        logits = follow(open_, pack_texts([torch.tensor(captions[row]) for row in open_]).to(device)).cpu().double() / temperature
        words = logits.argmax(1) if top_p is None else _draw(logits.softmax(1), top_p, generator)
        for row, word in zip(open_, words.tolist(), strict=True):
            captions[row].append(word)
        # Finished captions drop out, so that long ones do not cost the others anything.
        open_ = [row for row in open_ if captions[row][-1] != end]
    return [[word for word in caption[len(start) :] if word != end] for caption in captions]


def _draw(chances: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One word [n] of each row, among the most likely ones of which all but the last have less than ``top_p`` together."""
    ranked, words = chances.sort(dim=1, descending=True, stable=True)
    # A word stays if those before it have less than top_p together; so the likeliest one always stays.
    ranked = ranked.masked_fill(ranked.cumsum(1) - ranked >= top_p, 0)
    return words.gather(1, torch.multinomial(ranked, 1, generator=generator)).squeeze(1)
