"""Compiles CUDA sources for GPUs that are not here, and as C++ for threads of the CPU, where their results and races can be tested."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kernels.aot import Compiled

HEADER = Path(__file__).with_name("cuda_threads.h")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def _has_thread_sanitizer() -> bool:
    if shutil.which("g++") is None:
        return False
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    return Path(found).is_absolute()


needs_thread_sanitizer = pytest.mark.skipif(not _has_thread_sanitizer(), reason="g++ has no ThreadSanitizer (libtsan) here")


def compile_cuda(source: Path, arch: int, folder: Path) -> dict[str, Compiled]:
    """Compile the kernels of ``source`` for compute capability ``arch`` (80, 90, 100), by name; warnings are errors."""
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings", "--keep", "--keep-dir", "."]
    done = subprocess.run([*command, str(source), "-o", "out.cubin"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx, compiled = Path(folder, f"{source.stem}.ptx").read_text(), {}
    for said in (done.stdout + done.stderr).split("Compiling entry function")[1:]:
        name, used, shared = (re.search(pattern, said) for pattern in (r"'(\w+)'", r"Used (\d+) registers", r"(\d+) bytes smem"))
        spilled = re.findall(r"(\d+) bytes spill", said)
        assert name and used and spilled, f"ptxas reported neither registers nor spills:\n{said}"
        compiled[name[1]] = Compiled(arch, int(used[1]), int(shared[1]) if shared else 0, sum(map(int, spilled)), ptx)
    return compiled


def compile_threads(source: Path, target: Path, more: str, *options: str) -> None:
    """Compile ``source`` and the C++ in ``more`` with what ``cuda_threads.h`` puts in place of CUDA."""
    program = f'#include "{HEADER}"\n#include "{source}"\n{more}'
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", *options, "-x", "c++", "-", "-o", str(target)]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class OnThreads:
    """The kernels of ``source`` on threads of the CPU; pointers are to its memory."""

    def __init__(self, source: Path, kernels: Sequence[str], folder: Path) -> None:
        more = [f'extern "C" void run_{name}(int b, int t, void** a) {{ on_threads::launch({name}, b, t, a); }}' for name in kernels]
        compile_threads(source, folder / "kernels.so", "\n".join(more), "-shared", "-fPIC")
        self.library = ctypes.CDLL(str(folder / "kernels.so"))

    def launch(self, name: str, blocks: int, threads: int, *args: int | float) -> None:
        """As CuPy launches: an int is an int64 or a pointer, a float a float64."""
        values = [ctypes.c_double(arg) if isinstance(arg, float) else ctypes.c_int64(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.library[f"run_{name}"](blocks, threads, pointers)
