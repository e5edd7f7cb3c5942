"""gpu.sh with a stand-in for Python on a machine with a GPU: what is run, in which order, and what survives a part that hangs or fails."""

import os
import re
import subprocess
import sys
import tarfile

import pytest

from benchmarks import gpu_tests
from benchmarks.machine import ROOT, environment
from benchmarks.registry import ENDS, OPS

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    -) cat >/dev/null; [ -z "${NO_GPU:-}" ] || { echo "PyTorch sees no CUDA device"; exit 1; }; echo "a card, torch 2.11" ;;
    -c*) echo first hangs fails last ladder ;;
    *pip*bad*) echo "ERROR: bad.whl is not a supported wheel on this platform." >&2; exit 1 ;;
    *--op\\ hangs*) sleep 60 ;;
    *--op\\ fails*) echo "wrong by 5 %"; exit 1 ;;
    *--op* | *--e2e\\ ladder*) mkdir -p "$RESULTS/card"; echo "$4" >"$RESULTS/card/$5.json" ;;
esac
"""

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")


@pytest.fixture
def gpu(tmp_path):
    """Runs the script; returns the process, and the calls that the stand-in saw."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def call(*arguments, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), "RESULTS": str(tmp_path / "results"), "SECONDS_IN_ALL": "20"}
        done = subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], env=env | variables, capture_output=True, text=True, timeout=120)
        return done, calls.read_text().splitlines()

    return call


def test_one_part_that_hangs_and_one_that_fails_take_nothing_from_the_others(gpu, tmp_path):
    done, calls = gpu("-", tmp_path / "all.tar.gz")
    assert done.returncode == 1, done.stderr
    assert "pytest -p benchmarks.gpu_tests" in calls[2]
    assert [call.split()[3:5] for call in calls if " run " in call] == [
        *(["--op", name] for name in ("first", "hangs", "fails", "last")), ["--e2e", "ladder"]]  # fmt: skip
    assert all("--device cuda" in call for call in calls if " run " in call)
    summary = done.stdout[done.stdout.index("summary, after"):]
    for text in ("tests: done", "first: done", r"hangs: stopped after \d+ s, its limit", "fails: failed with exit code 1", "last: done",
                 "ladder: done"):  # fmt: skip
        assert re.search(text, summary), summary
    assert sorted(path.name for path in (tmp_path / "results" / "card").iterdir()) == ["first.json", "ladder.json", "last.json"]
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        names = archive.getnames()
        log = archive.extractfile("./gpu.log").read().decode()
    assert sum(name.endswith(("first.json", "last.json")) for name in names) == 2 and "wrong by 5 %" in log and "last: done" in log


def test_what_no_time_is_left_for_is_named(gpu):
    done, calls = gpu(SECONDS_IN_ALL="5")
    assert done.returncode == 1 and not [call for call in calls if "--op" in call or "pytest" in call]
    assert "last: skipped, " in done.stdout and '(PARTS="hangs fails last ladder" runs what is missing)' in done.stdout


def test_parts_can_be_chosen(gpu):
    done, calls = gpu(PARTS="last")
    assert done.returncode == 0 and len(calls) == 2 and "--op last" in calls[1]


def test_wheels_are_installed_without_dependencies_and_never_replace_torch(gpu, tmp_path):
    wheels = tmp_path / "wheels with a space"
    wheels.mkdir()
    other = ("torch-2.13-cp312.whl", "triton-3.9.whl", "nvidia_cublas.whl", "no.txt")
    for name in ("good-1.0-py3-none-any.whl", "bad.whl", "torchlike-1.whl", *other):
        (wheels / name).touch()
    done, calls = gpu(wheels, PARTS="last")
    installs = [call for call in calls if "pip install" in call]
    assert [call.split("/")[-1] for call in installs] == ["bad.whl", "good-1.0-py3-none-any.whl", "torchlike-1.whl"]
    assert all("--no-deps" in call and "--no-index" in call and "--target" in call for call in installs)
    assert "good-1.0-py3-none-any.whl: installed" in done.stdout
    assert "bad.whl: not installed, ERROR: bad.whl is not a supported wheel" in done.stdout
    assert "torch-2.13-cp312.whl: skipped, it would replace the machine's own" in done.stdout
    assert done.returncode == 0 and "last: done" in done.stdout
    assert "wheels: none in" in gpu(tmp_path / "nowhere", PARTS="last")[0].stdout


def test_without_a_gpu_nothing_runs_and_the_reason_is_said(gpu):
    done, calls = gpu(NO_GPU="1")
    assert done.returncode == 2 and len(calls) == 1
    assert "PyTorch sees no CUDA device" in done.stdout and "PYTHON=... chooses another" in done.stdout


def test_the_default_parts_are_those_of_the_registry():
    code = SCRIPT.read_text().split("-c '")[1].split("'")[0]
    found = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [*OPS, "ladder", "scaling"] and {"ladder", "scaling"} <= set(ENDS)


def test_the_plugin_keeps_the_tests_that_need_a_device(pytester):
    pytester.makepyfile(f"""
        import pytest
        gpu = pytest.mark.skipif(False, reason="{gpu_tests.REASON}")
        @gpu
        @pytest.mark.parametrize("n", [1, 2])
        @pytest.mark.skipif(False, reason="Triton is not installed")
        def test_device(n): pass
        @pytest.mark.skipif(False, reason="Triton is not installed")
        def test_interpreted(): pass
        def test_plain(): pass
    """)
    pytester.runpytest_inprocess("-p", "benchmarks.gpu_tests").assert_outcomes(passed=2, deselected=2)


def test_some_kernel_tests_carry_the_plugin_s_reason():
    files = [path for path in (ROOT / "tests" / "kernels").glob("test_*.py") if f'reason="{gpu_tests.REASON}"' in path.read_text()]
    assert files, "the tests on a device are found by this reason; keep it, or change benchmarks/gpu_tests.py"
