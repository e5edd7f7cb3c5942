"""Self-attention over segments of different lengths, as captions and ragged images bring them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Case, Exact, InapplicableError, Mode, Problem, Provider, Shape, Task, always, needs, needs_compiler

CAPTION, PADDED_CAPTION = 8.5, 24  # tokens of a mini caption with its start and end, and what open_clip pads it to

FACETS = 4  # behind the first half of a text, which do not see one another (FLAME); types of tokens

Size = tuple[str, Sequence[int], int, bool]  # name, lengths, heads, causal; a name with "facets" has types


def _captions(count: int) -> list[int]:
    """Lengths from 3 to 24 whose mean is that of the shipped captions."""
    draw = random.Random(0)
    return [min(PADDED_CAPTION, 3 + int(draw.expovariate(1 / (CAPTION - 2.6)))) for _ in range(count)]


def _mixed(count: int, low: int, high: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(low, high) for _ in range(count)]


def shapes(device: str, quick: bool) -> list[Shape]:
    """Captions and images of the default recipe on CPUs, those of ViT-B/16 in TARGETS on GPUs."""
    if quick:
        sizes: list[Size] = [("16 captions", _captions(16), 2, True), ("8 x 5-20", _mixed(8, 5, 20), 2, False),
                             ("8 x 5-20 facets", _mixed(8, 5, 20), 2, True)]  # fmt: skip
        dtype = torch.float32
    elif device == "cuda":
        sizes = [
            ("256 x 50", [50] * 256, 12, False),
            ("256 x 197", [197] * 256, 12, False),
            ("256 x 16-256", _mixed(256, 16, 256), 12, False),
            ("256 x 64-256 facets", _mixed(256, 64, 256), 12, True),
        ]
        dtype = torch.bfloat16
    else:
        captions = _captions(256)
        sizes = [
            ("256 captions", captions, 3, True),
            ("256 captions, sorted", sorted(captions), 3, True),
            ("256 x 16", [16] * 256, 3, False),
            ("64 x 16-256", _mixed(64, 16, 256), 3, False),
            ("64 x 16-128 facets", _mixed(64, 16, 128), 3, True),
        ]
        dtype = torch.float32
    return [
        Shape(name, dtype, {"lengths": lengths, "heads": heads, "causal": causal, "typed": name.endswith("facets")})
        for name, lengths, heads, causal in sizes
    ]


def _facets(length: int) -> Tensor:
    """0 for the first half of a text, then 1 to FACETS."""
    place = torch.arange(length) - length // 2
    return torch.where(place < 0, 0, 1 + place * FACETS // max(1, length - length // 2))


def problem(shape: Shape, device: torch.device) -> Problem:
    """Normally distributed q, k, v [T, H, 64] and upstream gradient."""
    lengths = torch.tensor(shape.values["lengths"])
    size = (int(lengths.sum()), shape.values["heads"], 64)
    tensors = {name: torch.randn(size, device=device).to(shape.dtype) for name in ("q", "k", "v", "upstream")}
    starts = F.pad(lengths.cumsum(0), (1, 0))
    tensors["cu_seqlens"] = starts.to(device, torch.int32)
    if shape.values.get("typed"):
        sees = torch.eye(FACETS + 1, dtype=torch.bool)
        sees[:, 0] = True
        tensors["token_type"] = torch.cat([_facets(n) for n in lengths.tolist()]).to(device)
        tensors["sees"] = sees.to(device)
    padded = len(lengths) * int(lengths.max())
    return Problem(shape, device, tensors | {"lengths": lengths, "starts": starts}, {"token_ratio": padded / size[0]})


def _leaves(problem: Problem) -> dict[str, Tensor]:
    return {name: problem.inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}


def _types(problem: Problem) -> dict[str, Any]:
    """The keywords of ``packed_attention`` about types: none where tokens have none."""
    return {name: problem.inputs[name] for name in ("token_type", "sees") if name in problem.inputs}


def _visible(problem: Problem) -> list[Tensor] | None:
    """bool [n, n] of each segment: who sees whom where tokens have types."""
    if not (given := _types(problem)):
        return None
    parts = given["token_type"].split(problem.inputs["lengths"].tolist())
    return [given["sees"][part[:, None], part].tril() for part in parts]


def _untyped(problem: Problem) -> None:
    if _types(problem):
        raise InapplicableError("it knows no types of tokens")


def exact(problem: Problem) -> Exact:
    """Softmax attention of each segment alone, in float64."""
    masks = _visible(problem)
    q, k, v = (problem.inputs[name].double().requires_grad_() for name in ("q", "k", "v"))
    starts, outputs = problem.inputs["starts"].tolist(), []
    for segment, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        if problem.shape.values["causal"]:
            scores = scores.masked_fill(torch.ones(end - start, end - start, device=q.device).triu(1).bool(), -torch.inf)
        if masks is not None:
            scores = scores.masked_fill(~masks[segment], -torch.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[start:end]))
    value = torch.cat(outputs)
    gradients = torch.autograd.grad(value, (q, k, v), problem.inputs["upstream"].double())
    return Exact({"value": value.detach()} | dict(zip(("q", "k", "v"), gradients, strict=True)))


def _ours(impl: str) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        from fastvlp_kernels import packed_attention

        own, lengths = _leaves(problem), problem.inputs["lengths"]
        q, k, v = own.values()
        cu_seqlens, longest, causal = problem.inputs["cu_seqlens"], int(lengths.max()), problem.shape.values["causal"]

        def forward() -> Tensor:
            out = packed_attention(q, k, v, cu_seqlens, max_seqlen_q=longest, causal=causal, lengths=lengths, impl=impl, **_types(problem))
            assert isinstance(out, Tensor)
            return out

        return Task(forward, own, problem.inputs["upstream"])

    return build


def _padded(compiled: bool) -> Callable[[Problem], Task]:
    """Attention over [B, H, N, d] padded beforehand; the padding itself is not timed."""

    def build(problem: Problem) -> Task:
        lengths, causal = problem.inputs["lengths"].to(problem.device), problem.shape.values["causal"]
        mask = torch.arange(int(lengths.max()), device=problem.device) < lengths[:, None]

        def pad(x: Tensor) -> Tensor:
            out = x.new_zeros(*mask.shape, *x.shape[1:])
            out[mask] = x
            return out.transpose(1, 2).contiguous()

        # A causal query of a real token sees no padding, which lies behind it: no mask is needed.
        keys = None if causal or mask.all() else mask[:, None, None, :]
        if (masks := _visible(problem)) is not None:
            keys = torch.eye(mask.shape[1], dtype=torch.bool, device=problem.device).repeat(len(mask), 1, 1, 1)
            for own_keys, visible in zip(keys, masks, strict=True):
                own_keys[0, : len(visible), : len(visible)] = visible
        own = {name: pad(problem.inputs[name]).requires_grad_() for name in ("q", "k", "v")}
        q, k, v = own.values()
        attend = torch.compile(F.scaled_dot_product_attention, dynamic=False) if compiled else F.scaled_dot_product_attention

        def canonical(results: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.transpose(1, 2)[mask] for name, tensor in results.items()}

        causal = causal and keys is None
        return Task(lambda: attend(q, k, v, attn_mask=keys, is_causal=causal), own, pad(problem.inputs["upstream"]), canonical)

    return build


def _loop(problem: Problem) -> Task:
    """One call of scaled_dot_product_attention per segment."""
    own, lengths = _leaves(problem), problem.inputs["lengths"].tolist()
    masks: Sequence[Tensor | None] = _visible(problem) or [None] * len(lengths)
    causal = problem.shape.values["causal"] and masks[0] is None

    def forward() -> Tensor:
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in own.values()), masks, strict=True)
        return torch.cat([F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal) for q, k, v, mask in parts], 1).transpose(0, 1)

    return Task(forward, own, problem.inputs["upstream"])


def _flash(problem: Problem) -> Task:
    _untyped(problem)
    attend = getattr(importlib.import_module("flash_attn"), "flash_attn_varlen_func", None)
    if attend is None:
        attend = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    own, longest, cu = _leaves(problem), int(problem.inputs["lengths"].max()), problem.inputs["cu_seqlens"]
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    causal = problem.shape.values["causal"]

    def forward() -> Tensor:
        found = attend(*own.values(), **options, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return Task(forward, own, problem.inputs["upstream"])


def _varlen(problem: Problem) -> Task:
    _untyped(problem)
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    own, longest, cu = _leaves(problem), int(problem.inputs["lengths"].max()), problem.inputs["cu_seqlens"]
    window = (-1, 0) if problem.shape.values["causal"] else (-1, -1)
    return Task(lambda: attend(*own.values(), cu, cu, longest, longest, window_size=window), own, problem.inputs["upstream"])


def _flex(problem: Problem) -> Task:
    """Compiled FlexAttention; its block mask is made beforehand, as for all layers of a model, and not timed."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    own, causal, given = _leaves(problem), problem.shape.values["causal"], _types(problem)
    lengths = problem.inputs["lengths"].to(problem.device)
    owner = torch.arange(len(lengths), device=problem.device).repeat_interleave(lengths)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (owner[i] == owner[j]) & (j <= i) if causal else owner[i] == owner[j]
        return same & given["sees"][given["token_type"][i], given["token_type"][j]] if given else same

    mask = flex.create_block_mask(seen, None, None, len(owner), len(owner), device=problem.device)
    attend = torch.compile(flex.flex_attention)

    def forward() -> Tensor:
        return attend(*(x.transpose(0, 1)[None] for x in own.values()), block_mask=mask)[0].transpose(0, 1)

    return Task(forward, own, problem.inputs["upstream"])


def _needs_flex(device: torch.device) -> str:
    return "its backward needs a CUDA device" if device.type != "cuda" else needs("torch.nn.attention.flex_attention")(device)


def _xformers(problem: Problem) -> Task:
    _untyped(problem)
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    mask = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask
    own, bias = _leaves(problem), mask.from_seqlens(problem.inputs["lengths"].tolist())
    if problem.shape.values["causal"]:
        bias = bias.make_causal()
    return Task(lambda: attend(*(x[None] for x in own.values()), attn_bias=bias)[0], own, problem.inputs["upstream"])


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """2 products of n x n x d per head forward and 5 more backward (half of that where causal); q, k, v, out and their gradients once."""
    lengths, heads = problem.inputs["lengths"].double(), problem.shape.values["heads"]
    pairs = (lengths * (lengths + 1) / 2 if problem.shape.values["causal"] else lengths**2).sum().item()
    if (masks := _visible(problem)) is not None:
        pairs = float(sum(int(mask.sum()) for mask in masks))
    products, tensors = (7, 12) if mode == "forward+backward" else (2, 4)
    return 2.0 * products * heads * 64 * pairs, float(tensors * problem.inputs["q"].nbytes)


CASE = Case(
    op="packed_attention",
    about="self-attention of segments of different lengths, heads of 64",
    formula="softmax(q_s k_s' / sqrt(d)) v_s for every segment s",
    limit="14 H d n n per segment, or 12 T H d elements moved",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("fastvlp triton", "ours", _ours("triton"), "fastvlp", needs("triton", cuda=True)),
        Provider("fastvlp cpu", "ours", _ours("cpu"), "fastvlp", always),
        Provider("eager", "eager", _padded(False)),
        Provider("segment loop", "eager", _loop),
        Provider("torch.compile", "compiled", _padded(True), why_not=needs_compiler),
        Provider("flash-attn", "rival", _flash, "flash-attn", needs("flash_attn", cuda=True)),
        Provider("xformers", "rival", _xformers, "xformers", needs("xformers", cuda=True)),
        Provider("torch varlen", "rival", _varlen, why_not=needs("torch.nn.attention.varlen", cuda=True)),
        Provider("FlexAttention", "rival", _flex, why_not=_needs_flex),
    ),
)
