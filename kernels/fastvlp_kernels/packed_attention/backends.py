"""Packed attention by kernels of others: the same result as ours, or a refusal that names what they cannot do; and when they are taken."""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("flash-attn", "xformers", "varlen", "flex", "sdpa")
LONG = 1024  # tokens of a segment from which flash-attn's asynchronous pipelines are expected to beat the loop of our Triton kernel
WIDEST = 128  # features of a head; wider ones leave flash-attn small tiles
Lengths = Callable[[], tuple[Tensor, Tensor]]


def packed_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int | None, max_k: int | None, lengths: Lengths,
    key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool,
) -> Tensor:
    """out [Tq, H, e] by the backend ``name``; ``lengths()`` gives those of queries and keys on the CPU.

    Raises:
        RuntimeError: the backend cannot compute this.
    """
    reason = unable(name, q, v, key_size, key_bias, prefix_len, causal, with_mass)
    if reason:
        _refuse(name, reason)
    if name == "flex":
        return _flex(q, k, v, cu_q, cu_k, key_size, key_bias, prefix_len, causal, scale)
    if name == "sdpa":
        return _sdpa(q, k, v, *lengths(), key_size, key_bias, prefix_len, causal, scale)
    if name == "xformers":
        return _xformers(q, k, v, *lengths(), causal, scale)
    longest = (q.shape[0] if max_q is None else max_q, k.shape[0] if max_k is None else max_k)
    starts = (cu_q.int(), cu_k.int())
    if name == "varlen":
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        window, grouped = (-1, 0) if causal else (-1, -1), q.shape[1] != k.shape[1]
        return attend(q, k, v, *starts, *longest, scale=scale, window_size=window, **({"enable_gqa": True} if grouped else {}))
    return _flash(q, k, v, *starts, *longest, causal, scale)


def unable(
    name: str, q: Tensor, v: Tensor, key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool,
    with_mass: bool,
) -> str:  # fmt: skip
    """What the backend ``name`` cannot do of what is asked for; an empty string when it can do everything."""
    if with_mass:
        return "does not return the mass of keys (return_key_mass)"
    if name in ("flex", "sdpa"):
        return ""
    given = {"key_size": key_size is not None, "key_bias": key_bias is not None, "prefix_len": causal and prefix_len is not None}
    for option, used in given.items():
        if used:
            return f"takes no {option}"
    if q.dtype not in (torch.float16, torch.bfloat16) and not (name == "xformers" and q.dtype == torch.float32):
        return f"does not compute in {q.dtype}; cast q, k and v to bfloat16 or float16"
    if q.shape[2] > 256:
        return f"takes heads of at most 256 features, not {q.shape[2]}"
    if name in ("flash-attn", "varlen") and q.shape[2] != v.shape[2]:
        return f"needs values as wide as keys, and they have {v.shape[2]} and {q.shape[2]} features"
    return ""


def preferred(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, max_q: int | None, max_k: int | None,
    key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, with_mass: bool,
) -> tuple[str, ...]:  # fmt: skip
    """All implementations, the first of which that runs here is taken: "triton" before "cpu", but "flash-attn" before both where

    * every segment has LONG queries and LONG keys or more, as ``lengths`` say, and the longest are known: a short segment leaves most
      of its tiles of 128 rows empty, while the Triton kernels have one pass over whole segments, several of them in a program;
    * heads are at most WIDEST features wide, in bfloat16 or float16, and there are no sizes, biases or prefixes, and no mass;
    * gradients need not be deterministic (its dQ is summed by atomics), and no compiler traces.

    The others are never first: xformers and sdpa need the lengths on the host, and repeat heads or pad; flex makes its mask in every
    call; varlen is flash-attn's kernel behind arguments that have changed between versions of PyTorch. All of this is reasoned from how
    the kernels work, and unmeasured: none has run on a GPU here.
    """
    ours = ("triton", "cpu", "reference")
    free = not (torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled())
    if free and _long(q, lengths_q, max_q) and _long(k, lengths_k, max_k) and q.shape[2] <= WIDEST:
        if not unable("flash-attn", q, v, key_size, key_bias, prefix_len, causal, with_mass):
            return ("flash-attn", *ours, *NAMES[1:])
    return (*ours, *NAMES)


def _long(x: Tensor, lengths: Tensor | None, longest: int | None) -> bool:
    if lengths is None or longest is None or not 0 < LONG * len(lengths) <= x.shape[0]:
        return False
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


def _flex(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float,
) -> Tensor:
    """Compiled on CUDA devices; on CPUs eager, where PyTorch gives it no backward."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, key_bias)):
        _refuse("flex", "has no backward on CPUs")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    place_q, place_k = (torch.arange(x.shape[0], device=q.device) for x in (q, k))
    owner_q = torch.searchsorted(cu_q[1:].long(), place_q, right=True)
    owner_k = torch.searchsorted(cu_k[1:].long(), place_k, right=True)
    place_k = place_k - cu_k.long()[owner_k]
    # Behind the last key that a query sees.
    limit = place_q - cu_q.long()[owner_q] + 1 + (cu_k.diff() - cu_q.diff()).long()[owner_q]
    if prefix_len is not None:
        limit = limit.maximum(prefix_len[owner_q])
    log_size = None if key_size is None else key_size.float().log()

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = owner_q[i] == owner_k[j]
        if causal:
            seen = seen & (place_k[j] < limit[i])
        return seen if key_size is None else seen & (key_size[j] > 0)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if log_size is not None:
            s = s + log_size[j]
        if key_bias is not None:
            s = s + (key_bias[j] if key_bias.ndim == 1 else key_bias[h, j])
        return s

    blocks = flex.create_block_mask(mask, None, None, q.shape[0], k.shape[0], device=q.device)
    attend = torch.compile(flex.flex_attention) if q.device.type == "cuda" else flex.flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    modify = None if key_size is None and key_bias is None else score
    out = attend(q, k, v, score_mod=modify, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float,
) -> Tensor:
    """PyTorch's attention over segments padded to the longest."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lengths_q, lengths_k = lengths_q.to(q.device), lengths_k.to(q.device)
    n, m = (torch.arange(int(x.max()), device=q.device) for x in (lengths_q, lengths_k))
    real_q, real_k = n < lengths_q[:, None], m < lengths_k[:, None]

    def pad(x: Tensor, real: Tensor) -> Tensor:
        return x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter(real.unflatten(1, (-1, *[1] * (x.ndim - 1))), x)

    seen = real_k[:, None, None]
    terms = None
    if key_size is not None:
        sizes = pad(key_size.float(), real_k)
        seen = seen & (sizes > 0)[:, None, None]
        terms = torch.where(sizes > 0, sizes, 1).log()[:, None, None]
    if key_bias is not None:
        biases = pad(torch.atleast_2d(key_bias).t(), real_k).transpose(1, 2)[:, :, None]
        seen = seen & ~biases.detach().isneginf()
        biases = torch.where(seen, biases, 0)
        terms = biases if terms is None else terms + biases
    if causal:
        limit = n + 1 + (lengths_k - lengths_q)[:, None]
        if prefix_len is not None:
            limit = limit.maximum(prefix_len[:, None])
        seen = seen & (m < limit[:, None, :, None])
    # A query that sees nothing attends to everything, and is set to 0 below.
    some = seen.any(3, keepdim=True)
    mask = seen | ~some
    if terms is not None:
        mask = torch.where(mask, terms.to(q.dtype), -torch.inf)
    q, k, v = (pad(x, real).transpose(1, 2) for x, real in ((q, real_q), (k, real_k), (v, real_k)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return torch.where(some, out, 0).transpose(1, 2)[real_q]
