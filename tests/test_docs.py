"""The pages are true: their samples run, their commands parse, their links lead somewhere, their error messages are those of the code."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


# write_a_system.md has a test of its own.
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "write_a_system.md"])
def test_python_samples_run(page, tmp_path, monkeypatch):
    """The samples of a page run one after the other, as a reader would type them."""
    import torch

    from benchmarks.rivals import import_open_clip
    from tests.systems.recipes import save_small

    code = "\n".join(blocks(page, "python"))
    for package in re.findall(r"^(?:import|from) (open_clip|timm|transformers)\b", code, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the sample uses {package}, which is not installed")
        if importlib.util.find_spec("open_clip") is not None:
            import_open_clip()  # makes a torchvision importable that was built for another torch
    save_small(tmp_path / "runs" / "clip" / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"picture": torch.zeros(40, 60, 3, dtype=torch.uint8)})


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    assert sorted(re.findall(r"[\w/]+\.md", NAV)) == sorted(PAGES)
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert (DOCS / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_every_operator_has_a_page_with_its_table_and_its_picture():
    from benchmarks.registry import OPS

    for op in (op for op in OPS if (ROOT / "kernels/fastvlp_kernels" / op).is_dir()):
        text = PAGES[f"operators/{op}.md"]
        assert f"<!-- begin: {op.replace('_', '-')} -->" in text and "::: fastvlp_kernels." in text and "```text" in text, op
        assert f"](../assets/{op}.svg)" in text, op


def described(name: str):
    """The object, or the module, of one ``:::`` line."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None)
    return found if found is not None and not isinstance(found, ModuleType) else importlib.import_module(name)


def public(module: ModuleType) -> list[object]:
    """Functions and classes that a module defines, or re-exports as ``import name as name``."""
    tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.asname for node in imports for alias in node.names if alias.asname == alias.name]
    found = [getattr(module, name) for name in names if not name.startswith("_")]
    return [value for value in found if isinstance(value, type | FunctionType)]


REFERENCE = [name for text in PAGES.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]


def test_what_the_api_pages_describe_exists():
    for name in REFERENCE:
        assert described(name).__doc__, name


@pytest.mark.parametrize("name", [
    "fastvlp", "fastvlp.ops", "fastvlp.losses", "fastvlp.layers", "fastvlp.towers", "fastvlp.towers.pretrained", "fastvlp.systems",
    "fastvlp.integrations", "fastvlp.integrations.tome", "fastvlp.integrations.attention", "fastvlp.packing", "fastvlp.data",
    "fastvlp.data.fields", "fastvlp.train", "fastvlp.evaluate", "fastvlp.config", "fastvlp.recipe", "fastvlp.commands.plan",
    "fastvlp.commands.show",
])  # fmt: skip
def test_every_public_name_is_in_the_reference(name):
    found = [described(line) for line in REFERENCE]
    known = [value for one in found for value in (public(one) if isinstance(one, ModuleType) else [one])]
    wanted = public(importlib.import_module(name))
    assert wanted and [value.__qualname__ for value in wanted if not any(value is other for other in known)] == []


def test_the_objectives_page_names_every_loss():
    import fastvlp.losses

    names = [value.__name__ for value in public(fastvlp.losses)]
    assert len(names) > 20 and [name for name in names if f"`{name}" not in PAGES["guides/objectives.md"]] == []


def commands() -> list[str]:
    return [line.strip() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def test_commands_are_ones_that_exist():
    from benchmarks import __main__ as benchmark_command
    from fastvlp import cli
    from fastvlp.commands.train import from_arguments

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    seen = set()
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            seen.add("make")
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
            assert all(re.search(rf"^{word.partition('=')[0]} \?=", makefile, re.MULTILINE) for word in words[2:]), command
        elif "benchmarks" in words[:3] and "-m" in words:
            seen.add("benchmarks")
            benchmark_command.parser().parse_args(words[3:])
        elif words[0] in ("fastvlp", "torchrun"):
            rest = words[words.index("fastvlp") + 1 :]
            seen.add(rest[0])
            options = cli.parser().parse_args(rest)
            if hasattr(options, "arguments") and not options.arguments[:1] == ["mine.py"]:  # that one has a test of its own
                from_arguments(options.arguments)
        elif words[0] in ("sh", "sbatch", "kubectl"):
            seen.add(words[0])
            place = next(number for number, word in enumerate(words) if word.startswith("examples/"))
            assert (ROOT / words[place]).is_file(), command
            if words[place + 1:]:
                from_arguments(words[place + 1:])
        else:
            assert words[0] == "pytest" or words[2] == "fastvlp.integrations.open_clip", command
    assert seen == {"make", "benchmarks", "train", "eval", "recipes", "profile", "plan", "show", "check", "pack", "index", "sh", "sbatch",
                    "kubectl"}


def templates() -> list[list[str]]:
    """The fixed parts of every string of the sources, between its formatted values."""
    found = []
    for folder in ("fastvlp", "kernels/fastvlp_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append([node.value])
                elif isinstance(node, ast.JoinedStr):
                    parts = [""]
                    for value in node.values:
                        if isinstance(value, ast.Constant):
                            parts[-1] += str(value.value)
                        else:
                            parts.append("")
                    found.append(parts)
    return [parts for parts in found if sum(map(len, parts)) > 12]


def makes(parts: list[str], message: str) -> bool:
    """Whether a message has these parts in this order, the first at its beginning and the last at its end, with something between them."""
    if len(parts) == 1:
        return message == parts[0]
    place = len(parts[0])
    if not message.startswith(parts[0]) or not message.endswith(parts[-1]):
        return False
    for part in parts[1:-1]:
        place = message.find(part, place + 1) + len(part)
        if place < len(part):
            return False
    return place < len(message) - len(parts[-1])


def test_error_messages_are_those_of_the_code():
    """Each quoted message is one that a string of the source makes, whose fixed part is a few words at least."""
    messages = re.findall(r"^> (.+)$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(messages) > 15
    known = templates()
    for message in messages:
        assert any(makes(parts, message) for parts in known), message
        assert not any(makes(parts, message.replace(" ", "  ")) for parts in known), message


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
                    reason="the site needs mkdocs: pip install 'fastvlp[docs]'")  # fmt: skip
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of equals the first" in (tmp_path / "site/operators/token_merge/index.html").read_text(encoding="utf-8")  # from the docstring
