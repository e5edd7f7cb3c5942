"""Memory for large results on the CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor beside ``like``. NumPy asks Linux for huge pages from 4 MiB on, PyTorch does not: gradients of 16 MiB that
    are touched for the first time then cost 8 page faults instead of 4,096, 4 to 7 % of a loss on a virtual machine. Not for hundreds of
    MiB: there memory that the host has yet to find costs more than the faults."""
    if like.device.type != "cpu" or dtype not in NUMPY_DTYPES:
        return like.new_empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(tuple(shape), NUMPY_DTYPES[dtype]))


def zeros(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``empty``, filled with zeros."""
    return empty(like, shape, dtype).zero_()
