"""Matrix products of bfloat16 operands on CPUs, with results in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

WORTH = 1 << 21  # multiplications of a product, below which preparing the operands takes longer than float32 (16 to 30 us)


def _setting() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)


def _supported() -> bool:
    """Whether this CPU multiplies bfloat16 and this torch (2.9 or later) says so for float32 tensors."""
    # A torch built without oneDNN lacks the operator that is asked.
    if not (torch.backends.mkldnn.is_available() and hasattr(_setting(), "fp32_precision")):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


FAST = _supported()


def pays(device: torch.device, dtype: torch.dtype, multiplications: int) -> bool:
    """Whether products of operands in ``dtype``, of so many multiplications each, are faster as bfloat16."""
    return FAST and dtype == torch.bfloat16 and device.type == "cpu" and multiplications >= WORTH


@contextlib.contextmanager
def bf16_products(wanted: bool) -> Iterator[None]:
    """Inside, products of float32 tensors on the CPU round their operands to bfloat16, if ``wanted``.

    Operands that hold bfloat16 numbers lose nothing; results stay float32, which products of bfloat16 tensors would round. The setting is
    one of the process, restored at the end; another thread's float32 products meanwhile follow it.
    """
    if not wanted:
        yield
        return
    setting = _setting()
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
