"""packed_attention by kernels of others.

flash-attn and xformers need a CUDA device and are not here: stand-ins with their signatures take the call, insist on its arguments, and
compute by the reference. What the real ones return is seen on a GPU, by the benchmarks.
"""

import sys
import types

import pytest
import torch

from fastvlp_kernels import _backend
from fastvlp_kernels.packed_attention import backends, packed_attention
from tests.kernels.test_packed_attention import cu, randn

QUERIES, KEYS = [3, 0, 2, 1], [2, 4, 0, 5]


def inputs(heads=2, kv_heads=2, width=4, value_width=4, dtype=torch.float64, keys=KEYS):
    shapes = (sum(QUERIES), heads, width), (sum(keys), kv_heads, width), (sum(keys), kv_heads, value_width)
    return [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def by_reference(q, k, v, lengths_q, lengths_k, causal, scale):
    cu_q, cu_k = cu(lengths_q), cu(lengths_k)
    return packed_attention(q, k, v, cu_q, cu_k, causal=causal, scale=scale, impl="reference")


def module(monkeypatch, name, **members):
    made = types.ModuleType(name)
    for member, value in members.items():
        setattr(made, member, value)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def allowed(monkeypatch):
    """As if every package were here, and this a CUDA device."""
    monkeypatch.setattr(_backend, "why_not", lambda impl, device: "")


def expect(monkeypatch, impl, causal=False, kv_heads=2, keys=KEYS, **options):
    q, k, v = (x.requires_grad_() for x in inputs(kv_heads=kv_heads, dtype=torch.bfloat16, keys=keys))
    results = [
        packed_attention(q, k, v, cu(QUERIES), cu(keys), 3, max(keys), causal=causal, impl=name, **options) for name in (impl, "reference")
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q)[0] for x in results))


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_is_called_as_it_wants(monkeypatch, allowed, version, causal):
    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
               window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and (max_seqlen_q, max_seqlen_k, dropout_p) == (3, 5, 0)
        return by_reference(q, k, v, cu_seqlens_q.diff(), cu_seqlens_k.diff(), causal, softmax_scale)

    def attend_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
                 seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, window_size=(None, None), return_lse=False):
        assert qv is None and min_seqlen_k is None
        out = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, causal=causal)
        return out, None

    module(monkeypatch, "flash_attn", **({"flash_attn_varlen_func": attend} if version == 2 else {}))
    module(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=attend_4)
    expect(monkeypatch, "flash-attn", causal, kv_heads=1, scale=0.3)


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_is_called_as_it_wants(monkeypatch, allowed, causal):
    class BlockDiagonalMask:
        def __init__(self, lengths, aligned_at_the_end=False):
            self.lengths, self.aligned_at_the_end = lengths, aligned_at_the_end

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert all(type(n) is int for n in (*q_seqlen, *kv_seqlen)) and device == torch.device("cpu")
            return cls((q_seqlen, kv_seqlen))

        def make_causal_from_bottomright(self):
            return BlockDiagonalMask(self.lengths, True)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[0] == key.shape[0] == 1 and query.shape[2] == key.shape[2] and attn_bias.aligned_at_the_end == causal
        return by_reference(query[0], key[0], value[0], *attn_bias.lengths, causal, scale)[None]

    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    module(monkeypatch, "xformers.ops.fmha")
    module(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    expect(monkeypatch, "xformers", causal, kv_heads=1, keys=[4, 2, 2, 3])
    with pytest.raises(RuntimeError, match="no more queries than keys in every segment"):
        expect(monkeypatch, "xformers", True)


@pytest.mark.parametrize(
    ("impl", "options", "message"),
    [
        *[(impl, {"return_key_mass": True}, "does not return the mass") for impl in ("flash-attn", "xformers")],
        *[(impl, {"key_size": torch.ones(11)}, "takes no key_size") for impl in ("flash-attn", "xformers")],
        ("xformers", {"key_bias": torch.ones(11)}, "takes no key_bias"),
        ("flash-attn", {"prefix_len": torch.ones(4).long(), "causal": True}, "takes no prefix_len"),
        *[(impl, {"token_type": torch.zeros(6).long(), "token_type_k": torch.zeros(11).long(), "sees": torch.ones(1, 1).bool()},
           "takes no token_type") for impl in ("flash-attn", "xformers")],
        ("flash-attn", {"dtype": torch.float32}, "does not compute in torch.float32"),
        ("xformers", {"dtype": torch.float64}, "does not compute in torch.float64"),
        ("flash-attn", {"value_width": 8}, "values as wide as keys"),
        ("flash-attn", {"width": 264}, "heads of at most 256 features, not 264"),
    ],
)
def test_what_they_cannot_do_is_refused_by_name(allowed, impl, options, message):
    options = {**options}
    shape = {"dtype": torch.bfloat16} | {name: options.pop(name) for name in ("dtype", "width", "value_width") if name in options}
    with pytest.raises(RuntimeError, match=f"packed_attention: impl='{impl}' .*{message}"):
        packed_attention(*inputs(**shape), cu(QUERIES), cu(KEYS), impl=impl, **options)


@pytest.mark.parametrize(("impl", "message"), [("flash-attn", "pip install flash-attn"), ("xformers", "pip install xformers")])
def test_what_to_install_is_said(monkeypatch, impl, message):
    monkeypatch.setattr(_backend, "_installed", lambda package: False)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* is not installed: {message}"):
        packed_attention(*inputs(), cu(QUERIES), cu(KEYS), impl=impl)


LONG = {"lengths_q": [5, 4, 9], "lengths_k": [4, 6, 4], "max_q": 9, "max_k": 6}


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "flash-attn"),
        ({"causal": True}, "flash-attn"),
        ({"dtype": torch.float16, "width": 16}, "flash-attn"),
        ({"lengths_q": [5, 3, 10]}, "triton"),
        ({"lengths_k": [3, 6, 5]}, "triton"),
        ({"lengths_q": None}, "triton"),
        ({"lengths_k": None}, "triton"),
        ({"max_q": None}, "triton"),
        ({"max_k": 5}, "triton"),
        ({"lengths_q": [], "lengths_k": []}, "triton"),
        ({"key_size": torch.ones(14)}, "triton"),
        ({"key_bias": torch.zeros(14)}, "triton"),
        ({"prefix_len": torch.ones(3).long()}, "flash-attn"),
        ({"prefix_len": torch.ones(3).long(), "causal": True}, "triton"),
        ({"with_mass": True}, "triton"),
        ({"dtype": torch.float32}, "triton"),
        ({"width": 24}, "triton"),
        ({"value_width": 8}, "triton"),
    ],
)
def test_flash_attn_is_preferred_for_long_segments_that_it_can_compute(monkeypatch, changes, first):
    monkeypatch.setattr(backends, "LONG", 4)
    monkeypatch.setattr(backends, "WIDEST", 16)
    options = {**LONG, "dtype": torch.bfloat16, "width": 4, "key_size": None, "key_bias": None, "prefix_len": None, "causal": False}
    options |= {"with_mass": False} | changes
    dtype, width = options.pop("dtype"), options.pop("width")
    value_width, lengths = options.pop("value_width", width), [options.pop(name) for name in ("lengths_q", "lengths_k")]
    q, k, v = (torch.zeros(*shape, dtype=dtype) for shape in ((18, 2, width), (14, 2, width), (14, 2, value_width)))
    given = [None if x is None else torch.tensor(x, dtype=torch.int64) for x in lengths]
    order = backends.preferred(q, k, v, *given, **options)
    assert order[0] == first and sorted(order) == sorted(("triton", "cpu", "reference", *backends.NAMES))
    torch.use_deterministic_algorithms(True)
    try:
        assert backends.preferred(q, k, v, *given, **options)[0] == "triton"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("here", [("flash-attn", "cpu"), ("cpu",)])
def test_what_is_installed_is_taken_where_nothing_is_named(monkeypatch, here):
    """A stand-in for flash-attn computes long segments alone, and nothing where it is not installed or something else is named."""
    calls = []

    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        calls.append(max_seqlen_k)
        return by_reference(q, k, v, cu_seqlens_q.diff(), cu_seqlens_k.diff(), causal, softmax_scale)

    module(monkeypatch, "flash_attn", flash_attn_varlen_func=attend)
    monkeypatch.setattr(_backend, "why_not", lambda impl, device: "" if impl in (*here, "reference") else "not here")
    monkeypatch.setattr(backends, "LONG", 4)
    monkeypatch.delenv("FASTVLP_IMPL", raising=False)
    for lengths, options in (([4, 7], {}), ([4, 7], {"impl": "cpu"}), ([4, 7], {"key_size": torch.ones(11)}), ([3, 8], {})):
        q, k, v = (randn(11, 2, 4, dtype=torch.bfloat16, seed=seed) for seed in range(3))
        out = packed_attention(q, k, v, cu(lengths), max_seqlen_q=8, lengths=torch.tensor(lengths), **options)
        exact = by_reference(q.double(), k.double(), v.double(), lengths, lengths, False, None)
        torch.testing.assert_close(out.double(), exact, rtol=2**-6, atol=2**-7)  # what bfloat16 rounds the weights and the result to
    assert calls == ([8] if "flash-attn" in here else [])


def test_devices_too_old_for_flash_attn_are_told(monkeypatch):
    monkeypatch.setattr(_backend, "_installed", lambda package: True)
    for capability, reason in (((7, 5), "compute capability 8.0"), ((8, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert _backend.why_not("xformers", torch.device("cuda")) == ""
        said = _backend.why_not("flash-attn", torch.device("cuda"))
        assert reason in said and bool(said) == bool(reason)
