"""Processes that wait for work, so that many tests share the seconds that it takes to start them."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.processes import forkserver

# Seconds beyond a group's timeout in which every process of it has to answer.
GRACE = 60


@dataclass(frozen=True)
class Failed:
    """What a process raised instead of answering: the name of its class, its message, and the traceback."""

    kind: str
    message: str
    trace: str


def _serve(pipe: Connection, stacks: str) -> None:
    import torch

    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        while (task := pipe.recv()) is not None:
            try:
                pipe.send(_in_group(*task))
            except Exception as error:  # noqa: BLE001 - whatever it is, the test that asked for it sees it
                pipe.send(Failed(type(error).__name__, str(error), traceback.format_exc()))


def _in_group(function: Callable[..., Any], rank: int, size: int, store: str, timeout: float, arguments: Sequence[Any]) -> Any:
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
    try:
        return function(rank, size, *arguments)
    finally:
        gc.collect()  # a DDP module, which is a cycle, would keep the group alive beyond its destruction
        dist.destroy_process_group()


class _Worker:
    """One process, the pipe to it, and the file where it writes what its threads do when it is asked to."""

    def __init__(self, folder: str) -> None:
        context = forkserver()
        self.pipe, theirs = context.Pipe()
        handle, path = tempfile.mkstemp(dir=folder)
        os.close(handle)
        self.stacks = Path(path)
        self.process = context.Process(target=_serve, args=(theirs, path), daemon=True)
        self.process.start()
        theirs.close()

    def ask_for_stacks(self) -> str:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(1)
        return self.stacks.read_text()

    def end(self) -> None:
        """Politely, then not."""
        with contextlib.suppress(OSError):  # it has ended already
            self.pipe.send(None)
        self.process.join(20)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Processes:
    """Up to ``count`` processes on one machine that speak gloo. If one dies or hangs, its group is replaced for the next test."""

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._workers = [_Worker(self._folder.name) for _ in range(count)]
        self._groups = 0

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list[Any]:
        """``function(rank, size, *arguments)`` in the first ``size`` processes, a new group with this timeout in seconds.

        Returns:
            One result per rank: what the function returned, a ``Failed``, or None of a process that died.

        Raises:
            AssertionError: a process did not answer; the message says what its threads were doing.
        """
        store = Path(self._folder.name) / f"store-{self._groups}"
        self._groups += 1
        for rank, worker in enumerate(self._workers[:size]):
            worker.pipe.send((function, rank, size, os.fspath(store), timeout, arguments))
        deadline = time.monotonic() + timeout + GRACE
        answers, hung, broken = [], "", False
        for rank, worker in enumerate(self._workers[:size]):
            try:
                if worker.pipe.poll(max(0.0, deadline - time.monotonic())):
                    answers.append(worker.pipe.recv())
                    continue
                hung += f"rank {rank} of {size} gave no answer within {timeout + GRACE} s:\n{worker.ask_for_stacks()}\n"
            except (EOFError, ConnectionError):
                answers.append(None)
            broken = True
        if broken:
            for rank, worker in enumerate(self._workers[:size]):
                worker.kill()
                self._workers[rank] = _Worker(self._folder.name)
        if hung:
            raise AssertionError(hung)
        return answers

    def results(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``run``, where nobody may fail or die."""
        answers = self.run(size, function, *arguments)
        for rank, answer in enumerate(answers):
            if answer is None:
                raise AssertionError(f"rank {rank} of {size} died")
            if isinstance(answer, Failed):
                raise AssertionError(answer.trace)
        return answers

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()
        self._folder.cleanup()
