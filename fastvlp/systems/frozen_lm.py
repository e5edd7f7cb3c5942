"""What captioners over a frozen language model have in common: which part speaks, and the model as recipes have it."""

from __future__ import annotations

from typing import Any

import fiddle as fdl
from torch import nn

from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.simvlm import SimVlm
from fastvlp.systems.system import Part, freeze
from fastvlp_kernels.packed import Packed


class FrozenLmCaptioner(Captioner):
    """A captioner that trains only what stands between a frozen image tower and a frozen language model.

    Args:
        lm: a system with ``text``, ``joint`` and ``words`` (``SimVlm``, trained on captions).
    """

    def __init__(self, image: Part, lm: Part) -> None:
        super().__init__()
        self.image, self.lm = freeze(image), freeze(lm)

    # Not an attribute: a module with two names would stand in the state twice.
    @property
    def words(self) -> nn.Module:
        """The language model's head."""
        return self.lm.words

    def embed_words(self, texts: Packed) -> Packed:
        """Token ids -> the tokens [T, C] before the language model's first block, ready to be joined with others."""
        return self.lm.text.embed(texts).replace(pos=None)


def small_lm(**text: Any) -> fdl.Config:
    """A captioner of six blocks over the shipped tokenizer's words; ``text``: of its text tower. ``run.start`` fills it."""
    return fdl.Config(SimVlm, shipped.patches(), shipped.words(**text), shipped.joint())


def large_lm(vocab_size: int, context_length: int, width: int = 4096, mlp_ratio: float = 4.0) -> fdl.Config:
    """A language model of the size of OPT's and LLaMA's: 32 blocks of 32 heads."""
    text = clip.text_b(width=width, vocab_size=vocab_size, context_length=context_length)
    joint = clip.joint_b(width=width, depth=32, heads=32, mlp_ratio=mlp_ratio)
    return fdl.Config(SimVlm, shipped.embedding(clip.vit_b(16)), shipped.embedding(text), joint)
