"""A case with an obvious answer, and providers that are right or wrong by a chosen factor."""

import torch

from benchmarks.registry import Case, Exact, Problem, Provider, Shape, Task

CPU = torch.device("cpu")
SHAPE = Shape("n=8", torch.float32, {"n": 8})


def square(factor: float = 1.0, gradient: float = 1.0):
    """A provider of sum(x^2) that is wrong by a factor, in its value or in its gradient."""

    def build(problem: Problem) -> Task:
        x = problem.inputs["x"].detach().requires_grad_()
        scale = lambda results: {"value": results["value"]} | {k: gradient * v for k, v in results.items() if k != "value"}  # noqa: E731
        return Task(lambda: factor * x.square().sum(), {"x": x}, canonical=scale)

    return build


def toy(*providers: Provider) -> Case:
    return Case(
        op="toy", about="a toy", formula="sum x^2", limit="one pass",
        shapes=lambda device, quick: [SHAPE],
        problem=lambda shape, device: Problem(shape, device, {"x": torch.randn(shape.values["n"])}),
        exact=lambda p: Exact({"value": p.inputs["x"].double().square().sum(), "x": 2 * p.inputs["x"].double()}),
        work=lambda problem, mode: (2.0 * 8, 4.0 * 8),
        providers=providers,
    )  # fmt: skip


EAGER = Provider("eager", "eager", square())
