"""Where the time of the training thread goes, by name; recorded only while somebody asks (``fastvlp profile --steps``)."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, cast

import torch
from torch import distributed as dist

DATA, COPY, FORWARD, BACKWARD = "waiting for data", "copy to the device", "forward", "backward"
UPDATE, PROCESSES, DEVICE = "clipping and optimizer", "waiting for other processes", "waiting for the device"
LOGGING, CHECKPOINT = "logging", "checkpoint"


class Recorder:
    """The seconds of each step by the name of the span that they passed in; what passed in none has the name "".

    Only the thread that made it is watched. A step begins where it waits for data. What passes in a span inside another counts for the
    inner one. Nothing waits for a device: there, spans are the time in which work is given to it.

    Attributes:
        steps: in order. on_step: called with the number of each step as it begins, from 0.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.on_step: Callable[[int], object] = lambda number: None
        self._thread, self._open, self._last = threading.get_ident(), [""], perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        self._count()
        if name == DATA:
            self.on_step(len(self.steps))
            self.steps.append(defaultdict(float))
            self._last = perf_counter()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        now = perf_counter()
        if self.steps:
            self.steps[-1][self._open[-1]] += now - self._last
        self._last = now


_recorder: Recorder | None = None


def span(name: str) -> AbstractContextManager:
    """What passes inside is recorded under this name, where somebody records."""
    return nullcontext() if _recorder is None else _recorder.span(name)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record this thread's spans; whatever waits for other processes is one.

    On a GPU only collectives between hosts make the thread wait; NCCL's make the device wait.
    """
    global _recorder
    found = _recorder = Recorder()
    wait = dist.Work.wait if dist.is_available() else None

    def waits(work: Any, *args: Any, **keywords: Any) -> Any:
        assert wait is not None
        with found.span(PROCESSES):
            return wait(work, *args, **keywords)

    try:
        if wait is not None:  # torch has no hook for it, and every collective of Python's ends here, FSDP's too
            dist.Work.wait = cast(Any, waits)  # type: ignore[method-assign]  # put back below
        yield found
    finally:
        _recorder = None
        if wait is not None:
            dist.Work.wait = wait  # type: ignore[method-assign]  # what it was
