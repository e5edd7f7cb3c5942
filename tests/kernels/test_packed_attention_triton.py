"""The Triton kernels of packed_attention: interpreted on the CPU, compiled for GPUs that are not here, and run where there is one."""

from importlib import import_module

import pytest
import torch

from fastvlp_kernels._testing import error
from fastvlp_kernels.packed_attention import packed_attention
from tests.kernels.aot import SHARED_LIMIT, Recorder
from tests.kernels.interpreter import interpreted
from tests.kernels.test_packed_attention import SEES, cu, loop, randn, types_of

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = {
    "_forward_kernel": "triton", "_query_kernel": "triton_backward", "_key_kernel": "triton_backward",
    "_short_kernel": "triton_short", "_short_backward_kernel": "triton_short",
}
# Probabilities, dS and results are rounded once each; the interpreter of Triton truncates to bfloat16 where GPUs round.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def compare(
    lengths_q, lengths_k=None, longest=(None, None), dtype=torch.float32, heads=2, kv_heads=2, width=8, value_width=8, size=False, bias=0,
    prefix=False, causal=False, device="cpu", leaves_needed=4, exactly=None, types=False,
):
    """Value, mass and gradients of the Triton path against the loop in float64."""
    keys = lengths_q if lengths_k is None else lengths_k
    inputs = [randn(sum(lengths_q), heads, width, seed=1), randn(sum(keys), kv_heads, width, seed=2),
              randn(sum(keys), kv_heads, value_width, seed=3)]  # fmt: skip
    if bias:
        inputs.append(randn(*((heads,) if bias == 2 else ()), sum(keys), seed=5))
    inputs = [x.to(device, dtype) for x in inputs]
    sizes = torch.randint(0, 4, (sum(keys),), generator=torch.Generator().manual_seed(4)).to(device) if size else None
    prefixes = torch.arange(1, 1 + 3 * len(lengths_q), 3).to(device) % 4 if prefix else None
    weight = randn(sum(lengths_q), heads, value_width, seed=6).to(device, dtype)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, mass = function(*leaves)
        needed = leaves[:leaves_needed] if leaves_needed > 0 else leaves[leaves_needed:]
        zero = 0 * sum(leaf.sum() for leaf in leaves)
        return out, mass, *torch.autograd.grad((out * weight.to(dtype)).sum() + zero, needed)

    def ours(q, k, v, key_bias=None):
        q, k, v = ((x if need else x.detach()) for x, need in zip((q, k, v), wanted, strict=True))
        starts = cu(lengths_q).to(device), None if lengths_k is None else cu(keys).to(device)
        kinds = {}
        if types:
            token_type, token_type_k = (types_of(len(x)).to(device) for x in (q, k))
            kinds = {"token_type": token_type, "token_type_k": token_type_k, "sees": SEES.to(device)}
        return packed_attention(q, k, v, *starts, *longest, key_size=sizes, key_bias=key_bias, prefix_len=prefixes, causal=causal,
                                return_key_mass=True, impl="triton", **kinds)  # fmt: skip

    wanted = [i < leaves_needed if leaves_needed > 0 else i >= len(inputs) + leaves_needed for i in range(3)]
    exact = exactly or (lambda q, k, v, b=None: loop(q, k, v, lengths_q, keys, sizes, b, prefixes, causal, types=types))
    for index, (mine, want) in enumerate(zip(run(ours, dtype), run(exact, torch.float64), strict=True)):
        if want.numel():
            found = error(mine, want)
            assert found[0] < (1e-5 if index == 1 else ROUNDING[dtype]), f"{index} of {(lengths_q, lengths_k, longest, dtype)}: {found}"


MIXED = [3, 0, 20, 1, 40]


def interpreted_cases() -> None:
    """Every feature with searched and with given lengths, whole and in tiles; uninitialised memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    for longest in ((None, None), (40, 40)):
        compare(MIXED, longest=longest)
        compare(MIXED, longest=longest, dtype=torch.bfloat16, causal=True, size=True, bias=2, heads=4)
        compare(MIXED, longest=longest, dtype=torch.float16, causal=True, prefix=True, bias=1, types=True)
        compare([9, 37], [20, 3], (longest[0], longest[1]), dtype=torch.bfloat16, types=True)
    compare([70, 100], [130, 90], dtype=torch.float16, types=True, kv_heads=1)
    compare([70, 100], [130, 0], dtype=torch.float16, size=True, bias=1)
    compare([100, 5], [100, 90], (100, 100), dtype=torch.bfloat16, width=80, value_width=72, heads=1, kv_heads=1)
    compare([90, 3], dtype=torch.bfloat16, causal=True, prefix=True, heads=2, kv_heads=1)
    compare([1, 1, 1, 1], [30, 0, 70, 5], (1, 70), dtype=torch.float16, size=True, bias=2)
    compare([9, 70], [20, 3], (70, 20), dtype=torch.float16, causal=True)
    compare([1], heads=1, kv_heads=1, width=1, value_width=3)
    compare([0, 0], [4, 0], (0, 4))
    compare([2, 0], [0, 0], (2, 0))
    compare([])
    for needed in (1, 2, -1, -2):
        compare([5, 9], leaves_needed=needed)
        compare([5, 9], longest=(9, 9), dtype=torch.float16, leaves_needed=needed, bias=1)
    refusals()


def refusals() -> None:
    q = torch.randn(80, 1, 8)
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        packed_attention(q.double(), q.double(), q.double(), cu([80]), impl="triton")
    for options, message in (
        ({"max_seqlen_q": -1}, "max_seqlen_q=-1; it must be the length of the longest segment"),
        ({"max_seqlen_q": 79}, "max_seqlen_q=79, but there is a segment of 80; pass 80, or None"),
        ({"max_seqlen_q": 80, "max_seqlen_k": 5}, "max_seqlen_k=5, but there is a segment of 80"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_attention(q, q, q, cu([80]), impl="triton", **options)
    for lengths in ([70], [90]):
        with pytest.raises(ValueError, match="hold .* queries and .* keys, but q has 80 rows and k has 80"):
            packed_attention(q, q, q, cu(lengths), impl="triton")
    q = q.half()
    q[12] = torch.nan
    for longest in (None, 70):
        leaves = [q.detach().requires_grad_() for _ in range(3)]
        out = packed_attention(*leaves, cu([10, 70]), max_seqlen_q=longest, impl="triton")
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert out[10:].isnan().any() and not any(x[:10].isnan().any() for x in (out, *gradients))
        a, b = (torch.autograd.grad(packed_attention(*leaves, cu([10, 70]), impl="triton").sum(), leaves) for _ in range(2))
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def resident_cases() -> None:
    """129 to 256 keys in several tiles that stay on chip, one or several tiles of queries per program."""
    from fastvlp_kernels.packed_attention import triton_short

    torch.use_deterministic_algorithms(True)
    for programs in (1, 512):
        triton_short.PROGRAMS = programs
        compare([197, 0, 180], longest=(197, 197), dtype=torch.float16, heads=1, kv_heads=1)
        compare([150, 131], longest=(150, 150), dtype=torch.bfloat16, size=True, bias=2, heads=1, kv_heads=1)
        compare([90, 3], longest=(90, 90), dtype=torch.float16, causal=True, prefix=True, heads=2, kv_heads=1)
    compare([70, 1], [130, 190], (70, 190), dtype=torch.float16, bias=1)
    compare([5, 1], [200, 240], (5, 240), dtype=torch.bfloat16, types=True)
    compare([3, 2], [100, 90], (3, 100), dtype=torch.bfloat16, width=72, value_width=80, heads=1, kv_heads=1)
    compare([5, 1, 0, 9, 24, 1] * 3, longest=(24, 24), dtype=torch.float16, causal=True, bias=1, width=24, value_width=72, kv_heads=1)
    only_the_device_knows()


def only_the_device_knows() -> None:
    """Lengths that contradict the host: longer than the longest is NaN or right; behind the last segment 0; nothing outside is read."""
    from fastvlp_kernels.packed_attention import triton, triton_backward

    def run(q, k, lengths_q, lengths_k, longest):
        """The rows beyond q and k hold 7, and must not be seen."""
        q, k = (torch.cat((x, torch.full((90, *x.shape[1:]), 7.0, dtype=x.dtype)))[: len(x)] for x in (q, k))
        starts = (cu(lengths_q), cu(lengths_k), *longest)
        out, lse, mass = triton.forward(q, k, k, *starts, None, None, None, False, 0.25, True, False)
        grads = triton_backward.backward(out, q, k, k, out, lse, *starts, None, None, None, False, 0.25, [True] * 3 + [False], False)
        return out, mass, *grads[:3]

    def exact(q, k, lengths_q, lengths_k):
        out = packed_attention(q, k, k, cu(lengths_q), cu(lengths_k), scale=0.25, return_key_mass=True, impl="reference")
        return out

    random = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.float32, 1e-5)):
        q, k = (torch.randn(n, 1, 16, generator=random).to(dtype) for n in (80, 100))
        for longest in ((16, 90), (70, 16), (16, 16)):
            out, mass, *grads = run(q, k, [10, 70], [10, 90], longest)
            want, want_mass = exact(q, k, [10, 70], [10, 90])
            torch.testing.assert_close(out[:10], want[:10], rtol=tolerance, atol=tolerance)
            assert not any(x[:10].isnan().any() for x in grads)
            for mine, right in ((out[10:], want[10:]), (mass[10:], want_mass[10:].float())):
                assert (mine.isnan() | (mine - right).abs().le(tolerance * 10)).all()
        for known in (True, False):
            for ends in (([10, 50], [10, 60]), ([10, 90], [10, 99])):
                cut = [[10, min(70, ends[0][1])], [10, min(90, ends[1][1])]]
                found = run(q, k, *ends, tuple(max(x) for x in ends) if known else (None, None))
                want = exact(q[: sum(cut[0])], k[: sum(cut[1])], *cut)
                torch.testing.assert_close(found[0][: len(want[0])], want[0], rtol=tolerance, atol=tolerance)
                for x, rows in zip(found, (len(want[0]), len(want[1]), len(want[0]), len(want[1]), len(want[1])), strict=True):
                    assert x.isfinite().all() and not x[rows:].any()


@pytest.mark.parametrize("cases", [interpreted_cases, resident_cases])
def test_interpreted(cases):
    interpreted(cases)


def launches(monkeypatch, dtype, width, lengths, longest, extras, types=False) -> dict[str, Recorder]:
    """The launches of a forward and a backward over 64 segments of ``lengths`` queries and keys, not run."""
    recorders = {}
    modules = {name: import_module(f"fastvlp_kernels.packed_attention.{name}") for name in set(KERNELS.values())}
    for name, module in KERNELS.items():
        recorders[name] = Recorder(getattr(modules[module], name))
        monkeypatch.setattr(modules[module], name, recorders[name])
    S, heads = 64, 12
    q, k = (torch.zeros(S * n, heads, width, dtype=dtype) for n in lengths)
    starts = [cu([n] * S) for n in lengths] if lengths[0] != lengths[1] else [cu([lengths[0]] * S)] * 2
    terms = (torch.ones(len(k)), torch.ones(heads, len(k)), torch.ones(S, dtype=torch.int64)) if extras else (None, None, None)
    kinds = (torch.zeros(len(q), dtype=torch.int32), torch.zeros(len(k), dtype=torch.int32)) if types else (None, None)
    ends = (*starts, *(lengths if longest else (None, None)))
    out, lse, _ = modules["triton"].forward(q, k, k, *ends, *terms, extras, 0.1, extras, True, *kinds)
    modules["triton_backward"].backward(out, q, k, k, out, lse, *ends, *terms, extras, 0.1, [True, True, True, extras], True, *kinds)
    return recorders


# Data type, head width, lengths of queries and keys, whether they are known, and whether everything optional, and types, are used.
COMPILED = {
    "tiny": (torch.bfloat16, 64, (4, 4), True, True),
    "short": (torch.bfloat16, 64, (50, 50), True, True),
    "middle": (torch.bfloat16, 64, (197, 197), True, False),
    "long": (torch.bfloat16, 128, (1000, 1000), True, True),
    "three tiles": (torch.float16, 64, (150, 150), True, False),
    "72": (torch.float16, 72, (100, 100), True, False),
    "pooling": (torch.bfloat16, 80, (1, 256), True, False),
    "float32": (torch.float32, 64, (50, 50), False, True),
    "short types": (torch.bfloat16, 64, (50, 50), True, True, True), "middle types": (torch.bfloat16, 64, (197, 197), True, False, True),
    "types": (torch.bfloat16, 64, (600, 600), False, True, True), "wide types": (torch.bfloat16, 128, (600, 600), True, True, True),
    "float32 types": (torch.float32, 64, (50, 50), False, True, True),
}


EVERYWHERE = ("tiny", "short", "middle", "long", "three tiles", "types", "wide types")


@pytest.mark.parametrize(("case", "arch"), [(c, a) for a in SHARED_LIMIT for c in COMPILED if a == 90 or c in EVERYWHERE])
def test_compiled_ahead_of_time(case, arch, monkeypatch):
    dtype = COMPILED[case][0]
    for name, recorder in launches(monkeypatch, *COMPILED[case]).items():
        for launch in range(len(recorder.launches)):
            compiled, options = recorder.compile(arch, launch), recorder.launches[launch]
            compiled.assert_fits()
            if dtype != torch.float32:
                # The tensor cores of Hopper and Blackwell take tiles of 64 rows from 4 warps on; smaller ones go the way of Ampere.
                rows = options["BLOCK_N" if name in ("_key_kernel", "_short_backward_kernel") else "BLOCK_M"]
                assert compiled.holds("wgmma" if arch == 90 and rows >= 64 else "mma") or (arch == 100 and compiled.holds("tcgen05"))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@needs_gpu
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("width", [64, 72, 128])
def test_on_the_device(dtype, width):
    lengths = torch.randint(0, 260, (24,), generator=torch.Generator().manual_seed(0)).tolist()

    def compare_with_cpu(lengths_q, lengths_k, longest, **options):
        def exact(q, k, v, b=None):
            keys = lengths_q if lengths_k is None else lengths_k
            sizes = torch.randint(0, 4, (sum(keys),), generator=torch.Generator().manual_seed(4)).cuda() if options.get("size") else None
            return packed_attention(q, k, v, cu(lengths_q).cuda(), cu(keys).cuda(), key_size=sizes, key_bias=b, return_key_mass=True,
                                    causal=options.get("causal", False), impl="cpu")  # fmt: skip

        compare(lengths_q, lengths_k, longest, dtype, width=width, value_width=width, device="cuda", exactly=exact, **options)

    for causal in (False, True):
        compare_with_cpu(lengths, None, (None, None), causal=causal, size=True, bias=2)
        compare_with_cpu(lengths, None, (260, 260), causal=causal)
        compare_with_cpu([50] * 24, None, (50, 50), causal=causal, bias=1)
        compare_with_cpu([1500, 3], None, (1500, 1500), causal=causal, heads=4)
    compare_with_cpu([1] * 24, lengths, (1, 260), size=True)


@needs_gpu
def test_on_the_device_captured_and_repeatable():
    q, k, v = (torch.randn(50 * 64, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    starts = cu([50] * 64).cuda()

    def run():
        out = packed_attention(q, k, v, starts, max_seqlen_q=50)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
