"""Imports point one way, and importing the library costs next to nothing."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kernels/fastvlp_kernels": {"fastvlp", "benchmarks", "tests"},
    "fastvlp": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}


# Inside fastvlp, the lowest first: who stands higher may import who stands lower. What stands beside each other does so only if SIDEWAYS.
# "" is fastvlp/__init__.py, for load and accelerate; fastvlp.ops, .tome and .attention are doors to the kernels and to integrations.
LEVELS = [
    {"fastvlp_kernels"}, {"_schema", "packing"}, {"layers", "losses"}, {"towers", "data"},
    {"systems", "integrations", "config", "recipe"}, {"", "ops", "tome", "attention"}, {"train", "evaluate", "curate"},
    {"commands"}, {"cli"},
    {"__main__"},
]
SIDEWAYS = {("systems", "config"), ("systems", "recipe"), ("config", "systems"), ("config", "recipe"),
            ("train", "evaluate"), ("train", "curate")}


def _imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) if node.level == 0]
    return {name.split(".")[0] for name in names}


def _files() -> dict[str, Path]:
    """The modules of fastvlp and of its kernels by their names."""
    found = {}
    for root, package in ((ROOT, "fastvlp"), (ROOT / "kernels", "fastvlp_kernels")):
        for file in (root / package).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which of these modules each imports, wherever in the file it does so; those for annotations alone are none."""
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: {target for node in _nodes(trees[name]) for target in _targets(node, name, file, files)} - {name}
            for name, file in files.items()}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _nodes(child)


def _targets(node: ast.AST, name: str, file: Path, files: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in files)
    if isinstance(node, ast.ImportFrom):
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        base = ".".join([*package[:len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module
        for alias in node.names:
            if f"{base}.{alias.name}" in files:
                yield f"{base}.{alias.name}"
            elif base in files:
                yield base


def _part(name: str) -> str:
    return name.split(".")[1] if name.startswith("fastvlp.") else "" if name == "fastvlp" else "fastvlp_kernels"


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): _imports(file) & FORBIDDEN[folder] for file in files}
    assert not {file: names for file, names in wrong.items() if names}


def test_inside_the_package_they_go_down():
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    graph = _graph(_files())
    assert len(graph) > 150 and {"commands", "train", "evaluate", "systems", "towers", "layers"} <= {_part(name) for name in graph}
    unknown = {_part(name) for name in graph} - level.keys()
    assert not unknown, f"say in LEVELS where they stand: {unknown}"
    wrong = [f"{name} -> {target}" for name, targets in graph.items() for target in sorted(targets)
             if (own := _part(name)) != (other := _part(target)) and level[other] >= level[own] and (own, other) not in SIDEWAYS]
    assert not wrong


def test_no_two_files_import_each_other():
    """Nor more of them in a circle. What a file imports inside a function counts, too."""
    order = graphlib.TopologicalSorter(_graph(_files()))
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_the_graph_sees_what_there_is(tmp_path):
    for name, text in (("__init__", ""), ("a", "def f():\n    from .b import x"), ("b", "import p.c as c\nfrom . import a"),
                       ("c", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a")):
        (tmp_path / f"{name}.py").write_text(text)
    files = {"p" if file.stem == "__init__" else f"p.{file.stem}": file for file in tmp_path.glob("*.py")}
    assert _graph(files) == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.c", "p.a"}, "p.c": set()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(_graph(files)).prepare()


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


def test_a_system_reads_like_its_paper():
    """A file that holds a recipe is a system; what it needs beyond 80 lines belongs in layers, losses, towers or data."""
    files = list((ROOT / "fastvlp/systems").glob("*.py"))
    sizes = {file.stem: len(text.splitlines()) for file in files if "\ndef recipe(" in (text := file.read_text(encoding="utf-8"))}
    assert len(sizes) > 30
    assert not {name: lines for name, lines in sizes.items() if not 15 <= lines <= 80}


def test_no_file_does_two_jobs():
    long = {str(f.relative_to(ROOT)): n for d in ("fastvlp", "kernels", "benchmarks", "tests") for f in (ROOT / d).rglob("*.py")
            if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"split these: {long}"
