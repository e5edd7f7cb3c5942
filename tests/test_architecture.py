"""Imports point one way, and importing the library costs next to nothing."""

import ast
import json
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
    """At most 2 s beyond torch itself, and none of the optional packages."""
    code = (
        "import time, torch, json, sys; before = set(sys.modules); start = time.process_time();"
        "import fastvlp, fastvlp.ops, fastvlp.losses;"
        "print(json.dumps([time.process_time() - start, sorted({name.split('.')[0] for name in set(sys.modules) - before})]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                         env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    seconds, modules = json.loads(out.stdout)
    assert seconds < 2
    optional = {"triton", "cupy", "PIL", "yaml", "tokenizers", "safetensors", "matplotlib", "torchvision", "open_clip", "timm"}
    optional |= {"transformers", "open_clip_train", "pandas", "webdataset"}
    assert not optional & set(modules)


def test_no_file_does_two_jobs():
    long = {str(f.relative_to(ROOT)): n for d in ("fastvlp", "kernels", "benchmarks", "tests") for f in (ROOT / d).rglob("*.py")
            if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"split these: {long}"
