"""The case of maxsim: its exact answer against the reference, and its count of work against TARGETS."""

import math

import pytest
import torch

from benchmarks.registry import Shape, find
from fastvlp_kernels import maxsim

CPU = torch.device("cpu")


@pytest.mark.parametrize("both", [True, False])
def test_the_exact_scores_equal_the_reference(both):
    case = find("maxsim")
    problem = case.problem(Shape("", torch.float32, {"x": [5, 9, 2], "y": [3, 1, 12, 4], "d": 6, "both": both}), CPU)
    x, y = (problem.inputs[name].double().requires_grad_() for name in ("x", "y"))
    options = {} if both else {"reduce": "sum", "directions": "x_to_y"}
    scores = maxsim(x, problem.inputs["cu_x"], y, problem.inputs["cu_y"], impl="reference", **options)
    value = torch.stack(scores) if both else scores[None]
    gradients = torch.autograd.grad(value, (x, y), problem.inputs["upstream"].double())
    found = case.exact(problem).results
    for name, want in zip(("value", "x", "y"), (value, *gradients), strict=True):
        torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-12)


def test_only_near_ties_are_undecided():
    """A token of y next to another one, so near that float32 cannot tell them apart: all gradients may go to either."""
    case = find("maxsim")
    problem = case.problem(Shape("", torch.float32, {"x": [2], "y": [1, 2], "d": 6, "both": True}), CPU)
    assert set(case.exact(problem).undecided.values()) == {0.0}
    problem.inputs["y"][2] = problem.inputs["y"][1]
    exact = case.exact(problem)
    weight = problem.inputs["upstream"][0, 0, 1].double().abs() / 2  # two tokens of x have two candidates in the second segment
    for name in ("x", "y"):
        bound = float(2 * weight * 2**0.5 / exact.results[name].norm())
        assert exact.undecided[name] == pytest.approx(bound)


def test_work_is_that_of_the_targets():
    # TARGETS at 790 TFLOP/s: FILIP of 1024 x 1024 pairs 10 ms, ColBERT of 256 x 256 pairs 0.2 ms.
    case = find("maxsim")
    for name, milliseconds in (("FILIP 1024, 196 x 77, D=256", 10.3), ("ColBERT 256, 32 x 300, D=128", 0.204)):
        shape = case.find_shape(name, "cuda")
        sides = {side: torch.empty(sum(shape.values[side]), shape.values["d"], device="meta") for side in ("x", "y")}
        flops, _ = case.work(type("P", (), {"shape": shape, "inputs": sides})(), "forward")
        assert math.isclose(1e3 * flops / 790e12, milliseconds, rel_tol=0.01), name
