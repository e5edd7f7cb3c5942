"""Captions as token ids: drawn, sheared, masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fastvlp.data.batch import Stage
from fastvlp.data.fields.field import CAPTION, MASK, SHEAR, Field, Record, of_part, part_of, with_bound
from fastvlp.data.patches import mix, pack_texts
from fastvlp_kernels.packed import Packed

if TYPE_CHECKING:
    from fastvlp.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Caption(Field):
    """Token ids of a caption: ``Packed`` int64 [T] with pos (index, -1, -1); one segment a sample, or ``pick`` of them.

    All ``Caption`` fields of a recipe show the same captions of a sample, so those that differ in nothing but ``mask`` have the same tokens
    where they are not masked.

    Args:
        length: most tokens; None: the part's ``context_length``, else the tokenizer's.
        pick: "one" at random, or a number of captions, none twice while there are enough.
        mask: share of the words that is hidden, at least one (all tokens of a word, where the tokenizer knows words).
        shear: keep a stretch of that many words, at a random place (block masking of CLIPA, Li et al. 2023).
        max_captions: use only the first so many captions of a sample.
        part: of the system. mask_id: the token that stands for a hidden one, which no caption has.
        ends: ids before and behind each caption, for a tokenizer without any (the shipped one), so that captioners learn its first word and
            where to stop; they count in ``length``.
    """

    length: int | None = None
    pick: Literal["one"] | int = "one"
    mask: float = 0.0
    shear: int | None = None
    max_captions: int | None = None
    part: str = "text"
    mask_id: int | None = None
    ends: tuple[int, int] | None = None
    _tokenizer: Any = field(default=None, init=False, repr=False)  # a Tokenizer

    def __post_init__(self) -> None:
        if self.pick != "one" and not (isinstance(self.pick, int) and self.pick >= 1):
            raise ValueError(f'Caption: pick is {self.pick!r}; "one" or a number of captions is allowed')
        if not 0 <= self.mask <= 1:
            raise ValueError(f"Caption: mask is {self.mask}; it is a share of the words, from 0 to 1")
        if any(value is not None and value < 1 for value in (self.length, self.shear, self.max_captions)):
            raise ValueError(f"Caption: length {self.length}, shear {self.shear} and max_captions {self.max_captions} are at least 1")

    def bind(self, model: Any, tokenizer: Any) -> Caption:
        if tokenizer is None:
            raise ValueError("Caption: the recipe has no tokenizer; give it one, such as tokenizer='mini'")
        length = self.length or of_part(self, self.part, model, "context_length", "length", tokenizer.context_length)
        if self.mask and self.mask_id is None:
            raise ValueError(f"Caption: mask is {self.mask} without a mask_id; give an id that captions do not use (the tokenizer's are "
                             f"0 to {tokenizer.vocab_size - 1})")
        if self.ends is not None and (tokenizer.start or tokenizer.end or length < 3):
            raise ValueError(f"Caption: ends is {self.ends}, the tokenizer's own are {tokenizer.start} and {tokenizer.end} and length is "
                             f"{length}; leave ends out where the tokenizer has its own, and give at least 3 tokens")
        part = part_of(self.part, model)
        # Found out here: on a GPU an id beyond the table ends the process in an assertion without a name.
        for name, value, most in (("length", length, getattr(part, "context_length", None)),
                                  ("the tokenizer's vocabulary", tokenizer.vocab_size, getattr(part, "vocab_size", None)),
                                  ("mask_id + 1", (self.mask_id or 0) + 1, getattr(part, "vocab_size", None)),
                                  ("ends + 1", max(self.ends or (0,)) + 1, getattr(part, "vocab_size", None))):
            if most is not None and value > most:
                raise ValueError(f"Caption: {name} is {value} and the part {self.part!r} was made for {most}; raise that, or lower this")
        return with_bound(replace(self, length=length), _tokenizer=tokenizer)

    def check(self, sample: Record, stage: Stage) -> None:
        sample.captions  # noqa: B018  # reads them

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        texts = self.texts(samples, words)
        ids = [self._encode(text) for text in texts]
        if self.mask:
            seeds = self._words(words, MASK)
            ids = [self._masked(text, tokens, seed) for text, tokens, seed in zip(texts, ids, seeds, strict=True)]
        return pack_texts([torch.tensor(tokens) for tokens in ids])

    def texts(self, samples: Sequence[Record], words: np.ndarray) -> list[str]:
        """The captions that are shown, ``pick`` of each sample."""
        chosen: list[str] = []
        draws = (self._words(words, CAPTION) >> np.uint64(1)).reshape(len(words), -1).tolist()
        for sample, numbers in zip(samples, draws, strict=True):
            captions = sample.captions[:self.max_captions]
            rest: list[str] = []
            for number in numbers:
                # Without putting back until all were drawn, so that more picks show more captions.
                rest = rest or list(captions)
                chosen.append(rest.pop(number % len(rest)))
        if self.shear is None:
            return chosen
        return [_sheared(text, self.shear, int(word)) for text, word in zip(chosen, self._words(words, SHEAR), strict=True)]

    def _words(self, words: np.ndarray, which: int) -> np.ndarray:
        """A random word for each caption of each sample; those of the first do not depend on how many there are."""
        each = 1 if self.pick == "one" else self.pick
        first = mix(words, np.array([which]))
        return first if each == 1 else np.stack([first, *(mix(first, np.array([number])) for number in range(1, each))], 1).reshape(-1)

    def cuts(self, text: str) -> bool:
        """Whether a caption has more tokens than are used."""
        # One token more than fits tells it, without the rest of a long text.
        return self.length is not None and len(self._tokenizer.encode(text, self.length + 1)) > self.length

    def prepare(self, raw: Sequence[str]) -> Packed:
        """All tokens of some strings."""
        if isinstance(raw, str):
            raise TypeError("Caption: got one string; pass a list of strings")
        return pack_texts([torch.tensor(self._encode(text)) for text in raw])

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("Caption: no tokenizer yet; bind the field to a system and a tokenizer")
        if self.ends is None or self.length is None:
            return self._tokenizer.encode(text, self.length)
        return [self.ends[0], *self._tokenizer.encode(text, self.length - 2), self.ends[1]]

    def _masked(self, text: str, tokens: list[int], seed: np.uint64) -> list[int]:
        """``tokens`` with a share of the words hidden: those with the smallest scores, as patches are kept."""
        tokenizer = self._tokenizer
        assert tokenizer is not None and self.mask_id is not None  # bind saw to them
        first, behind = (len(tokenizer.start), len(tokenizer.end)) if self.ends is None else (1, 1)
        body = len(tokens) - first - behind
        words, word_of = np.unique(_word_of_tokens(tokenizer, text, body), return_inverse=True)
        count = len(words)
        if count == 0:  # an empty caption
            return tokens
        # Of whole words, as a hidden piece is given away by the rest of its word.
        hidden = mix(np.repeat(seed, count), np.arange(count)).argsort(kind="stable")[:max(1, int(count * self.mask + 0.5))]
        masked = np.array(tokens)
        masked[first:first + body][np.isin(word_of, hidden)] = self.mask_id
        return masked.tolist()


def _sheared(text: str, keep: int, word: int) -> str:
    words = text.split()
    first = word % max(1, len(words) - keep + 1)
    return " ".join(words[first:first + keep])


def _word_of_tokens(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    """The number of the word that each of the first ``count`` tokens of a caption belongs to, without start and end."""
    for reach in (64 * count + 1024, len(text)):  # of a text of a million characters, the beginning is enough
        encoding = tokenizer.core.encode(text[:reach], add_special_tokens=False)
        if len(encoding.ids) >= 2 * count:
            break
    words = [word for word in encoding.word_ids if word is not None]
    # A tokenizer that knows no words has one for each token.
    return words[:count] if len(words) == len(encoding.ids) else list(range(count))
