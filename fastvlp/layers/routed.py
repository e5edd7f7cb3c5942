"""Weights by kind of token: one attention over all, and norms, projections and feed-forward layers of each kind's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastvlp.layers.transformer import Attend


class RoutedBlock(nn.Module):
    """A block whose tokens go through the weights of their kind and attend to one another (mixture of transformers, arXiv:2411.04996;
    LlamaFusion, arXiv:2412.15188). Every token costs what it costs in one block.

    Args:
        block: a :class:`Block`, the weights of kind 0. kinds: how many there are; the others start as copies of it.
    """

    def __init__(self, block: nn.Module, kinds: int = 2) -> None:
        super().__init__()
        if kinds < 1:
            raise ValueError(f"RoutedBlock: kinds is {kinds}; there is at least one")
        self.names = ["first", *(f"kind_{number}" for number in range(1, kinds))]
        for name in self.names:
            self.add_module(name, block if name == "first" else copy.deepcopy(block))

    def forward(self, x: Tensor, attend: Attend, rows: Sequence[Tensor]) -> Tensor:
        """x [T, C] -> [T, C]; ``rows``: the numbers of the tokens of each kind, int64, each token once."""
        blocks, back = [getattr(self, name) for name in self.names], torch.cat(list(rows)).argsort()

        def by_kind(tokens: Tensor, through: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
            return torch.cat([through(block, tokens[index]) for block, index in zip(blocks, rows, strict=True)])[back]

        q, k, v = by_kind(x, lambda block, own: torch.stack(block.queries_keys_values(own), 1)).unbind(1)
        x = x + by_kind(attend(q, k, v).flatten(-2), lambda block, own: block.proj(own))
        return x + by_kind(x, lambda block, own: block.down(block.activation(block.up(block.norm2(own)))))
