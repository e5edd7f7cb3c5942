"""token_select's CUDA source: its results and its barriers on threads of the CPU, and compiled for GPUs that are not here."""

import functools
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels import _backend, token_select
from fastvlp_kernels.token_select import cuda
from tests.kernels.aot import SHARED_LIMIT
from tests.kernels.cuda_source import OnThreads, compile_cuda, compile_threads, needs_compiler, needs_nvcc, needs_thread_sanitizer

SOURCE = Path(cuda.__file__).with_name("select.cu")
KERNELS = list(cuda.KERNELS.values())
INF, NAN = torch.inf, torch.nan
STREAM = 7


@pytest.fixture(scope="module")
def on_threads(tmp_path_factory):
    """The kernels on threads of the CPU, behind what cuda.py calls of CuPy; launches are noted."""
    kernels, launches, streams = OnThreads(SOURCE, KERNELS, tmp_path_factory.mktemp("threads")), [], []

    class RawModule:
        def __init__(self, code, options):
            assert code == SOURCE.read_text()

        def get_function(self, name):
            def run(grid, block, args):
                assert streams == [STREAM] and all(type(arg) in (int, float) for arg in args)
                launches.append((name, *block))
                kernels.launch(name, *grid, *block, *args)

            return run

    @contextmanager
    def from_external(stream):
        streams.append(stream.__cuda_stream__()[1])
        yield
        streams.pop()

    with pytest.MonkeyPatch.context() as patch:
        compiler, stream = SimpleNamespace(getVersion=lambda: (13, 0)), SimpleNamespace(from_external=from_external)
        cupy = SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(nvrtc=compiler, Stream=stream))
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
        patch.setattr(_backend, "why_not", lambda impl, device: "")
        patch.setattr(cuda, "MOST_THREADS", 64)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        cuda.why_not.cache_clear()
        torch.use_deterministic_algorithms(True)  # what a kernel does not write is poisoned
        yield SimpleNamespace(launch=kernels.launch, launches=launches)
        torch.use_deterministic_algorithms(False)
        cuda._kernel.cache_clear()
        cuda.why_not.cache_clear()


def same(scores, lengths, keep, protected=0, index_dtype=torch.int32):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    mine, true = (token_select(scores, cu, keep, protected=protected, impl=impl) for impl in ("cuda", "reference"))
    for field in ("index", "cu_seqlens", "lengths"):
        assert torch.equal(getattr(mine, field), getattr(true, field)), (field, scores.tolist(), lengths, keep, protected)
    return mine


SPECIAL = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38])


@st.composite
def drawn(draw):
    """Scores, lengths, what to keep, and how many are protected."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 6), st.integers(0, 160)), max_size=5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tokens, kind = sum(lengths), draw(st.sampled_from(["normal", "special", "some special", "close", "zeros"]))
    scores = torch.randn(tokens, generator=g)
    if kind in ("special", "some special"):
        special = SPECIAL[torch.randint(len(SPECIAL), (tokens,), generator=g)]
        scores = torch.where(torch.rand(tokens, generator=g) < (1 if kind == "special" else 0.2), special, scores)
    elif kind == "close":  # they differ in the last digits only
        scores = scores.sign() * (1 + torch.randint(400, (tokens,), generator=g) * 2.0**-23)
    elif kind == "zeros":
        scores = scores.sign() * 0.0
    several = dict(min_size=len(lengths), max_size=len(lengths))
    keep = draw(st.one_of(
        st.integers(0, 180), st.floats(0, 1),
        st.lists(st.integers(0, 180), **several).map(lambda keep: torch.tensor(keep, dtype=torch.int64)),
        st.lists(st.floats(0, 1), **several).map(lambda keep: torch.tensor(keep, dtype=torch.float64)),
    ))  # fmt: skip
    return scores, lengths, keep, draw(st.sampled_from([0, 0, 1, 3, 70]))


@needs_compiler
@given(drawn(), st.sampled_from(list(cuda.KERNELS)), st.sampled_from([32, 64, 96]), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=150, deadline=None)
def test_any_segments_equal_the_reference(on_threads, case, dtype, threads, index_dtype):
    scores, lengths, keep, protected = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "MOST_THREADS", threads)
        same(scores.to(dtype), lengths, keep, protected, index_dtype)


@needs_compiler
def test_infinities_nan_zeros_and_ties(on_threads):
    scores = torch.tensor([NAN, -INF, 1, INF, INF, -INF, NAN, -INF, -INF])
    assert same(scores, [6, 3], 4).index.tolist() == [0, 2, 3, 4, 6, 7, 8]
    assert same(scores, [6, 3], 2, protected=1).index.tolist() == [0, 3, 6, 7]
    assert same(torch.tensor([-0.0, 0.0, -0.0, 0.0, -1e-45]), [5], 3).index.tolist() == [0, 1, 2]
    assert same(torch.ones(150), [150], 70).index.tolist() == list(range(70))
    assert same(torch.zeros(0), [], 3).cu_seqlens.tolist() == [0] and same(torch.zeros(0), [0, 0], 3).index.tolist() == []


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bit_patterns_of_16_bits_have_their_order(on_threads, dtype):
    """From all over the range and around zero and infinity, in one shuffled segment."""
    borders = torch.tensor([0x0000, 0x7C00, 0x7F80])[:, None] + torch.arange(-3, 4)
    bits = torch.cat((torch.arange(0, 1 << 16, 37), borders.flatten(), borders.flatten() + 0x8000)) % (1 << 16)
    bits = bits[torch.randperm(len(bits), generator=torch.Generator().manual_seed(0))]
    scores = (bits - (bits >= 0x8000).int() * 0x10000).to(torch.int16).view(dtype)
    place = scores.float().nan_to_num(nan=-INF, posinf=INF, neginf=-INF).argsort(descending=True, stable=True)
    for count in (1, 700, 880, 1200, 1500, 1780):
        kept = token_select(scores, torch.tensor([0, len(bits)]), count, impl="cuda").index
        assert torch.equal(kept, place[:count].sort().values), count


@needs_compiler
def test_shares_are_the_products_of_the_host(on_threads):
    """Products that rounding brings just to an integer, or just below: floor(49 * (1 / 49)) is 0."""
    shares = torch.arange(50, dtype=torch.float64) / 49
    assert (49 * shares).floor().long().tolist() != list(range(50))
    same(torch.rand(50 * 49), [49] * 50, shares)
    for share in (1 / 49, 0.29, 0.57, 0.58):
        same(torch.rand(249), [49, 100, 100], share)
    same(torch.rand(149), [49, 100], torch.tensor([0.7, 0.29], dtype=torch.float32))


@needs_compiler
def test_blocks_are_whole_warps_and_fit_the_longest_segment(on_threads, monkeypatch):
    monkeypatch.setattr(cuda, "MOST_THREADS", 256)
    for longest, threads in ((1, 128), (128, 128), (197, 224), (300, 256)):
        same(torch.rand(longest).bfloat16(), [longest], 0.5)
        assert on_threads.launches[-1] == ("select_bfloat16", threads)


@needs_compiler
def test_lengths_that_are_wrong_write_nothing_beyond_the_result(on_threads):
    scores, cu, index, starts = torch.rand(90), torch.tensor([0, 40, 90]), torch.full((60,), -1), torch.zeros(3, dtype=torch.int32)
    on_threads.launch("select_float32", 2, 64, scores.data_ptr(), cu.data_ptr(), 1, 0, 30.0, 0, 0, 45, index.data_ptr(), starts.data_ptr())
    assert (index[:45] >= 0).all() and (index[45:] == -1).all() and starts.tolist() == [0, 30, 60]


def test_cupy_that_cannot_compile_is_named(monkeypatch):
    def missing():
        raise RuntimeError("no libnvrtc.so.13\n")

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=missing))))
    monkeypatch.setattr(_backend, "why_not", lambda impl, device: "")
    for cached in (cuda.why_not, cuda._kernel):
        monkeypatch.setattr(cuda, cached.__name__, functools.cache(cached.__wrapped__))
    with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run here: .* finds no NVRTC \(no libnvrtc.so.13\): pip install"):
        token_select(torch.zeros(2), torch.tensor([0, 2]), 1, impl="cuda")


@needs_compiler
def test_float64_is_refused(on_threads):
    with pytest.raises(RuntimeError, match="impl='cuda' computes in float32, bfloat16 or float16, not in float64; use impl='cpu'"):
        token_select(torch.zeros(2, dtype=torch.float64), torch.tensor([0, 2]), 1, impl="cuda")


RACES = """
#include <cstdlib>
int main(int, char** arguments) {
    on_threads::left_out = std::atoi(arguments[1]);
    const int cu[] = {0, 150, 150, 190, 230, 330};
    static unsigned scores[330];
    for (unsigned i = 0; i < 330; ++i) scores[i] = i * 2654435761u;
    static long long index[160];
    static int starts[6];
    std::vector<long long> values{(long long)scores, (long long)cu, 0, 0, 0, 0, 1, 160, (long long)index, (long long)starts};
    double number = 40;
    void* args[10];
    for (int i = 0; i < 10; ++i) args[i] = &values[i];
    args[4] = &number;
    on_threads::launch(select_float32, 5, 64, args);
}
"""


@needs_compiler
@needs_thread_sanitizer
def test_no_race_and_no_barrier_too_many(tmp_path):
    """ThreadSanitizer finds no race, and finds one when any of the barriers is left out."""
    compile_threads(SOURCE, tmp_path / "races", RACES, "-fsanitize=thread")
    barriers = SOURCE.read_text().count("__syncthreads();")
    found = []
    for left_out in range(-1, barriers):
        done = subprocess.run([tmp_path / "races", str(left_out)], env={"TSAN_OPTIONS": "halt_on_error=1"}, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer does not start here: the kernel places memory where it cannot (vm.mmap_rnd_bits)")
        assert (done.returncode != 0) == ("WARNING: ThreadSanitizer: data race" in done.stderr), done.stderr
        found.append(done.returncode != 0)
    assert barriers == 5 and found == [False] + [True] * barriers


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch, tmp_path):
    compiled = compile_cuda(SOURCE, arch, tmp_path)
    assert sorted(compiled) == sorted(KERNELS)
    for kernel in compiled.values():
        assert kernel.spills == 0 and kernel.registers <= 64 and 0 < kernel.shared <= SHARED_LIMIT[arch]
        assert set(re.findall(r"\b(?:atom|red)\.[\w.]+", kernel.ptx)) == {"atom.shared.add.u32"}  # no floating-point sum
        assert "mul.f64" in kernel.ptx and "fma." not in kernel.ptx and ".f32" not in kernel.ptx
