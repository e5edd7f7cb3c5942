"""What a benchmark case is, and which cases there are."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["forward", "forward+backward"]
Kind = Literal["ours", "eager", "compiled", "rival"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """One size of a case; ``name`` is what the tables show and what finds the size again in another process."""

    name: str
    dtype: torch.dtype
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """The random inputs of one case at one shape. ``facts`` go into the result file, such as a token ratio."""

    shape: Shape
    device: torch.device
    inputs: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What one provider does with a problem.

    ``forward`` returns one tensor; ``leaves`` are the tensors that gradients are taken of, by the name that the exact
    results use; ``upstream`` is the gradient of the output (None for a scalar). ``canonical`` brings the output ("value")
    and the gradients into the layout of the exact results.
    """

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    upstream: Tensor | None = None
    canonical: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda results: results


@dataclass(frozen=True)
class Exact:
    """The value and the gradients in float64, by name.

    An error is relative to the norm of the result, or, for the names in ``terms``, to the size of the terms that the result sums: a
    sum whose terms nearly cancel cannot be better than the rounding of its terms. ``undecided``: by how much of its norm a gradient may be
    another one that is as right, because rounding decides a tie in float32.
    """

    results: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)
    undecided: dict[str, float] = field(default_factory=dict)


class InapplicableError(Exception):
    """A provider or this machine has nothing to measure at one size; the message says why in a few words."""


def always(device: torch.device) -> str:
    """Nothing is in the way."""
    return ""


@dataclass(frozen=True)
class Provider:
    """Somebody who computes the case. ``why_not(device)`` is empty where it can run, else the reason in a few words.

    ``work`` replaces the case's, for a provider that trades memory for work. ``same_function=False`` marks a provider that does
    comparable work with weights of its own, so that its results cannot be compared.
    """

    name: str
    kind: Kind
    build: Callable[[Problem], Task]
    distribution: str = "torch"
    why_not: Callable[[torch.device], str] = always
    same_function: bool = True
    work: Callable[[Problem, Mode], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Case:
    """One benchmark: problems, the exact answer, who computes it, and the least work that it takes.

    ``work(problem, mode)`` returns (floating-point operations, bytes read and written) that any implementation needs.
    ``limit`` says the least work in words.
    """

    op: str
    about: str
    formula: str
    limit: str
    shapes: Callable[[str, bool], Sequence[Shape]]
    problem: Callable[[Shape, torch.device], Problem]
    exact: Callable[[Problem], Exact]
    work: Callable[[Problem, Mode], tuple[float, float]]
    providers: Sequence[Provider]
    modes: Sequence[Mode] = MODES

    def find_shape(self, name: str, device: str) -> Shape:
        """The shape of that name, of the full or of the quick list."""
        return next(shape for quick in (False, True) for shape in self.shapes(device, quick) if shape.name == name)

    def find_provider(self, name: str) -> Provider:
        """The provider of that name."""
        return next(provider for provider in self.providers if provider.name == name)


OPS = (
    "similarity_logsumexp", "pairwise_sigmoid", "similarity_attend", "similarity_topk", "maxsim", "linear_cross_entropy",
    "packed_attention", "residual_norm", "bias_activation", "grouped_linear", "token_merge", "token_select", "segment_pool",
    "patch_embed", "bi_wkv", "matryoshka", "objectives", "towers", "merging", "accelerate",
)  # fmt: skip
ENDS = ("mini", "ladder", "scaling", "quality")
EXTRAS = {"flash_attn": "attention", "xformers": "attention", "triton": "cuda", "cupy": "cuda"}  # others: bench


def suggest(got: str, allowed: Sequence[str], what: str) -> str:
    """The sentence for a name that is not among ``allowed``."""
    near = difflib.get_close_matches(got, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}{hint} (there are: {', '.join(allowed)})"


def find(op: str) -> Case:
    """The case of an operator.

    Raises:
        KeyError: there is none of that name; the message says which there are.
    """
    if op not in OPS:
        raise KeyError(suggest(op, OPS, "operator"))
    case: Case = importlib.import_module(f"benchmarks.cases.{op}").CASE
    return case


def needs(package: str, cuda: bool = False) -> Callable[[torch.device], str]:
    """A ``why_not`` for a provider that lives in an import package."""

    def why_not(device: torch.device) -> str:
        if cuda and device.type != "cuda":
            return "needs a CUDA device"
        if importlib.util.find_spec(package) is not None:
            return ""
        if package.startswith("torch."):
            return f"needs a newer torch, with {package}"
        return f"not installed; pip install 'fastvlp[{EXTRAS.get(package, 'bench')}]'"

    return why_not


def needs_compiler(device: torch.device) -> str:
    """A ``why_not`` for torch.compile, which calls a C++ compiler on CPUs and Triton on GPUs."""
    if device.type == "cuda":
        return needs("triton")(device)
    return "" if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler"
