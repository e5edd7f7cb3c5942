"""The text tower, and the word embeddings that it shares with the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastvlp.layers import packed_blocks, transformer_blocks
from fastvlp.towers import inputs
from fastvlp_kernels.packed import Packed


class Words(nn.Module):
    """Token ids and their places in the caption -> tokens [T, C], normalised so that they are not small beside what blocks add to them.

    Args:
        width: C. vocab_size: ids go from 0 to vocab_size - 1. context_length: the longest caption.
    """

    def __init__(self, width: int, vocab_size: int, context_length: int) -> None:
        super().__init__()
        name = type(self).__name__
        if width < 1 or vocab_size < 1 or context_length < 3:
            raise ValueError(f"{name}: width is {width}, vocab_size {vocab_size} and context_length {context_length}; a context holds at "
                             "least a start, an end and one token, and the others are positive")
        self.width, self.vocab_size, self.context_length = width, vocab_size, context_length
        self.tokens = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        # Both embeddings start small and are normalised together: what counts is their ratio, words first.
        self.places = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.norm_in = nn.LayerNorm(width)

    def embed(self, texts: Packed) -> Packed:
        """Packed token ids [T], integers, with ``pos`` (index in the caption, -1, -1) -> the tokens before the first block, [T, C].

        Raises:
            TypeError, ValueError: these are no packed ids of this vocabulary, carry no positions, or are longer than the context.
        """
        place = inputs.places(type(self).__name__, texts, self.vocab_size, self.context_length)
        return texts.replace(x=self.norm_in(self.tokens(texts.x) + self.places[place]))


class Text(Words):
    """A transformer over packed captions.

    Args:
        width, vocab_size, context_length: as in :class:`Words`. depth, heads, mlp_ratio, activation, merge: as in ``Vit``.
        causal: a token sees those before it and itself.
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        activation: str = "relu2",
        vocab_size: int = 4096,
        context_length: int = 24,
        causal: bool = False,
        merge: float | Sequence[float] = (),
    ) -> None:
        super().__init__(width, vocab_size, context_length)
        self.causal, self.merge = causal, inputs.merge_shares("Text", merge, depth)
        if causal and any(self.merge):
            raise ValueError(f"Text: merge is {list(self.merge)} with causal=True; merging moves tokens and needs causal=False")
        self.blocks = transformer_blocks("Text", width, depth, heads, mlp_ratio, activation)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, texts: Packed) -> Packed:
        """As in :meth:`embed` -> the tokens after the last block, normalised: [T', C], fewer and with ``size`` where they merge."""
        tokens = packed_blocks(self.blocks, self.embed(texts), self.causal, self.merge)
        return tokens.replace(x=self.norm_out(tokens.x))
