"""Compiles Triton kernels for GPUs that are not here, and reads what ptxas says about them.

Triton runs ptxas itself, with its own flags; what it says is read there, so that nothing is assembled twice or otherwise than on a GPU.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# Bytes of shared memory that one block may use, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
POINTERS |= {torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture: 32-bit registers per thread, bytes of shared memory per block, bytes spilled per thread."""

    arch: int
    registers: int
    shared: int
    spills: int
    ptx: str
    log: str = ""
    disassemble: Callable[[], str] = lambda: ""

    def holds(self, instruction: str) -> bool:
        """Whether the PTX holds an instruction, by the first part of its name: "wgmma", "mma", "tcgen05", "atom", "red"."""
        return re.search(rf"^\s*(@!?%p\d+\s+)?{re.escape(instruction)}\.", self.ptx, re.MULTILINE) is not None

    def waits(self) -> tuple[int, int]:
        """How many asynchronous products of the tensor core the machine code has for sm_90, and how many of them are waited for before
        the next begins. Of a loop over one product of tiles, only the last of a turn should be."""
        found = re.findall(r"\bHGMMA|WARPGROUP\.DEPBAR", self.disassemble())
        runs = [name for name, _ in itertools.groupby(found)]
        return found.count("HGMMA"), max(0, runs.count("HGMMA") - 1)

    def assert_fits(self, product: bool = False, atomics: bool = False) -> None:
        """It fits on the device, spills nothing, and ``product``s run on tensor cores, on sm_90 several of them between two waits."""
        assert self.shared <= SHARED_LIMIT[self.arch], f"{self.shared} bytes of shared memory"
        assert self.spills == 0, f"{self.spills} bytes spilled"
        assert not re.search(r"\bC75\d\d\b", self.log), self.log
        assert atomics or not (self.holds("atom") or self.holds("red"))
        if product:
            assert self.holds({80: "mma", 90: "wgmma", 100: "tcgen05"}[self.arch])
            if self.arch == 90:
                products, waits = self.waits()
                assert 2 * waits <= products, f"{products} products and {waits} waits between them"


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    *,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    aligned: Sequence[str] = (),
) -> Compiled:
    """Compile ``kernel`` (a @triton.jit function) for compute capability ``arch`` (80, 90, 100) without a GPU.

    Args:
        signature: type of every argument that is no constexpr: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32".
        constexprs: value of every constexpr; a pointer that is not given is a constexpr None.
        aligned: arguments known to be divisible by 16, as Triton finds out at launch: pointers of torch and strides.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constexprs}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constexprs), attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    key = (source.hash(), arch, num_warps, num_stages, maxnreg)
    if key not in _COMPILED:
        _COMPILED[key] = _compile(source, GPUTarget("cuda", arch, 32), options)
    return _COMPILED[key]


_COMPILED: dict[Any, Compiled] = {}  # the same launch under two tests is compiled once


def _compile(source: Any, target: Any, options: dict[str, Any]) -> Compiled:
    import triton

    logs: list[str] = []
    run = subprocess.run

    def noted(*args: Any, **kwargs: Any) -> Any:
        done = run(*args, **kwargs)
        if hasattr(kwargs.get("stderr"), "name"):
            logs.append(Path(kwargs["stderr"].name).read_text())
        return done

    # A cached binary would come without ptxas's log.
    with mock.patch.object(subprocess, "run", noted), mock.patch.dict(os.environ, {"TRITON_ALWAYS_COMPILE": "1"}):
        built = triton.compile(source, target=target, options=options)
    log = "".join(logs)
    used, spilled = re.search(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill", log)
    assert used is not None and spilled, f"ptxas reported neither registers nor spills:\n{log}"
    spills = sum(map(int, spilled))
    return Compiled(target.arch, int(used[1]), built.metadata.shared, spills, built.asm["ptx"], log, lambda: built.asm["sass"])


class Recorder:
    """Stands in for a @triton.jit kernel and notes its launches instead of running them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def note(*args: Any, **kwargs: Any) -> None:
            self.launches.append({**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs})

        return note

    def compile(self, arch: int, launch: int = -1) -> Compiled:
        """Compile a noted launch for ``arch``, specialised as Triton would: None, 1 and multiples of 16 are known."""
        values = dict(self.launches[launch])
        options = {name: values.pop(name, default) for name, default in (("num_warps", 4), ("num_stages", 3), ("maxnreg", None))}
        signature, constexprs, aligned = {}, {}, []
        fixed = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        general = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        for name, value in values.items():
            if name in fixed or value is None or (isinstance(value, int) and value == 1 and name not in general):
                constexprs[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and name not in general:
                    aligned.append(name)
        return compile_for(self.kernel, signature, constexprs, arch, aligned=aligned, **options)
