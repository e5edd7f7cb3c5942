"""Micro-batched, replicated and sharded: the gradients of every system are those of one process with the whole batch, in float64."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.systems.small import MAKERS, SAMPLES, make, whole
from tests.systems.two_ranks import follow, runs_of, train

ROOT = Path(__file__).parent.parent.parent


def plain(name: str, steps: int = 2):
    """Autograd alone: encode and objective of the whole batch, nothing of the engine."""
    system = make(name)
    batch = dataclasses.replace(whole(), counts=system.counts(whole()))
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        out = system.encode(batch)
        sum(system.objective(out, batch).values()).backward()
        found = {key: p.grad.clone() for key, p in system.named_parameters() if p.grad is not None}
        optimizer.step()
        follow(system, {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in out.items()}, batch)
    return found, system.state_dict()


@pytest.fixture(scope="module")
def reference():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: plain(name) for name in MAKERS}
    torch.set_num_threads(before)


def same(found, expected) -> None:
    """Within 1e-12 of the largest entry of each tensor; what has no gradient is compared as zeros."""
    for got, want in zip(found, expected, strict=True):
        for name in {**got, **want}:
            a, b = (side.get(name) for side in (got, want))
            a, b = (torch.zeros_like(other) if side is None else side for side, other in ((a, b), (b, a)))
            scale = b.nan_to_num(neginf=0.0).abs().max().clamp_min(1e-3) if b.is_floating_point() else 1
            assert ((a == b) | ((a - b).abs() <= 1e-12 * scale)).all(), f"{name}: {(a - b).abs().max():.1e} of {scale:.1e}"


@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches(name, reference):
    system = make(name)
    batch = dataclasses.replace(whole(), counts=system.counts(whole()))
    assert len(batch) == SAMPLES
    same(train(system, batch, 3), reference[name])


def test_two_processes(reference, tmp_path):
    """One start of two processes for all systems and ways, which costs more than they do."""
    target = tmp_path / "found.pt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1",
                   "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.systems.two_ranks",
               str(target), *MAKERS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr.partition("ChildFailedError")[0][-6000:]
    found, wrong = torch.load(target), []
    for name in MAKERS:
        for run in runs_of(name):
            try:
                same(found[name, run], reference[name])
            except AssertionError as error:
                wrong.append(f"{name}, {run}: {error}")
    assert not wrong, "\n".join(wrong)
