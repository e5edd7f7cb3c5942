"""The tokens of each type one after the other."""

import torch
from torch import Tensor


def route(op: str, types: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens sorted by type, int64 [T], in their order within a type, and where each of ``count`` types starts, int32 [count + 1].

    Raises:
        ValueError: on the CPU, a type that there is not.
    """
    if types.device.type == "cpu" and types.numel() and not 0 <= int(types.min()) <= int(types.max()) < count:
        raise ValueError(f"{op}: types go from {types.min()} to {types.max()}; weight has the types 0 to {count - 1}")
    # Stable, so that sums over the tokens of a type add in the same order in each run.
    kinds, order = types.sort(stable=True)
    boundaries = torch.arange(count + 1, dtype=kinds.dtype, device=types.device)
    return order, torch.searchsorted(kinds, boundaries, out_int32=True)
