"""The highest scores of each segment on NVIDIA GPUs in one launch of ``select.cu``, which CuPy compiles at the first call."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_THREADS, MOST_THREADS = 128, 1024
KERNELS = {torch.float32: "select_float32", torch.float16: "select_float16", torch.bfloat16: "select_bfloat16"}


class _CurrentStream:
    """PyTorch's current stream in the CUDA stream protocol, which its own class has only since 2.10."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@functools.cache
def why_not() -> str:
    """Why CuPy cannot compile here; an empty string when it can."""
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        first = str(error.__cause__ or error).strip().partition("\n")[0]  # CuPy wraps what failed in a page of advice
        return f"CuPy does not load or finds no NVRTC ({first}): pip install 'cupy-cuda12x[ctk]'"
    return ""


@functools.cache
def _kernel(name: str) -> Any:
    """CuPy keeps what it compiles for each device."""
    if reason := why_not():
        raise RuntimeError(f"token_select: impl='cuda' cannot run here: {reason}")
    import cupy

    source = Path(__file__).with_name("select.cu").read_text(encoding="utf-8")
    return cupy.RawModule(code=source, options=("-std=c++17",)).get_function(name)


def launch(name: str, blocks: int, threads: int, *args: int | float) -> None:
    """On the current device and stream. An int is passed as int64 (or as a pointer), a float as float64."""
    kernel = _kernel(name)
    import cupy

    with cupy.cuda.Stream.from_external(_CurrentStream()):
        kernel((blocks,), (threads,), args)


def select(
    scores: Tensor, cu_seqlens: Tensor, longest: int, keep: float, share: bool, each: Tensor | None, protected: int, total: int
) -> tuple[Tensor, Tensor]:
    """index int64 [total] and the new cu_seqlens. longest: the longest segment, or about that."""
    S = cu_seqlens.shape[0] - 1
    index = torch.empty(total, dtype=torch.int64, device=scores.device)
    starts = torch.empty(S + 1, dtype=torch.int32, device=scores.device)
    if S == 0:
        return index, starts.zero_()
    scores, cu_seqlens = scores.contiguous(), cu_seqlens.contiguous()
    if each is not None:
        share = each.is_floating_point()
        each = each.to(scores.device, torch.float64 if share else torch.int64).contiguous()
    # Whole warps, a thread per token as far as they go.
    threads = min(MOST_THREADS, max(LEAST_THREADS, -(-longest // 32) * 32))
    with torch.cuda.device_of(scores):
        launch(
            KERNELS[scores.dtype], S, threads, scores.data_ptr(), cu_seqlens.data_ptr(), int(cu_seqlens.dtype == torch.int64),
            0 if each is None else each.data_ptr(), keep, int(share), protected, total, index.data_ptr(), starts.data_ptr(),
        )  # fmt: skip
    return index, starts
