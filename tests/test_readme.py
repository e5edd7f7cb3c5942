"""The README's samples run, its tables are those of the results and of the systems, and its commands exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENV, cwd=cwd)


@pytest.mark.parametrize("code", _blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python_samples_run(code, tmp_path):
    import torch

    from tests.systems.recipes import save_small

    save_small(tmp_path / "runs" / "clip" / "model")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        exec(compile(code, "README.md", "exec"), {"picture": torch.zeros(40, 60, 3, dtype=torch.uint8)})
    finally:
        os.chdir(here)


def test_tables_are_generated():
    result = _python("-m", "benchmarks", "report", "--check")
    assert result.returncode == 0, result.stderr


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for block in _blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_training_commands_are_ones_that_exist():
    """Each `fastvlp train` line of the README names a recipe and keys that there are."""
    from fastvlp import cli
    from fastvlp.commands.train import from_arguments

    lines = [line for block in _blocks("bash") for line in block.splitlines() if "fastvlp train " in line and "--help" not in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line, comments=True)
        from_arguments(cli.parser().parse_args(words[words.index("train"):]).arguments)
