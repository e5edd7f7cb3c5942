"""``packed_attention``: attention inside each segment of a packed batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvlp_kernels import _check, _op
from fastvlp_kernels._inputs import product_dtype, sum_dtype
from fastvlp_kernels._ragged import check_lengths, check_longest, read_lengths, segment_starts

from . import backends, cpu, dropout, reference
from .types import bits, check_types

NAME = "packed_attention"
IMPLEMENTATIONS = ("triton", "cpu", "reference", *backends.NAMES)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, lengths: Tensor | None, lengths_k: Tensor | None,
    key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool, impl: str,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, token_type: Tensor | None = None, token_type_k: Tensor | None = None,
    sees: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    known = _known(cu_seqlens_q, lengths, lengths_k)
    seen, kind = bits(NAME, token_type, token_type_k, sees)
    if known or impl == "cpu":
        host = _lengths(q, k, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, max_seqlen_q, max_seqlen_k)
        if impl == "cpu":
            return cpu.forward(q, k, v, *host, key_size, key_bias, prefix_len, causal, scale, with_mass, seen, kind)
    starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    terms = (key_size, key_bias, prefix_len, causal, scale, with_mass)
    return _op.module(__package__, impl).forward(q, k, v, *starts, *terms, known, seen, kind)


_packed_attention = _op.custom_op(NAME)(_forward)


@_packed_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, key_size, key_bias, prefix_len, causal, scale, with_mass, impl,
      max_seqlen_q=None, max_seqlen_k=None, token_type=None, token_type_k=None, sees=None):  # fmt: skip
    lse = q.new_empty(q.shape[0] * q.shape[1], dtype=sum_dtype(q.dtype))
    mass = q.new_empty(k.shape[0] if with_mass else 0, dtype=torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), lse, mass


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    lengths: Tensor | None, lengths_k: Tensor | None, key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None,
    causal: bool, scale: float, needs: list[bool], impl: str, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    token_type: Tensor | None = None, token_type_k: Tensor | None = None, sees: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen, kind = bits(NAME, token_type, token_type_k, sees)
    if impl == "cpu":
        host = _host(cu_seqlens_q, cu_seqlens_k, lengths, lengths_k)
        return cpu.backward(grad, q, k, v, out, lse, *host, key_size, key_bias, prefix_len, causal, scale, needs, seen, kind)
    saved = (q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_size, key_bias, prefix_len)
    known = _known(cu_seqlens_q, lengths, lengths_k)
    return _op.module(__package__, "triton_backward").backward(grad, *saved, causal, scale, needs, known, seen, kind)


_packed_attention_backward = _op.custom_op(f"{NAME}_backward")(_gradients)


@_packed_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, key_size, key_bias, prefix_len, causal, scale, needs, impl,
      max_seqlen_q=None, max_seqlen_k=None, token_type=None, token_type_k=None, sees=None):  # fmt: skip
    inputs = (q, k, v, lse if key_bias is None else key_bias)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True))


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, lengths, lengths_k, key_size, key_bias, prefix_len, ctx.causal, ctx.scale, _, ctx.impl, *longest = inputs
    *ctx.longest, token_type, token_type_k, sees = longest
    terms = (key_size, key_bias, prefix_len, token_type, token_type_k, sees)
    ctx.save_for_backward(q, k, v, *output[:2], cu_q, cu_k, lengths, lengths_k, *terms)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 8)]
    # Where nobody traces, the function itself: dispatch would cost more than the attention of a few short segments.
    direct = _op.untraced(grad) and not torch.is_grad_enabled()
    run: Callable[..., tuple[Tensor, ...]] = _gradients if direct else torch.ops.fastvlp.packed_attention_backward
    saved = ctx.saved_tensors  # which a checkpointed block gives once
    grads = run(grad, *saved[:-3], ctx.causal, ctx.scale, needs, ctx.impl, *ctx.longest, *saved[-3:])
    dq, dk, dv, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dq, dk, dv, *[None] * 5, dbias, *[None] * 10


class _Direct(torch.autograd.Function):
    """The operator without the Python of ``custom_op``, which takes longer than the attention of a few short segments on a CPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


_op.differentiate(NAME, _packed_attention, _packed_attention_backward, _setup, _backward)


def _known(cu_q: Tensor, lengths: Tensor | None, lengths_k: Tensor | None) -> bool:
    """Whether the host can tell the lengths without asking a device."""
    return cu_q.device.type == "cpu" or (lengths is not None and lengths_k is not None)


def _host(cu_q: Tensor, cu_k: Tensor, lengths: Tensor | None, lengths_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lengths on the CPU, read from the device where the caller did not give them."""
    host = read_lengths(NAME, "cu_seqlens_q", cu_q, "lengths", lengths)
    # Self attention asks the device once.
    if cu_k is cu_q and (lengths_k is None or lengths_k is lengths):
        return host, host
    return host, read_lengths(NAME, "cu_seqlens_k", cu_k, "lengths_k", lengths_k)


def _lengths(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, lengths: Tensor | None, lengths_k: Tensor | None, max_q: int | None,
    max_k: int | None,
) -> tuple[Tensor, Tensor]:
    """``_host``, refused where they do not sum to the rows of q and k, or are longer than the longest."""
    host = _host(cu_q, cu_k, lengths, lengths_k)
    queries, keys = (int(counts.sum()) for counts in host)
    if (queries, keys) != (q.shape[0], k.shape[0]):
        rows = f"q has {q.shape[0]} rows and k has {k.shape[0]}"
        raise ValueError(f"{NAME}: the segments hold {queries} queries and {keys} keys, but {rows}")
    check_longest(NAME, "max_seqlen_q", max_q, host[0])
    check_longest(NAME, "max_seqlen_k", max_k, host[1])
    return host


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    key_size: Tensor | None = None,
    key_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    causal: bool = False,
    token_type: Tensor | None = None,
    token_type_k: Tensor | None = None,
    sees: Tensor | None = None,
    scale: float | None = None,
    return_key_mass: bool = False,
    dropout_p: float = 0.0,
    lengths: Tensor | None = None,
    lengths_k: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each segment's queries to the same segment's keys.

    out_i = sum_j w_ij v_j / sum_j w_ij with w_ij = key_size_j * exp(scale * <q_i, k_j> + key_bias_j), j over the keys that i sees.
    float32, bfloat16, float16 or float64; statistics in float32 (float64 for float64). Under autocast q, k and v become its dtype.
    The operands may be views, as of one fused projection [T, 3, H, d]. Fastest where segments of equal lengths lie together.

    Args:
        q: [Tq, H, d]. k: [Tk, Hkv, d]. v: [Tk, Hkv, e]. Hkv divides H: query head h reads key head h // (H / Hkv).
        cu_seqlens_q: int32 or int64 [S+1], where each segment starts in q. cu_seqlens_k: the same in k and v; None: that of q.
        max_seqlen_q, max_seqlen_k: the longest segments (``Packed.max_seqlen``). On GPUs they let short segments run in one pass; None:
            nothing is known of them. max_seqlen_k None with cu_seqlens_k None: that of q. A segment that is longer is refused where the
            host knows the lengths, and elsewhere gets NaN, or its right values.
        key_size: [Tk], how many tokens a key stands for (proportional attention, ToMe); has no gradient. 0 hides a key;
            below 0, which nobody checks, is no size.
        key_bias: [Tk] or [H, Tk], has a gradient. -inf hides a key.
        prefix_len: integers [S]; with ``causal`` the first prefix_len[s] keys of segment s are visible to all its queries (prefix-LM).
        causal: query i of n sees key j of m only if j <= i + m - n: the last query sees everything.
        token_type: integers [Tq] from 0 to 31, what kind of token a query is; token_type_k: [Tk] of the keys, None: token_type, where
            cu_seqlens_k is None. sees: bool [types, types], whether a query of the type of the row sees keys of the type of the column,
            of those that ``causal`` and ``prefix_len`` let it see (FLAME's facets, patches and words). All of them or none. On a CUDA
            device a type that ``sees`` does not have is PyTorch's device-side assertion.
        scale: None means 1 / sqrt(d).
        dropout_p: the chance that an attention weight is dropped, from 0 to below 1 (the caller knows whether it trains). Segments are
            then padded and attended by PyTorch's own kernels, whatever ``FASTVLP_IMPL`` says; only impl=None, and no mass.
        return_key_mass: also return the mass of each key, its probabilities summed over queries and heads: float32 [Tk], no gradient.
        lengths, lengths_k: integers [S] on the CPU, what cu_seqlens_q and cu_seqlens_k say (``Packed.lengths``). Without them impl
            "cpu", "reference" and "xformers" read them from cu_seqlens, which on a CUDA device costs a synchronisation. "triton" never
            asks: it cuts segments at Tq and Tk, and gives 0 to rows behind the last one.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device (float64: never Triton), and on CUDA devices
            flash-attn, where that is installed, for segments of 1,024 tokens and more that it can compute (``backends.preferred``).
            "flash-attn" and "xformers" are others' kernels; what one of them cannot compute it refuses by name. The environment
            variable FASTVLP_IMPL names one too.

    Returns:
        out: [Tq, H, e] in the dtype of q, 0 for a query that sees no key; with ``return_key_mass`` (out, mass).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or the bias is one for pairs of query and key.
        RuntimeError: ``impl`` cannot run here, or cannot compute this; a second or a forward-mode derivative is asked for.
    """
    given = (cu_seqlens_q, cu_seqlens_k, key_size, key_bias, prefix_len, lengths, lengths_k)
    cu_seqlens_q, cu_seqlens_k = _check_inputs(q, k, v, *given)
    token_type_k = check_types(NAME, q, k, token_type, token_type_k, sees, cu_seqlens_k is None)
    prefix_len = None if prefix_len is None else prefix_len.contiguous()
    max_seqlen_q, max_seqlen_k = _longest("max_seqlen_q", max_seqlen_q), _longest("max_seqlen_k", max_seqlen_k)
    dtype = product_dtype(NAME, q, None)
    # Here and not in the operator, so that autograd brings gradients back to the dtypes that came.
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if cu_seqlens_k is None:
        cu_seqlens_k, lengths_k = cu_seqlens_q, lengths
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    # Dropout is no kernel's: plain PyTorch over segments of known lengths.
    if dropout_p:
        if not 0 < dropout_p < 1 or impl is not None or return_key_mass:
            got = f"dropout_p={dropout_p}, impl={impl!r}, return_key_mass={return_key_mass}"
            raise ValueError(f"packed_attention: got {got}; dropout is from 0 to below 1, with impl=None and without the mass")
        host_q, host_k = (read_lengths("packed_attention", *given) for given in (
            ("cu_seqlens_q", cu_seqlens_q, "lengths", lengths), ("cu_seqlens_k", cu_seqlens_k, "lengths_k", lengths_k)
        ))  # fmt: skip
        seen, kind = bits(NAME, token_type, token_type_k, sees)
        return dropout.packed_attention(q, k, v, host_q, host_k, key_size, key_bias, prefix_len, causal, scale, dropout_p, seen, kind)
    lengths_and_longest = (lengths, lengths_k, max_seqlen_q, max_seqlen_k)
    order = backends.preferred(q, k, v, *lengths_and_longest, key_size, key_bias, prefix_len, causal, return_key_mass, sees)
    chosen = _op.choose(NAME, impl, q.device, order, (q.dtype,), (q, k, v, key_bias))
    if chosen in backends.NAMES:
        return backends.packed_attention(
            chosen, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            lambda: _host(cu_seqlens_q, cu_seqlens_k, lengths, lengths_k), key_size, key_bias, prefix_len, causal, scale, return_key_mass,
            sees,
        )  # fmt: skip
    if chosen == "reference":
        host = _lengths(q, k, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, max_seqlen_q, max_seqlen_k)
        seen, kind = bits(NAME, token_type, token_type_k, sees)
        out, mass = reference.packed_attention(q, k, v, *host, key_size, key_bias, prefix_len, causal, scale, seen, kind)
    else:
        run = _Direct.apply if chosen == "cpu" and _op.untraced(q) else torch.ops.fastvlp.packed_attention
        out, _, mass = run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, key_size, key_bias, prefix_len, causal, scale, return_key_mass,
            chosen, max_seqlen_q, max_seqlen_k, token_type, token_type_k, sees,
        )  # fmt: skip
    return (out, mass) if return_key_mass else out


def _longest(name: str, longest: int | Tensor | None) -> int | None:
    """flash-attn's callers hand over tensors too; under a compiler a tensor says nothing."""
    if isinstance(longest, Tensor):
        longest = None if torch.compiler.is_compiling() else int(longest)
    check_longest(NAME, name, longest)
    return longest


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, lengths: Tensor | None, lengths_k: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The starts of segments as kernels read them."""
    op = NAME
    _check.plain_tensors(
        op, 4, q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_size=key_size, key_bias=key_bias, prefix_len=prefix_len
    )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(f"{op}: got {shapes}; each must be [tokens, heads, width] (flatten [B, N, H, d] with Packed.from_padded)")
    if q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2] or q.shape[2] == 0:
        raise ValueError(f"{op}: got {shapes}; q and k must share their width (at least 1), k and v their tokens and heads")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: {q.shape[1]} query heads and {k.shape[1]} key heads; the key heads must divide the query heads")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"{op}: q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    if any(x.dtype not in _check.FLOATS for x in (q, k, v)):
        raise TypeError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; allowed: float32, bfloat16, float16, float64")
    cu_q = segment_starts(op, "cu_seqlens_q", cu_q)
    cu_k = None if cu_k is None else segment_starts(op, "cu_seqlens_k", cu_k)
    segments = cu_q.shape[0] - 1
    if cu_k is not None and cu_k.shape != cu_q.shape:
        raise ValueError(f"{op}: cu_seqlens_q describes {segments} segments and cu_seqlens_k {cu_k.shape[0] - 1}; every segment needs both")
    if cu_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: got {shapes}; other keys than queries (cross attention) need cu_seqlens_k")
    if segments == 0 and (q.shape[0] or k.shape[0]):
        raise ValueError(f"{op}: the segments hold 0 queries and 0 keys, but q has {q.shape[0]} rows and k has {k.shape[0]}")
    _check.vector(op, "prefix_len", prefix_len, segments, integer=True)
    for name, counts in (("lengths", lengths), ("lengths_k", lengths_k)):
        check_lengths(op, name, counts, segments)
    if key_size is not None:
        if key_size.shape != (k.shape[0],):
            raise ValueError(f"{op}: key_size has shape {tuple(key_size.shape)}; it must have shape ({k.shape[0]},)")
        if key_size.requires_grad:
            raise ValueError(f"{op}: key_size has no gradient here; pass key_bias=key_size.log(), or key_size.detach()")
    if key_bias is not None and key_bias.shape not in ((k.shape[0],), (q.shape[1], k.shape[0])):
        raise ValueError(
            f"{op}: key_bias is {tuple(key_bias.shape)}; it must be [Tk] = ({k.shape[0]},) or [H, Tk] = ({q.shape[1]}, {k.shape[0]}). "
            "Biases for pairs of query and key, and free masks, are refused: use torch.nn.attention.flex_attention"
        )
    if key_bias is not None and not key_bias.is_floating_point():
        raise TypeError(f"{op}: key_bias is {key_bias.dtype}; it must be floating point (a mask: 0 and -inf)")
    return cu_q, cu_k
