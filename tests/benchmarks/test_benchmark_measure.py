"""How the harness measures: percentiles, order, parity, memory."""

import json
import math
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import CPU, EAGER, SHAPE, square, toy

from benchmarks import measure, memory, registry
from benchmarks.machine import ROOT, Limits, commit, device_name, environment, measure_limits
from benchmarks.registry import Exact, Problem, Provider, Task


def parity(*providers: Provider):
    case = toy(*providers)
    problem = case.problem(SHAPE, CPU)
    return measure.check_parity(case, problem, {p.name: p.build(problem) for p in providers})


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30))
def test_percentiles_are_those_of_the_standard_library(samples):
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    for q, expected in ((20, deciles[1]), (50, deciles[4]), (80, deciles[7])):
        assert measure.percentile(samples, q) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_percentile_of_one_sample_is_that_sample():
    assert measure.percentile([3.0], 20) == 3.0


def test_every_round_has_everybody_once_and_everybody_begins_equally_often():
    rounds = measure.interleave(["a", "b", "c"], 6)
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert [order[0] for order in rounds] == ["a", "b", "c"] * 2


def test_calls_are_interleaved_and_the_first_is_not_counted():
    calls = []
    clock = measure.Clock(CPU)
    taken = measure.sample({name: lambda name=name: calls.append(name) for name in "ab"}, clock, measure.Budget(0, 2, 5))
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_rounds_stop_at_the_maximum():
    taken = measure.sample({"a": lambda: None}, measure.Clock(CPU), measure.Budget(60, 1, 4))
    assert len(taken["a"]) == 4


def test_the_clock_counts_the_call_and_not_the_flush():
    event = torch.zeros(1)
    assert 0 <= measure.Clock(CPU).seconds(lambda: event.add_(1)) < 0.05


def test_the_ratio_is_paired_by_round():
    # The machine became ten times slower half way: every round still says 2.
    this = [1.0, 1.0, 1.0, 10.0, 10.0]
    assert measure.paired_ratio([2 * t for t in this], this) == 2


def test_parity_passes_and_gives_the_worst_error():
    worst, left_out = parity(EAGER, Provider("ours", "ours", square()))
    assert not left_out and set(worst) == {"eager", "ours"} and max(worst.values()) < 1e-6


@pytest.mark.parametrize(("factor", "gradient", "name"), [(1.00001, 1.0, "value"), (1.0, 1.00001, "x"), (math.nan, 1.0, "value")])
def test_a_wrong_result_of_ours_aborts_with_a_message(factor, gradient, name):
    with pytest.raises(measure.ParityError, match=f"toy, n=8, ours: {name} is off by .*nothing was timed"):
        parity(EAGER, Provider("ours", "ours", square(factor, gradient)))


def test_an_error_is_relative_to_the_terms_where_they_are_given():
    task = square()(Problem(SHAPE, CPU, {"x": torch.ones(4)}))
    exact = Exact({"value": torch.tensor(4.0).double(), "x": torch.full((4,), 2.5).double()}, {"x": torch.tensor(10.0).double()})
    assert measure.errors(task, exact) == {"value": 0, "x": pytest.approx(0.1)}


def test_a_wrong_eager_aborts_too():
    with pytest.raises(measure.ParityError, match="eager"):
        parity(Provider("eager", "eager", square(1.01)))


def test_a_rival_that_computes_something_else_is_left_out_with_the_reason():
    worst, left_out = parity(EAGER, Provider("ours", "ours", square()), Provider("rival", "rival", square(1.01)))
    assert list(left_out) == ["rival"] and left_out["rival"].startswith("wrong: value is off by 1.00e-02")


def test_who_runs_out_of_memory_is_left_out_but_ours_may_not():
    def build(problem: Problem) -> Task:
        def forward() -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return Task(forward, {})

    ours = Provider("ours", "ours", square())
    worst, left_out = parity(Provider("eager", "eager", build), ours)
    assert left_out == {"eager": "out of memory"} and list(worst) == ["ours"]
    with pytest.raises(measure.ParityError, match="ours: value is off by 1.00e-02"):
        parity(Provider("eager", "eager", build), Provider("ours", "ours", square(1.01)))
    with pytest.raises(torch.OutOfMemoryError):
        parity(EAGER, Provider("ours", "ours", build))


def test_forward_alone_records_no_graph():
    task = square()(Problem(SHAPE, CPU, {"x": torch.randn(8)}))
    assert not measure.results(task, "forward")["value"].requires_grad
    assert set(measure.results(task, "forward+backward")) == {"value", "x"}


def test_limits_are_the_larger_of_arithmetic_and_traffic():
    limits = Limits({torch.float32: 100.0}, 10.0)
    assert limits.seconds(200, 10, torch.float32) == 2
    assert limits.seconds(200, 100, torch.float32) == 10


def test_measured_limits_are_positive_and_finite():
    limits = measure_limits(CPU, {torch.float32}, quick=True)
    assert 0 < limits.flops[torch.float32] < math.inf and 0 < limits.copy < math.inf


def test_the_device_name_is_a_folder_name():
    name = device_name(CPU)
    assert name.startswith("cpu-") and name.endswith("core") and name.replace("-", "").isalnum() and name == name.lower()


def test_the_commit_is_that_of_the_checkout():
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert head.stdout.startswith(commit().rstrip("+")) if head.returncode == 0 else commit() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is read from Linux's /proc")
def test_peak_memory_of_a_process_of_its_own():
    # Eager cross entropy over B = 2048 makes two B x B float32 matrices at least, and its inputs are not counted.
    command = [sys.executable, "-m", "benchmarks.memory", "similarity_logsumexp", "B=2048 D=512", "eager", "forward"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    matrix = 2048**2 * 4
    assert 1.9 * matrix < json.loads(done.stdout)["extra_bytes"] < 6 * matrix


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is read from Linux's /proc")
def test_memory_of_a_provider_that_the_first_small_size_is_not_for():
    # A whole tower of tokens of 7 x 7 to 16 x 16 patches is made, then half of it again.
    peak = memory.peak_growth("patch_embed", "3 images C=32 keep=0.5", "fastvlp cpu, dropped after", "forward")
    assert peak is not None and peak >= 0


def test_why_a_package_is_absent_says_what_to_do():
    cuda = torch.device("cuda")
    assert registry.needs("nowhere")(CPU) == "not installed; pip install 'fastvlp[bench]'"
    assert registry.needs("torch.nn.nowhere")(CPU) == "needs a newer torch, with torch.nn.nowhere"
    assert registry.needs("torch")(CPU) == "" and registry.needs("torch", cuda=True)(CPU) == "needs a CUDA device"
    found = {name: registry.needs(name)(cuda) for name in registry.EXTRAS}
    assert all(reason in ("", f"not installed; pip install 'fastvlp[{registry.EXTRAS[name]}]'") for name, reason in found.items())
    flex = registry.find("packed_attention").find_provider("FlexAttention")
    assert flex.why_not(CPU) == "its backward needs a CUDA device" and flex.why_not(cuda) == ""


def test_a_size_that_a_provider_is_not_for_is_left_out_also_for_ours():
    def build(problem: Problem) -> Task:
        raise registry.InapplicableError("it is not for squares")

    assert measure.build([Provider("ours", "ours", build)], toy(EAGER).problem(SHAPE, CPU)) == ({}, {"ours": "it is not for squares"})


def test_an_unknown_operator_is_refused_with_the_nearest_name():
    with pytest.raises(KeyError, match="did you mean 'pairwise_sigmoid'"):
        registry.find("pairwise_sigmod")
