"""A small tower that starts as some layers of a large one."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def take_layers(small: nn.Module, large: nn.Module) -> None:
    """Copy the weights of ``large`` into ``small``, a tower of the same widths and fewer ``blocks``, evenly spread over those of ``large``:
    of 12 blocks, 6 take 0, 2, 4, 6, 8 and 10 (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).

    Raises:
        ValueError: the towers differ in more than their depth, or ``small`` is the deeper one.
    """
    target, source = small.state_dict(), large.state_dict()
    few, many = (len(tower.blocks) for tower in (small, large))  # type: ignore[arg-type]  # a ModuleList
    for name, tensor in target.items():
        where = name.split(".")
        if where[0] == "blocks":
            # Spread evenly: neighbouring layers do nearly the same, so that the ones between are missed least.
            where[1] = str(int(where[1]) * many // few)
        found = source.get(".".join(where))
        if found is None or found.shape != tensor.shape or few > many:
            raise ValueError(f"take_layers: {name} {tuple(tensor.shape)} has no counterpart in the large tower of {many} blocks; both "
                             f"must be alike but for their depth, the small one with at most as many blocks as the large one, not {few}")
        tensor.copy_(found)
