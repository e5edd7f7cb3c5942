"""One transformer over the tokens of several towers."""

from __future__ import annotations

from torch import Tensor, nn

from fastvlp.layers import packed_attend, transformer_blocks
from fastvlp_kernels.packed import Packed, check_packed


class Joint(nn.Module):
    """A transformer over segments that ``Packed.join`` made: patches and words that see one another (ViLT, SimVLM, ALBEF's fusion).

    Tokens come as towers embed or encode them; what tells one kind from another is the system's.

    Args:
        width, depth, heads, mlp_ratio, activation: as in ``Vit``.
    """

    def __init__(self, width: int = 192, depth: int = 4, heads: int = 3, mlp_ratio: float = 4.0, activation: str = "relu2") -> None:
        super().__init__()
        self.width = width
        self.blocks = transformer_blocks("Joint", width, depth, heads, mlp_ratio, activation)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens: Packed, prefix: Tensor | None = None, causal: bool = False) -> Packed:
        """Packed [T, C] -> the same segments, [T, C], normalised; ``tokens.size`` weighs the keys.

        Args:
            prefix: integers [S] (``images.lengths``): so many first tokens of each segment are seen by all, the rest causally.
            causal: a token sees those before it and itself.
        """
        check_packed("Joint", self.width, tokens=tokens)
        # One mask for all blocks: it is made of lengths alone.
        attend, x = packed_attend(tokens, causal or prefix is not None, prefix), tokens.x
        for block in self.blocks:
            x = block(x, attend)
        return tokens.replace(x=self.norm_out(x))
