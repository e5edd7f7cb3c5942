"""A tiny training of which one system call fails, or is the last before a crash: it says so, and goes on to the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import forkserver
from benchmarks.soak import training
from benchmarks.soak.system_calls import CRASH, CRASHED, FAULTS

REFUSALS = ("fastvlp.train.step.TrainingError: ", "fastvlp._schema.ConfigError: ", "fastvlp.train.checkpoint.CheckpointError: ")


def case(seed: int, folder: Path, device: torch.device) -> int:
    """One training whose writing is disturbed once, at a call and in a way of the seed, and which is started again; 1.

    Raises:
        AssertionError: it ended otherwise than by the crash or in a sentence, did not go on, or ended with other weights.
    """
    draw = random.Random(seed)
    whole, parts = training.settings(seed, folder, "whole"), training.settings(seed, folder, "parts")
    training.train(whole)
    calls = int((folder / "whole.calls").read_text())
    at, fault = draw.randint(1, calls), draw.choice(FAULTS)
    what = f"{fault} at system call {at} of {calls}"
    code, said = _disturbed({**parts, "fault": (at, fault)})
    if fault == CRASH:
        assert code == CRASHED, f"{what}: exit code {code}\n{said[-2000:]}"
    else:  # 0: what failed did not matter, such as a folder that was there
        assert code == 0 or (code == 1 and said.strip().splitlines()[-1].startswith(REFUSALS)), f"{what}: exit code {code}\n{said[-2000:]}"
    training.train(parts)
    training.compare(folder, f"{what}:")
    return 1


def _disturbed(values: dict[str, Any]) -> tuple[int | None, str]:
    output = Path(values["folder"] + ".disturbed.txt")
    process = forkserver().Process(target=training.run, args=(values, str(output)), daemon=True)
    process.start()
    process.join(training.PATIENCE)
    hung = process.is_alive()
    process.kill()
    process.join()
    said = output.read_text(encoding="utf-8") if output.exists() else ""
    return (None if hung else process.exitcode), said
