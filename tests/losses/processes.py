"""Processes that wait for work, so that many tests share the seconds that it takes to start them."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Failed:
    """What a process raised instead of answering: the name of its class, its message, and the traceback."""

    kind: str
    message: str
    trace: str


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        function, rank, size, store, timeout, arguments = task
        try:
            pipe.send(_in_group(function, rank, size, store, timeout, arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test that asked for it sees it
            pipe.send(Failed(type(error).__name__, str(error), traceback.format_exc()))


def _in_group(function: Callable[..., Any], rank: int, size: int, store: str, timeout: float, arguments: Sequence[Any]) -> Any:
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
    try:
        return function(rank, size, *arguments)
    finally:
        dist.destroy_process_group()


class Processes:
    """Up to ``count`` processes on one machine that speak gloo."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self._folder = tempfile.TemporaryDirectory()
        self._pipes = [mine for mine, _ in pairs]
        self._workers = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
        self._groups = 0
        for worker in self._workers:
            worker.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
        """``function(rank, size, *arguments)`` in the first ``size`` living processes, a new group with this timeout in seconds.

        Returns:
            One result per rank: what the function returned, a ``Failed``, or None of a process that died.
        """
        store = Path(self._folder.name) / str(self._groups)
        self._groups += 1
        pipes = self._pipes[:size]
        for rank, pipe in enumerate(pipes):
            pipe.send((function, rank, size, os.fspath(store), timeout, arguments))
        return [self._answer(pipe) for pipe in pipes]

    def results(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``run``, where nobody may fail."""
        answers = self.run(size, function, *arguments)
        for answer in answers:
            if isinstance(answer, Failed):
                raise AssertionError(answer.trace)
        return answers

    def _answer(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except EOFError:
            self._pipes.remove(pipe)
            return None

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # it died after its last answer
                pipe.send(None)
        for worker in self._workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()
        self._folder.cleanup()
