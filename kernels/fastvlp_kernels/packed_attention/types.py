"""Which tokens see one another by their types: a bit for each type that a query sees, and the bit of each key's type."""

import torch
from torch import Tensor

from fastvlp_kernels import _check

MOST = 32  # bits of a number


def check_types(
    op: str, q: Tensor, k: Tensor, token_type: Tensor | None, token_type_k: Tensor | None, sees: Tensor | None, self_attention: bool
) -> Tensor | None:
    """The types of the keys, where everything that needs no value fits.

    Raises:
        TypeError, ValueError: only some of the three are given, or they do not fit.
    """
    if token_type is None and token_type_k is None and sees is None:
        return None
    if token_type is None or sees is None:
        raise ValueError(f"{op}: token_type, token_type_k and sees say together who sees whom; give token_type and sees, or none of them")
    if token_type_k is None:
        if not self_attention:
            raise ValueError(f"{op}: got token_type and cu_seqlens_k; other keys than queries need token_type_k too")
        token_type_k = token_type
    _check.plain_tensors(op, 4, q=q, token_type=token_type, token_type_k=token_type_k, sees=sees)
    _check.vector(op, "token_type", token_type, q.shape[0], integer=True)
    _check.vector(op, "token_type_k", token_type_k, k.shape[0], integer=True)
    types = sees.shape[0] if sees.ndim else 0
    if sees.dtype != torch.bool or sees.shape != (types, types) or not 0 < types <= MOST:
        raise ValueError(f"{op}: sees is {sees.dtype} {tuple(sees.shape)}; it must be bool [types, types] of 1 to {MOST} types")
    return token_type_k


def bits(op: str, token_type: Tensor | None, token_type_k: Tensor | None, sees: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """int32 [Tq], the bits of the types that each query sees, and [Tk], the bit of each key's type: a pair is seen where both share one.

    Raises:
        ValueError: on the CPU, a type that ``sees`` does not have.
    """
    if token_type is None or token_type_k is None or sees is None:
        return None, None
    types = sees.shape[0]
    if sees.device.type == "cpu":
        for name, given in (("token_type", token_type), ("token_type_k", token_type_k)):
            if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < types:
                raise ValueError(f"{op}: {name} goes from {given.min()} to {given.max()}; sees has the types 0 to {types - 1}")
    bit = torch.ones((), dtype=torch.int32, device=sees.device) << torch.arange(types, dtype=torch.int32, device=sees.device)
    seen = (sees * bit).sum(1, dtype=torch.int32)
    return seen[token_type.long()], bit[token_type_k.long()]


def pairs(seen: Tensor, kind: Tensor) -> Tensor:
    """bool [..., n, m] of queries [..., n] and keys [..., m]."""
    return (seen[..., :, None] & kind[..., None, :]) != 0
