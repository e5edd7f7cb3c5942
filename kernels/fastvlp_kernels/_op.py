"""What all operators do at their public door and at registration: who computes, and which derivatives are refused by name."""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from . import _backend

COMPILED = ("triton", "cuda")  # implementations that compute no float64


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """``torch.library.custom_op`` for ``fastvlp::name``, whose body runs without autocast.

    Dtypes are decided at the public door. Autocast would round sums, in a backward too that runs inside its region.
    """

    def register(body: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(body)
        def without_autocast(*args: Any, **kwargs: Any) -> Any:
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
            if not torch.is_autocast_enabled(device):
                return body(*args, **kwargs)
            # The caller has chosen the dtype of each product; autocast would round accumulators and statistics as well.
            with torch.autocast(device, enabled=False):
                return body(*args, **kwargs)

        return torch.library.custom_op(f"fastvlp::{name}", without_autocast, mutates_args=())

    return register


def differentiate(
    name: str, forward: CustomOpDef, backward: CustomOpDef, setup: Callable[..., None], gradients: Callable[..., Any]
) -> None:
    """``gradients``, which calls the operator ``backward``, differentiates ``forward``; second derivatives are refused by ``name``."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{name}: second derivatives are not available; use impl='reference' for them")

    # PyTorch would refuse second derivatives too, but without saying what to do instead.
    forward.register_autograd(gradients, setup_context=setup)
    backward.register_autograd(refuse)


def has_tangent(*inputs: Tensor | None) -> bool:
    """Whether forward mode differentiates with respect to one of ``inputs``."""
    # Outside of forward mode, which is nearly always, one comparison is all that this costs.
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def refuse_forward_mode(name: str, *inputs: Tensor | None) -> None:
    """Custom operators have no forward-mode derivative, and PyTorch takes it for zero without a word.

    Raises:
        RuntimeError: one of ``inputs`` has a tangent.
    """
    if has_tangent(*inputs):
        raise RuntimeError(
            f"{name}: forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are not available; use impl='reference' "
            "for them, or reverse mode"
        )


def untraced(x: Tensor) -> bool:
    """Whether nothing on the CPU needs what ``custom_op`` does, whose Python takes longer than the arithmetic of a small batch."""
    if torch.compiler.is_compiling():  # which could not trace the rest
        return False
    # Modes count operators and decide which results a checkpointed block keeps: they have to see this one.
    seen = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    return type(x) is Tensor and x.device.type == "cpu" and not (seen or torch.is_autocast_enabled("cpu"))


def choose(
    name: str, impl: str | None, device: torch.device, implementations: Sequence[str], dtypes: Sequence[torch.dtype],
    inputs: Sequence[Tensor | None] = (), unable: str = "",
) -> str:  # fmt: skip
    """The implementation that computes the operator ``name``: ``_backend.choose``, but "cpu" where a kernel cannot compute these inputs.

    Args:
        dtypes: of what is computed; kernels have no float64.
        inputs: what the result is differentiable in.
        unable: what else keeps kernels from computing these inputs, as it follows "impl='triton'" in a sentence.

    Raises:
        ValueError, RuntimeError: as ``_backend.choose``; ``impl`` names a kernel that is unable; forward mode without impl="reference".
    """
    chosen = _backend.choose(name, impl, device, implementations)
    if chosen in COMPILED:
        if torch.float64 in dtypes:
            unable = "computes in float32, bfloat16 or float16, not in float64"
        # Refused only where the kernel was asked for by argument; FASTVLP_IMPL is a wish for all operators, not all of which can.
        if unable and impl == chosen:
            raise RuntimeError(f"{name}: impl={impl!r} {unable}; use impl='cpu'")
        chosen = "cpu" if unable else chosen
    if chosen == "cpu" or chosen in COMPILED:
        refuse_forward_mode(name, *inputs)
    return chosen


def module(package: str, impl: str) -> ModuleType:
    """The module of ``package`` that computes by ``impl``; Triton is imported no earlier than it is used."""
    return importlib.import_module(f"{package}.{impl}")
