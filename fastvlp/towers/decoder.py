"""A decoder of captions."""

from __future__ import annotations

from torch import Tensor, nn

from fastvlp.layers import CrossAttention, packed_attend, transformer_blocks
from fastvlp.towers.text import Words
from fastvlp_kernels.packed import Packed, check_packed


class Decoder(nn.Module):
    """Causal blocks over words, each of which looks at the image between attention and feed-forward layer. The head is the system's.

    Args:
        width, depth, heads, mlp_ratio, activation: as in ``Vit``.
        vocab_size: of its own word embeddings; None: it has none, and takes another tower's tokens (CoCa).
        context_length: the longest caption, of its own embeddings.
        source: width of the image tokens; None: ``width``.
        gated: cross attention starts as nothing, behind a tanh gate at 0 (Flamingo).
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        vocab_size: int | None = 4096,
        context_length: int = 24,
        mlp_ratio: float = 4.0,
        activation: str = "relu2",
        source: int | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.vocab_size, self.context_length = width, vocab_size, context_length
        # One that goes on from a text tower's tokens would have embeddings without use.
        self.words = None if vocab_size is None else Words(width, vocab_size, context_length)
        self.blocks = transformer_blocks("Decoder", width, depth, heads, mlp_ratio, activation)
        self.cross = nn.ModuleList(CrossAttention(width, heads, source, depth, gated) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def embed(self, texts: Packed) -> Packed:
        """Packed token ids [T] with ``pos`` -> tokens [T, C], by its own word embeddings."""
        if self.words is None:
            raise ValueError("Decoder: it has no word embeddings (vocab_size=None); pass tokens [T, C] of a text tower")
        return self.words.embed(texts)

    def forward(self, words: Packed, images: Packed) -> Packed:
        """Token ids [T], or tokens [T, C], and as many segments of image tokens [T', source] -> hidden states [T, C], normalised."""
        check_packed("Decoder", words=words)
        if not words.x.is_floating_point():
            words = self.embed(words)
        check_packed("Decoder", self.width, words=words)
        attend, x = packed_attend(words, causal=True), words.x
        for block, cross in zip(self.blocks, self.cross, strict=True):
            # cross is bound at once: when checkpointing calls it again, the loop's variable is the last one.
            def look(x: Tensor, cross: nn.Module = cross) -> Tensor:
                seen: Packed = cross(words.replace(x=x), images)
                return seen.x

            x = block(x, attend, look)
        return words.replace(x=self.norm_out(x))
