"""The case of objectives: ours against the formulas over whole matrices, and these against formulas of their own."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import report
from benchmarks.cases import objectives
from benchmarks.measure import build, check_parity, results
from benchmarks.registry import find

CPU = torch.device("cpu")
CASE = find("objectives")
SHAPES = CASE.shapes("cpu", True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.values["objective"])
def test_ours_is_as_exact_as_eager_and_gives_every_gradient(shape):
    problem = CASE.problem(shape, CPU)
    tasks, left_out = build(CASE.providers[:2], problem)
    errors, missing = check_parity(CASE, problem, tasks)
    assert set(errors) == {"fastvlp", "eager"} and not left_out and not missing
    trained = objectives.OBJECTIVES[shape.values["objective"]].trained
    assert set(results(tasks["fastvlp"], "forward+backward")) == {"value", *trained} == set(CASE.exact(problem).results)
    assert all(tensor.any() for tensor in CASE.exact(problem).results.values())


def test_cross_entropies_of_both_directions_are_those_of_the_definition():
    S, same = torch.randn(7, 7).double(), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    same = same[:, None] == same
    rows = torch.stack([-row.log_softmax(0)[own].mean() for row, own in zip(S, same, strict=True)]).mean()
    columns = torch.stack([-column.log_softmax(0)[own].mean() for column, own in zip(S.T, same, strict=True)]).mean()
    torch.testing.assert_close(objectives.pairs(S, same.double()), (rows + columns) / 2)
    torch.testing.assert_close(objectives.pairs(S), (F.cross_entropy(S, torch.arange(7)) + F.cross_entropy(S.T, torch.arange(7))) / 2)


def test_work_counts_products_and_what_moves():
    shape = next(shape for shape in SHAPES if shape.values["objective"] == "DCD")
    problem = CASE.problem(shape, CPU)
    b, d = shape.values["b"], shape.values["d"]
    assert CASE.work(problem, "forward") == (2.0 * b * 16 * d, 8.0 * b * d + 4)
    assert CASE.work(problem, "forward+backward") == (6.0 * b * 16 * d, 16.0 * b * d + 8)


def test_a_table_of_its_own_and_no_line_among_the_operators():
    assert "objectives" in report.TABLES and "objectives" not in report.operators({})
    table = report.TABLES["objectives"]({})
    assert all(shape.name in table for shape in CASE.shapes("cpu", False))
