"""What a run writes: rows, columns, files, and what the command line refuses."""

import csv
import dataclasses
import json

import pytest
import torch
from toys import EAGER, SHAPE, square, toy

from benchmarks import __main__ as command_line
from benchmarks import measure, run
from benchmarks.registry import InapplicableError, Provider, Task

ABSENT = Provider("elsewhere", "rival", square(), why_not=lambda device: "not installed")
RIVAL = Provider("rival", "rival", square())
OURS = Provider("ours", "ours", square())


def measured(*providers):
    said = []
    return run.run_case(toy(*providers), torch.device("cpu"), True, said.append), said


def test_a_row_carries_everything_and_absent_providers_are_named_not_invented(tmp_path):
    result, said = measured(OURS, EAGER, RIVAL, ABSENT)
    assert result["absent"] == {"elsewhere": "not installed"} and "  elsewhere: not installed" in said
    assert [(row["provider"], row["mode"]) for row in result["rows"]] == [
        (name, mode) for mode in ("forward", "forward+backward") for name in ("ours", "eager", "rival")]  # fmt: skip
    path = run.write(result, tmp_path)
    assert path.parent == tmp_path / result["machine"]["device"] and json.loads(path.read_text()) == result
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == run.COLUMNS and len(rows) == 6
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["rival"] == "rival" and float(row["ratio_rival"]) > 0 and float(row["share_of_limit"]) > 0
        assert row["torch"] == torch.__version__ and row["device"] == path.parent.name and row["timestamp"]
        assert row["extra_mb"] == ""  # quick runs measure no memory, and say nothing about it
    assert [float(row["ratio_rival"]) for row in rows if row["provider"] == "rival"] == [1.0, 1.0]


def test_a_small_size_says_nothing_about_its_share_of_the_limit():
    result, said = measured(OURS, EAGER)
    assert any(" ms (" in text for text in said) and not any("of limit" in text for text in said)
    assert "% of limit" in run.line(result["rows"][0])


def test_a_size_that_cannot_be_made_is_named_and_the_others_are_measured():
    case = toy(OURS, EAGER)

    def problem(shape, device):
        if shape.name == "other":
            raise InapplicableError("no library")
        return case.problem(shape, device)

    both = [dataclasses.replace(SHAPE, name="other"), SHAPE]
    result = run.run_case(dataclasses.replace(case, shapes=lambda *_: both, problem=problem), torch.device("cpu"), True, lambda text: None)
    assert result["absent"] == {"other": "no library"} and {row["shape"] for row in result["rows"]} == {SHAPE.name}


def test_without_a_rival_package_the_ratio_is_against_the_fastest_of_the_others():
    result, _ = measured(OURS, EAGER)
    assert {row["rival"] for row in result["rows"]} == {"eager"}


def test_a_parity_failure_times_nothing(monkeypatch):
    monkeypatch.setattr(run, "sample", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(measure.ParityError):
        measured(Provider("ours", "ours", square(1.1)), EAGER)


def test_a_wrong_rival_is_not_timed_and_named():
    result, said = measured(OURS, EAGER, Provider("rival", "rival", square(1.1)))
    assert "rival" not in {row["provider"] for row in result["rows"]}
    assert result["absent"]["rival at n=8"].startswith("wrong: value is off")
    assert any("rival is left out" in text for text in said)


def fails(at):
    """A provider that raises while it is built or when it is first called."""

    def build(problem):
        def forward():
            raise TypeError("unexpected keyword\nand a long story")

        return forward() if at == "build" else Task(forward, {})

    return build


@pytest.mark.parametrize("kind", ["rival", "compiled"])
@pytest.mark.parametrize("at", ["build", "call"])
def test_whoever_fails_is_left_out_with_the_reason_and_the_others_are_measured(at, kind):
    result, said = measured(OURS, EAGER, Provider("broken", kind, fails(at)))
    assert {row["provider"] for row in result["rows"]} == {"ours", "eager"}
    assert result["absent"] == {"broken at n=8": "fails: TypeError: unexpected keyword"}
    assert "  n=8: broken is left out, fails: TypeError: unexpected keyword" in said


@pytest.mark.parametrize("kind", ["ours", "eager"])
@pytest.mark.parametrize("at", ["build", "call"])
def test_ours_and_eager_must_not_fail(at, kind):
    providers = [provider for provider in (OURS, EAGER) if provider.kind != kind]
    with pytest.raises(TypeError, match="unexpected keyword"):
        measured(*providers, Provider("broken", kind, fails(at)))


def test_seconds_bound_the_sampling(monkeypatch):
    budgets = []
    real = run.sample
    monkeypatch.setattr(run, "sample", lambda functions, clock, budget: budgets.append(budget) or real(functions, clock, budget))
    run.run_case(toy(OURS, EAGER), torch.device("cpu"), True, lambda text: None, 0.0)
    assert {budget.seconds for budget in budgets} == {0.0} and {budget.min_rounds for budget in budgets} == {measure.QUICK.min_rounds}


def test_a_parity_failure_is_the_command_s_exit_code(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "find", lambda op: toy(Provider("ours", "ours", square(1.1)), EAGER))
    assert command_line.main(["run", "--op", "packed_attention", "--quick", "--out", str(tmp_path)]) == 1
    assert "parity: toy, n=8, ours" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_quick_run_writes_only_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "find", lambda op: toy(OURS, EAGER))
    monkeypatch.setattr(command_line, "RESULTS", tmp_path / "default")
    assert command_line.main(["run", "--op", "packed_attention", "--quick"]) == 0
    assert not (tmp_path / "default").exists()
    assert command_line.main(["run", "--op", "packed_attention", "--quick", "--out", str(tmp_path / "here")]) == 0
    assert [path.name for path in sorted((tmp_path / "here").glob("*/*"))] == ["toy.csv", "toy.json"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--op", "packed_atention"], "unknown operator 'packed_atention'; did you mean 'packed_attention'? (there are: similarity_logsumexp,"),
    (["--e2e", "mimi"], "unknown end-to-end benchmark 'mimi'; did you mean 'mini'?"),
    ([], "nothing to run: give --op with one of similarity_logsumexp,"),
])  # fmt: skip
def test_wrong_names_are_refused_with_a_suggestion(arguments, message, capsys):
    assert command_line.main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses CUDA only where there is none")
def test_cuda_is_refused_where_there_is_none(capsys):
    assert command_line.main(["run", "--op", "packed_attention", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_the_cases_are_listed(arguments, capsys):
    assert command_line.main(arguments) == 0
    listed = capsys.readouterr().out
    assert "similarity_logsumexp: " in listed and "runs here: fastvlp cpu, eager" in listed and "--e2e mini" in listed
