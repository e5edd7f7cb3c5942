"""The page "Write a system in twenty lines" from first line to last, on a tiny shard; its system on two nodes that lose a process."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlp import cli
from tests.train.conftest import log_lines, write_shard

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/write_a_system.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)
SMALL = ["data.train=boxes.tar", "data.batch_size=48", "data.workers=0", "run.device=cpu", "schedule.steps=6", "schedule.warmup=1",
         "train.checkpoint_every=2", "eval.zero_shot=[]", "eval.retrieval=boxes.tar", "optim.eps=1e-3"]
EVALUATION = {"mini:val-openclipart": "boxes.tar", "mini:val-emoji": "boxes.tar", "mini:emoji": "names.txt"}
# The process of the last rank kills itself once, at the given batch, so that no clock decides when.
KILLED = """

import os, pathlib, signal
def after_step(self, out, batch):
    mark = pathlib.Path("was-killed")
    if os.environ.get("KILL_AT") == str(batch.index) and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
Mine.after_step = after_step
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for mine.py and, in the place of the shipped data, a tiny shard and its classes."""
    language, code = BLOCKS[0]
    assert language == "python" and "Save this as `mine.py`" in PAGE
    (tmp_path / "mine.py").write_text(code + KILLED)
    write_shard(tmp_path / "boxes.tar")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\nyellow\nblack\npink\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


def losses(run: str) -> list[float]:
    return [line["loss"] for line in log_lines(Path("runs") / run) if "loss" in line]


def test_the_system_is_twenty_lines():
    code = BLOCKS[0][1]
    system = code[code.index("class Mine"):code.index("def recipe")]
    assert len([line for line in system.splitlines() if line.strip()]) <= 20


def test_the_page_from_its_first_line_to_its_last(folder, capsys):
    """Every command is run as it stands, on less data: trained, in micro-batches, by two sharded processes, killed, continued, loaded."""
    torchrun, said = 0, {}
    for language, block in BLOCKS[1:]:
        if language == "python":
            exec(compile(block, "write_a_system.md", "exec"), found := {})
            assert found["features"].shape == (2, 64) and type(found["system"]).__name__ == "Mine"
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] == "torchrun":
                torchrun += 1
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], *SMALL]
                done = subprocess.run(command, env=environment(KILL_AT="3"), capture_output=True, text=True)
                assert done.returncode == 1 and "sharded over 2" in done.stdout, done.stderr
                assert (folder / "was-killed").exists() and not Path("runs/two/model").exists()
                continue
            assert words[0] == "fastvlp"
            arguments = [*words[1:], *SMALL] if words[1] == "train" else [EVALUATION.get(word, word) for word in words[1:]]
            assert cli.main(arguments) == 0, capsys.readouterr().err
            said[line] = capsys.readouterr().out
    assert torchrun == 1 and "train.shard: 2 -> 1" in said["fastvlp train mine.py run.name=two"]
    assert "continuing runs/two after step 2" in said["fastvlp train mine.py run.name=two"]
    assert [sum(measure in out for line, out in said.items() if "eval" in line) for measure in ("R@1", "top-1")] == [1, 1]
    assert losses("mine")[-1] < losses("mine")[0]
    assert losses("micro") == pytest.approx(losses("mine"), rel=1e-3) and losses("two") == pytest.approx(losses("mine"), rel=1e-3)


@pytest.mark.slow  # six starts of torch, one after the other
def test_two_nodes_that_lose_a_process_go_on_by_themselves(folder):
    """``examples/cluster/two_nodes.sh``: SIGKILL on one process, and torchrun starts all of them again, which continue."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    bin_ = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(ROOT / "examples/cluster/two_nodes.sh"), "mine.py", "run.name=nodes", "train.shard=2", *SMALL, "eval.retrieval=[]"]
    done = subprocess.run(command, env=environment(KILL_AT="3", PORT=port, PATH=bin_), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "was-killed").exists() and "exitcode: -9" in done.stderr
    assert "continuing runs/nodes after step 2" in done.stdout and "trained 6 steps" in done.stdout
    assert len(losses("nodes")) == 6


@pytest.mark.parametrize(("old", "new", "changes", "said"), [
    ("batch.text)", "batch.caption)", [], "the batch has no stream 'caption'; this recipe's fields are image, text"),
    (".mean(1)\n        return", ".mean()\n        return", [], "Mine.encode: colour_loss is (); a *_loss is one number a sample"),
    ("def objective", "def compare", [], ""),
    ("def encode", "def encodes", [], "Mine has no encode; write encode(self, batch)"),
    ("class Mine(System)", "class Mine(nn.Module)", [], "model makes a Mine; a fastvlp.systems.System is needed"),
    ("def recipe() ->", "def recipe( ->", [], "recipe mine.py does not import: SyntaxError"),
    ("def recipe()", "def other()", [], "mine.py has no recipe recipe; it has other"),
    ("", "", ["model.colr=1"], "unknown key model.colr; did you mean model.colour?"),
    ("", "", ["train.tokens={image: 2}"], "train.tokens: a sample has 16 tokens in the stream 'image', over the budget of 2"),
    ("", "", ["schedule.stages.0.frozen=[vision]"], "Mine has no part 'vision'; its parts are image, text"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(folder, capsys, old, new, changes, said):
    code = BLOCKS[0][1]
    assert old in code
    if old == "def objective":  # then nothing is left to train on
        code, said = code.replace('"colour_loss":', '"colour":'), "Mine has nothing to train on: encode gives image, text, colour; name"
    (folder / "mine.py").write_text(code.replace(old, new, 1) if old else code)
    assert cli.main(["train", "mine.py", *SMALL, "schedule.steps=1", *changes]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"fastvlp: error: {said}") and "\n" not in error
