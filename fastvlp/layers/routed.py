"""Weights by kind of token: one attention over all, and norms, projections and feed-forward layers of each kind's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.layers.transformer import Attend


class RoutedBlock(nn.Module):
    """A block whose tokens go through the weights of their kind and attend to one another (mixture of transformers, arXiv:2411.04996;
    LlamaFusion, arXiv:2412.15188). Every token costs what it costs in one block.

    Args:
        blocks: a :class:`Block` for each kind, of as many heads.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("RoutedBlock: got no blocks; one for each kind of token is needed")
        # Not a ModuleList, whose members are gathered one by one: these are read weight by weight, inside this one's forward.
        self.kinds = [f"kind_{number}" for number in range(len(blocks))]
        for name, block in zip(self.kinds, blocks, strict=True):
            self.add_module(name, block)

    def forward(self, x: Tensor, attend: Attend, rows: Sequence[Tensor]) -> Tensor:
        """x [T, C] -> [T, C]; ``rows``: the numbers of the tokens of each kind, int64, each token once."""
        blocks, back = [getattr(self, name) for name in self.kinds], torch.cat(list(rows)).argsort()

        def by_kind(tokens: Tensor, through: Callable[[Any, Tensor], Tensor]) -> Tensor:
            return torch.cat([through(block, tokens[index]) for block, index in zip(blocks, rows, strict=True)])[back]

        q, k, v = by_kind(x, lambda block, own: torch.stack(block.queries_keys_values(own), 1)).unbind(1)
        x = x + by_kind(attend(q, k, v).flatten(-2), lambda block, own: block.proj(own))
        return x + by_kind(x, lambda block, own: block.down(block.activation(block.up(block.norm2(own)))))
