"""Operations of matrix products that a system's tokens need, a multiply-add being 2, counted while it runs.

Importing this teaches PyTorch's own counter (``torch.utils.flop_counter``) our operators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

import fastvlp_kernels  # noqa: F401  # makes the operators
from fastvlp_kernels.packed import Packed


def visible_pairs(
    lengths: Tensor, lengths_k: Tensor, causal: bool, prefix: Tensor | None = None, token_type: Tensor | None = None,
    token_type_k: Tensor | None = None, sees: Tensor | None = None,
) -> int:  # fmt: skip
    """Pairs of query and key that see each other, over all segments: integers [S] on the CPU; see ``packed_attention`` for the rest."""
    if not causal and sees is None:
        # In int64, as the pairs of a large batch pass 2^31.
        return int((lengths.long() * lengths_k.long()).sum())
    # Causal masks are aligned at the end: a query sees its own number of keys plus those that come before all queries.
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = lengths.long().cumsum(0) - lengths
    row = torch.arange(len(owner)) - starts[owner]
    keys = lengths_k.long()[owner]
    seen = row + 1 + keys - lengths[owner] if causal else keys
    if prefix is not None:
        seen = seen.maximum(prefix.long().cpu()[owner])
    seen = seen.clamp(min=0).minimum(keys)
    if token_type is None or token_type_k is None or sees is None:
        return int(seen.sum())
    # Of each type, how many keys come before every key; a query sees a stretch of keys from the start of its segment's.
    before = F.pad(F.one_hot(token_type_k.long().cpu(), len(sees)).cumsum(0), (0, 0, 1, 0))
    first = (lengths_k.long().cumsum(0) - lengths_k)[owner]
    return int(((before[first + seen] - before[first]) * sees.cpu()[token_type.long().cpu()]).sum())


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, lengths: Tensor | None, lengths_k: Tensor | None,
               key_size: Any, key_bias: Any, prefix: Tensor | None, causal: bool, scale: float, with_mass: bool, impl: str,
               max_q: int | None = None, max_k: int | None = None, token_type: Tensor | None = None, token_type_k: Tensor | None = None,
               sees: Tensor | None = None, **options: Any) -> int:
    lengths = cu_q.diff().cpu() if lengths is None else lengths
    lengths_k = cu_k.diff().cpu() if lengths_k is None else lengths_k
    return 2 * q.shape[1] * (q.shape[2] + v.shape[2]) * visible_pairs(lengths, lengths_k, causal, prefix, token_type, token_type_k, sees)


def _embedding(pixels: Tensor, sizes: Any, keep: Any, weight: Tensor, *rest: Any, out_val: Any, **options: Any) -> int:
    return 2 * weight.numel() * len(out_val[0])


def _similarities(x: Tensor, y: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * len(x) * y.numel()


def _attended(x: Tensor, y: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * len(x) * (y.numel() + v.numel())


def _by_type(x: Tensor, types: Any, weight: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * len(x) * weight[0].numel()


# The formula of each operator with products, and which of its arguments are their operands.
_OURS: dict[str, tuple[Callable[..., int], tuple[int, ...]]] = {
    "packed_attention": (_attention, (0, 1, 2)), "patch_embed": (_embedding, (0, 3)), "maxsim": (_similarities, (0, 1)),
    "similarity_logsumexp": (_similarities, (0, 1)), "pairwise_sigmoid": (_similarities, (0, 1)),
    "similarity_attend": (_attended, (0, 1, 2)), "grouped_linear": (_by_type, (0, 2)),
}
_OPERANDS: dict[Any, tuple[int, ...]] = {}
for _name, (_formula, _operands) in _OURS.items():
    _packet = getattr(torch.ops.fastvlp, _name)
    # Raw arguments, since lengths are values; the counter's own formulas see shapes alone.
    register_flop_formula(_packet, get_raw=True)(_formula)
    _OPERANDS[_packet] = _operands


class FlopCount(TorchDispatchMode):
    """While entered, counts the products of forward passes by part; works under ``no_grad`` and on fake tensors, too.

    Attributes:
        forward: operations by the name of the innermost module that was called ("": of none).
        backward: what the gradients need: as much as the product itself for each of its two operands that hangs on a parameter that
            trains. A frozen tower under a loss needs none, frozen layers above a trained one need half.
        tokens: rows of what came into each module, over all calls.

    Args:
        system: whose modules are named; None: all counts stand under "".
    """

    def __init__(self, system: nn.Module | None = None) -> None:
        super().__init__()
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.inside = [""]
        self._system = system
        self._hooks: list[Any] = []
        # Weak keys, so that counting does not keep the activations of a whole pass alive.
        self._learns = WeakTensorKeyDictionary()

    @property
    def needed(self) -> float:
        """Operations of forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def __enter__(self) -> FlopCount:
        for name, module in self._system.named_modules() if self._system is not None else ():
            if name:
                self._hooks.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._leave))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.inside.append(name)
        for value in (*args, *keywords.values()):
            if isinstance(value, Packed | Tensor):
                rows = value.total if isinstance(value, Packed) else value.numel() // value.shape[-1] if value.ndim > 1 else len(value)
                self.tokens[name] += rows
                return

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        formula = flop_registry.get(packet)
        # Under ``no_grad`` composite operators arrive whole, and the products inside them would not be seen.
        if formula is None and _is_composite(func):
            with _Again(self):
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            operands = args if packet not in _OPERANDS else [args[place] for place in _OPERANDS[packet]]
            flops = formula(*args, **kwargs, out_val=out)
            # A product's backward is a product for each operand that needs a gradient.
            learning = sum(1 for one in operands if isinstance(one, Tensor) and one.ndim > 1 and self._hangs(one))
            self.forward[self.inside[-1]] += flops
            self.backward[self.inside[-1]] += flops * min(2, learning)
        # Followed by hand, since under ``no_grad`` results carry no requires_grad.
        if packet is not torch.ops.aten.detach and any(self._hangs(one) for one in _tensors((*args, *kwargs.values()))):
            for one in _tensors(out if isinstance(out, list | tuple) else (out,)):
                self._learns[one] = True
        return out

    def _hangs(self, one: Tensor) -> bool:
        """Whether a parameter that trains has a part in it; autograd itself says nothing under ``no_grad``."""
        return one.requires_grad or one in self._learns


class _Again(TorchDispatchMode):
    """A count once more, for what an operator is made of; the hooks are there already."""

    def __init__(self, count: FlopCount) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.count.__torch_dispatch__(func, types, args, kwargs)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others, which autograd would have called instead of it."""
    return func.namespace == "aten" and bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
