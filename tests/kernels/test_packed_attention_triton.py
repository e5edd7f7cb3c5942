"""The Triton kernels of packed_attention: interpreted on the CPU, compiled for GPUs that are not here, and run where there is one."""

from importlib import import_module

import pytest
import torch

from fastvlp_kernels._testing import error
from fastvlp_kernels.packed_attention import packed_attention
from tests.kernels.aot import SHARED_LIMIT, Recorder
from tests.kernels.interpreter import interpreted
from tests.kernels.test_packed_attention import cu, loop, randn

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = {
    "_forward_kernel": "triton", "_query_kernel": "triton_backward", "_key_kernel": "triton_backward",
    "_short_kernel": "triton_short", "_short_backward_kernel": "triton_short_backward",
}
# Probabilities, dS and results are rounded once each; the interpreter of Triton truncates to bfloat16 where GPUs round.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def compare(
    lengths_q, lengths_k=None, longest=(None, None), dtype=torch.float32, heads=2, kv_heads=2, width=8, value_width=8, size=False, bias=0,
    prefix=False, causal=False, device="cpu", leaves_needed=4, exactly=None,
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
        return packed_attention(q, k, v, *starts, *longest, key_size=sizes, key_bias=key_bias, prefix_len=prefixes, causal=causal,
                                return_key_mass=True, impl="triton")  # fmt: skip

    wanted = [i < leaves_needed if leaves_needed > 0 else i >= len(inputs) + leaves_needed for i in range(3)]
    exact = exactly or (lambda q, k, v, b=None: loop(q, k, v, lengths_q, keys, sizes, b, prefixes, causal))
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
        compare(MIXED, longest=longest, dtype=torch.float16, causal=True, prefix=True, bias=1)
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
    with pytest.raises(ValueError, match="max_seqlen_q=-1; it must be the length of the longest segment"):
        packed_attention(q, q, q, cu([80]), max_seqlen_q=-1, impl="triton")
    # A longest length that is not: never a wrong number.
    q = q.half()
    for wrong in ((16, 80), (80, 16)):
        out = packed_attention(q, q, q, cu([10, 70]), cu([10, 70]), *wrong, impl="triton")
        exact = packed_attention(q, q, q, cu([10, 70]), impl="reference")
        torch.testing.assert_close(out[:10], exact[:10], rtol=1e-2, atol=1e-2)
        assert out[10:].isnan().all() or torch.allclose(out[10:], exact[10:], rtol=1e-2, atol=1e-2)
    q[12] = torch.nan
    for longest in (None, 70):
        leaves = [q.detach().requires_grad_() for _ in range(3)]
        out = packed_attention(*leaves, cu([10, 70]), max_seqlen_q=longest, impl="triton")
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert out[10:].isnan().any() and not any(x[:10].isnan().any() for x in (out, *gradients))
        a, b = (torch.autograd.grad(packed_attention(*leaves, cu([10, 70]), impl="triton").sum(), leaves) for _ in range(2))
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def test_interpreted():
    interpreted(interpreted_cases)


def launches(monkeypatch, dtype, width, lengths, longest, extras) -> dict[str, Recorder]:
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
    ends = (*starts, *(lengths if longest else (None, None)))
    out, lse, _ = modules["triton"].forward(q, k, k, *ends, *terms, extras, 0.1, extras)
    modules["triton_backward"].backward(out, q, k, k, out, lse, *ends, *terms, extras, 0.1, [True, True, True, extras])
    return recorders


# Data type, head width, lengths of queries and keys, whether they are known, and whether everything optional is used.
COMPILED = {
    "stacked": (torch.bfloat16, 64, (4, 4), True, True),
    "short": (torch.bfloat16, 64, (50, 50), True, True),
    "middle": (torch.bfloat16, 64, (197, 197), True, False),
    "long": (torch.bfloat16, 128, (1000, 1000), True, True),
    "three tiles": (torch.float16, 64, (150, 150), True, False),
    "72": (torch.float16, 72, (100, 100), True, False),
    "pooling": (torch.bfloat16, 80, (1, 256), True, False),
    "float32": (torch.float32, 64, (50, 50), False, True),
}


EVERYWHERE = ("stacked", "short", "middle", "long")


@pytest.mark.parametrize(("case", "arch"), [(c, a) for a in SHARED_LIMIT for c in COMPILED if a == 90 or c in EVERYWHERE])
def test_compiled_ahead_of_time(case, arch, monkeypatch):
    dtype, width, lengths, longest, extras = COMPILED[case]
    for name, recorder in launches(monkeypatch, dtype, width, lengths, longest, extras).items():
        for launch in range(len(recorder.launches)):
            compiled, options = recorder.compile(arch, launch), recorder.launches[launch]
            print(f"{name} sm_{arch}: {compiled.registers} registers, {compiled.shared} bytes shared, {compiled.spills} bytes spilled")
            assert compiled.spills == 0 and compiled.shared <= SHARED_LIMIT[arch]
            assert not compiled.holds("atom") and not compiled.holds("red")
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
