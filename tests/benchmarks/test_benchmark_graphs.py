"""CUDA graphs, with stand-ins for a device: what is captured, what is said where it is not, and that a failed capture ends the attempts."""

import contextlib

import pytest
import torch
from toys import EAGER, SHAPE, square, toy

from benchmarks import __main__ as command_line
from benchmarks import graphs, measure, report, run
from benchmarks.registry import Provider, Task

CPU = torch.device("cpu")
BUDGET = measure.Budget(0, 2, 2)
OURS = Provider("ours", "ours", square())


class Device:
    """torch.cuda's streams and graphs: a capture records the call, a replay repeats it."""

    def __init__(self, monkeypatch):
        self.mode, self.capturing, self.replays, self.refuses = "default", False, 0, False
        device = self

        class Graph:
            def replay(self):
                device.replays += 1

        class Stream:
            def wait_stream(self, other): ...
            def synchronize(self): ...

        @contextlib.contextmanager
        def graph(of):
            device.capturing = True
            yield
            device.capturing = False
            if device.refuses:
                raise RuntimeError("operation failed due to a previous error during capture\nand more")

        fakes = {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(), "CUDAGraph": Graph,
                 "graph": graph, "set_sync_debug_mode": lambda mode: setattr(device, "mode", mode)}  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def rows(*names, ms=1.0):
    return {"op": "toy", "rows": [{"provider": name, "shape": SHAPE.name, "mode": "forward", "p50_ms": ms} for name in names]}


def waiting(device):
    def build(problem):
        def forward():
            if device.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            assert not device.capturing, "what waits must not be captured"
            return torch.zeros(())

        return Task(forward, {})

    return Provider("waits", "rival", build)


def test_short_calls_get_a_second_time_and_who_waits_for_the_device_a_note(device):
    said, result = [], rows("ours", "eager", "waits")
    assert graphs.add(toy(OURS, EAGER, waiting(device)), result, CPU, BUDGET, said.append)
    ours, eager, waits = result["rows"]
    assert ours["graph_ms"] > 0 and eager["graph_ms"] > 0 and "graph_ms" not in waits
    assert waits["graph_note"] == "waits for the device: fails: RuntimeError: called a synchronizing CUDA operation"
    assert device.replays == 2 * (1 + BUDGET.min_rounds) and device.mode == "default"
    assert sum("as a CUDA graph" in text for text in said) == 2


def test_long_calls_stay_as_they_are(device):
    result = rows("ours", ms=graphs.LONGEST_MS)
    assert graphs.add(toy(OURS, EAGER), result, CPU, BUDGET, pytest.fail) and "graph_ms" not in result["rows"][0]


def test_a_failed_capture_is_named_and_the_last(device, monkeypatch, tmp_path):
    device.refuses, said, result = True, [], rows("ours", "eager")
    assert not graphs.add(toy(OURS, EAGER), result, CPU, BUDGET, said.append)
    assert result["rows"][0]["graph_note"] == "not captured: fails: RuntimeError: operation failed due to a previous error during capture"
    assert "graph_note" not in result["rows"][1] and "no more graphs are tried" in said[-1]

    # The command measures and writes every operator first.
    events = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "find", lambda op: op)
    monkeypatch.setattr(command_line, "run_case", lambda op, *rest: events.append(f"plain {op}") or {"op": op})
    monkeypatch.setattr(command_line, "write", lambda result, out: events.append(f"write {result['op']}"))
    monkeypatch.setattr(graphs, "add", lambda op, *rest: events.append(f"graph {op}"))
    command_line.main(["run", "--op", "maxsim", "--op", "towers", "--device", "cuda", "--out", str(tmp_path)])
    assert events == ["plain maxsim", "write maxsim", "plain towers", "write towers", "graph maxsim", "write maxsim"]


def test_a_file_and_a_table_say_that_it_is_a_graph():
    assert {"graph_ms", "graph_note"} < set(run.COLUMNS)
    row = {"p50_ms": 0.25, "provider": "fastvlp triton"}
    assert report._ms(row | {"graph_ms": 0.125}, name=True) == "0.25 (triton), 0.125 as a CUDA graph"
    assert report._ms(row) == "0.25"
