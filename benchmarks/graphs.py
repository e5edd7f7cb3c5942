"""CUDA graphs of the calls that are short enough to feel their launches, as a second time beside that of plain launches.

They come after everything else has been measured and written, because a capture that fails can leave PyTorch unable to go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import Budget, Clock, build, failure, percentile, results, sample
from benchmarks.registry import Case, Mode

LONGEST_MS = 10.0  # a longer call does not feel its launches, and a graph keeps all memory of its call
WARM_UP = 3


class WaitsError(Exception):
    """A call asks the device for an answer, which a graph cannot."""


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """What replays the call on the same memory.

    Raises:
        WaitsError: it cannot be captured, and nothing was tried. Anything else: the capture failed, and nothing more should be.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
        side.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            raise WaitsError(failure(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def add(case: Case, result: dict[str, Any], device: torch.device, budget: Budget, say: Callable[[str], None]) -> bool:
    """Write graph_ms, the median of replays, or graph_note, why there are none, into the rows of a result; False after a failed capture."""
    clock = Clock(device)
    groups: dict[tuple[str, Mode], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["shape"], row["mode"]), []).append(row)
    for (shape, mode), rows in groups.items():
        short = {row["provider"]: row for row in rows if row["p50_ms"] < LONGEST_MS}
        if not short:
            continue
        problem = case.problem(case.find_shape(shape, device.type), device)
        tasks, _ = build([case.find_provider(name) for name in short], problem)
        replays = {}
        for name, task in tasks.items():
            try:
                replays[name] = capture(functools.partial(results, task, mode))
            except WaitsError as error:
                short[name]["graph_note"] = f"waits for the device: {error}"
            except Exception as error:
                short[name]["graph_note"] = f"not captured: {failure(error)}"
                say(f"  {shape} {mode}: the graph of {name} was not captured, {failure(error)}; no more graphs are tried")
                return False
        for name, seconds in (sample(replays, clock, budget) if replays else {}).items():
            short[name]["graph_ms"] = 1e3 * percentile(seconds, 50)
            say(f"  {shape:<22} {mode:<17} {name:<14} {short[name]['graph_ms']:10.3f} ms as a CUDA graph")
    return True
