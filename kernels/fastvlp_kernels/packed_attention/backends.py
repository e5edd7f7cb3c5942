"""Packed attention by kernels of others: the same result as ours, or a refusal that names what they cannot do; and when they are taken."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("flash-attn", "xformers")
LONG = 1024  # tokens of a segment from which flash-attn's asynchronous pipelines are expected to beat the loop of our Triton kernel
WIDEST = 128  # features of a head; wider ones leave flash-attn small tiles
Lengths = Callable[[], tuple[Tensor, Tensor]]


def packed_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int | None, max_k: int | None, lengths: Lengths,
    key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool,
    sees: Tensor | None = None,
) -> Tensor:
    """out [Tq, H, e] by the backend ``name``; ``lengths()`` gives those of queries and keys on the CPU.

    Raises:
        RuntimeError: the backend cannot compute this.
    """
    reason = unable(name, q, v, key_size, key_bias, prefix_len, causal, with_mass, sees)
    if reason:
        _refuse(name, reason)
    if name == "xformers":
        return _xformers(q, k, v, *lengths(), causal, scale)
    longest = (q.shape[0] if max_q is None else max_q, k.shape[0] if max_k is None else max_k)
    return _flash(q, k, v, cu_q.int(), cu_k.int(), *longest, causal, scale)


def unable(
    name: str, q: Tensor, v: Tensor, key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool,
    with_mass: bool, sees: Tensor | None = None,
) -> str:  # fmt: skip
    """What the backend ``name`` cannot do of what is asked for; an empty string when it can do everything."""
    if with_mass:
        return "does not return the mass of keys (return_key_mass)"
    given = {"key_size": key_size is not None, "key_bias": key_bias is not None, "prefix_len": causal and prefix_len is not None}
    given["token_type"] = sees is not None
    for option, used in given.items():
        if used:
            return f"takes no {option}"
    if q.dtype not in (torch.float16, torch.bfloat16) and not (name == "xformers" and q.dtype == torch.float32):
        return f"does not compute in {q.dtype}; cast q, k and v to bfloat16 or float16"
    if q.shape[2] > 256:
        return f"takes heads of at most 256 features, not {q.shape[2]}"
    if name == "flash-attn" and q.shape[2] != v.shape[2]:
        return f"needs values as wide as keys, and they have {v.shape[2]} and {q.shape[2]} features"
    return ""


def preferred(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, max_q: int | None, max_k: int | None,
    key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, with_mass: bool, sees: Tensor | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """All implementations, the first of which that runs here is taken: "triton" before "cpu", but "flash-attn" before both where

    * every segment has LONG queries and LONG keys or more, as ``lengths`` say, and the longest are known: a short segment leaves most
      of its tiles of 128 rows empty, while the Triton kernels have one pass over whole segments, several of them in a program;
    * heads are at most WIDEST features wide, in bfloat16 or float16, and there are no sizes, biases, prefixes or types, and no mass;
    * gradients need not be deterministic (its dQ is summed by atomics), and no compiler traces.

    xformers is never first: it needs the lengths on the host, and repeats heads. All of this is reasoned from how the kernels work, and
    unmeasured: none has run on a GPU here.
    """
    ours = ("triton", "cpu", "reference")
    # flash-attn's backward adds with atomics, and a compiler cannot look into it.
    free = not (torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled())
    if free and _long(q, lengths_q, max_q) and _long(k, lengths_k, max_k) and q.shape[2] <= WIDEST:
        if not unable("flash-attn", q, v, key_size, key_bias, prefix_len, causal, with_mass, sees):
            return ("flash-attn", *ours, *NAMES[1:])
    return (*ours, *NAMES)


def _long(x: Tensor, lengths: Tensor | None, longest: int | None) -> bool:
    if lengths is None or longest is None or not 0 < LONG * len(lengths) <= x.shape[0]:
        return False
    # And none longer than the caller says, which their kernels trust where ours checks.
    return int(lengths.min()) >= LONG and int(lengths.max()) <= longest


def _refuse(name: str, what: str) -> None:
    raise RuntimeError(f"packed_attention: impl={name!r} {what}; use impl=None")


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float) -> Tensor:
    """FlashAttention 2, or 4 where only that is installed: by the same keywords, but 4 returns (out, lse)."""
    attend = getattr(importlib.import_module("flash_attn"), "flash_attn_varlen_func", None)
    if attend is None:
        attend = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    found = attend(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, softmax_scale=scale, causal=causal
    )
    return found[0] if isinstance(found, tuple) else found


def _xformers(q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor, lengths_k: Tensor, causal: bool, scale: float) -> Tensor:
    # With more queries than keys, some see none, for which their mask has no meaning.
    if causal and bool((lengths_q > lengths_k).any()):
        _refuse("xformers", "needs, where causal, no more queries than keys in every segment")
    ops, masks = importlib.import_module("xformers.ops"), importlib.import_module("xformers.ops.fmha.attn_bias")
    bias = masks.BlockDiagonalMask.from_seqlens(lengths_q.tolist(), lengths_k.tolist(), device=q.device)
    if causal:
        bias = bias.make_causal_from_bottomright()
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]
