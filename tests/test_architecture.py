"""Imports point one way, and importing the library costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kernels/fastvlp_kernels": {"fastvlp", "benchmarks", "tests"},
    "fastvlp": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}


def _imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) if node.level == 0]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): _imports(file) & FORBIDDEN[folder] for file in files}
    assert not {file: names for file, names in wrong.items() if names}


def test_every_operator_has_its_parts():
    folders = [folder for folder in (ROOT / "kernels/fastvlp_kernels").iterdir() if (folder / "__init__.py").is_file()]
    assert {folder.name for folder in folders} >= {"similarity_logsumexp", "pairwise_sigmoid", "packed_attention"}
    for folder in folders:
        assert {"reference.py", "cpu.py", "op.py"} <= {file.name for file in folder.iterdir()}, folder.name


def test_import_is_light():
    """Of other packages it imports torch alone, and of torch not the compilers, which take longer than all the rest."""
    code = "import torch, sys; before = set(sys.modules); import fastvlp, fastvlp.ops, fastvlp.losses; print(*set(sys.modules) - before)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                         env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    modules = out.stdout.split()
    # torch.distributed.nn makes the module with the underscore.
    allowed = sys.stdlib_module_names | {"fastvlp", "fastvlp_kernels", "torch", "_remote_module_non_scriptable"}
    assert "fastvlp.losses" in modules and {name.partition(".")[0] for name in modules} <= allowed
    assert not {"torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes"} & set(modules)


def test_no_file_does_two_jobs():
    long = {str(f.relative_to(ROOT)): n for d in ("fastvlp", "kernels", "benchmarks", "tests") for f in (ROOT / d).rglob("*.py")
            if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"split these: {long}"
