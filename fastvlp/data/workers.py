"""Processes that read ahead, and the end of one that a file of strangers keeps busy."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from fastvlp.data.images import Unusable

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
BUDGET = 60.0  # seconds of the processor for one sample; honest ones take a few at most
CRASHED = "decoder crashes on it"
REASONS = {-signal.SIGPROF: "takes too long to decode",
           **{-number: CRASHED for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)}}  # by exit code
POLL = 1.0  # seconds after which a worker that died is noticed


class Guard:
    """Knows what each worker reads just now, and gives up what costs a worker its life.

    The kernel ends a worker that reads one sample for longer than ``seconds`` of the processor: no decoder has to return for that. Outside
    of workers nothing is ended, since nobody could take over.

    Attributes:
        lost: the reason why a sample (its place: source, shard, member) was given up.
    """

    def __init__(self, seconds: float = BUDGET) -> None:
        self.seconds = seconds
        self.lost: dict[tuple[int, int, int], str] = {}
        self._table = torch.zeros(0, 4, dtype=torch.int64)
        self._mine: np.ndarray | None = None

    def watch(self, workers: int) -> None:
        """In the parent: make room for what the workers say (process, place) in memory that all see."""
        self._table = torch.full((workers, 4), -1, dtype=torch.int64).share_memory_()

    def begin(self, worker: int) -> None:
        """In a worker, before it reads anything."""
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        self._mine = self._table[worker].numpy()
        self._mine[0] = os.getpid()

    @contextmanager
    def reading(self, *place: int) -> Iterator[None]:
        """Read the sample at (source, shard, member) inside of this context.

        Raises:
            Unusable: it was given up before.
        """
        if place in self.lost:
            raise Unusable(self.lost[place])
        if self._mine is None:
            yield
            return
        before = self._mine[1:].copy()  # a sample may read another one
        self._mine[1:] = place
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            yield
        finally:
            self._mine[1:] = before
            signal.setitimer(signal.ITIMER_PROF, self.seconds if before[0] >= 0 else 0)

    def give_up(self, died: Iterable[BaseProcess]) -> bool:
        """In the parent: whether what some dead workers read explains their end; it is lost from now on."""
        found = False
        for process in died:
            reason = REASONS.get(process.exitcode or 0)
            for row in self._table[self._table[:, 0] == process.pid].tolist():
                if reason is not None and row[1] >= 0:
                    self.lost[row[1], row[2], row[3]] = reason
                    found = True
        return found


def from_workers(data: Dataset[T], requests: Iterable[Any], workers: int, guard: Guard | None = None, *, pin_memory: bool = False,
                 timeout: float = 0) -> Iterator[T]:
    """``data[request]`` of each request in turn, from processes that end when the iterator does, even those that hang.

    What a whole group of processes is sent is for the process that reads, which stops the workers when it has written what it must; they
    ignore it from their first instruction on.

    Args:
        guard: the one that ``data`` reads its samples with; when a sample has cost a worker its life, others take over, and it is lost.
        timeout: seconds to wait for a worker, 0 for ever.

    Raises:
        RuntimeError: a worker died, raised, or did not answer within ``timeout``.
    """
    left, sent = iter(requests), deque[Any]()

    def handed_out() -> Iterator[Any]:
        yield from tuple(sent)  # what dead workers took along
        for request in left:
            sent.append(request)
            yield request

    guard = guard or Guard()
    while (yield from _until_lost(data, handed_out(), sent, workers, guard, pin_memory, timeout)):
        pass


def _until_lost(data: Dataset[T], requests: Iterable[Any], sent: deque[Any], workers: int, guard: Guard, pin_memory: bool,
                timeout: float) -> Generator[T, None, bool]:
    """What one set of workers reads; returns whether the guard gave a sample up, so that others have to go on."""
    guard.watch(workers)
    others = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: a worker unblocks them when it ignores them
    try:
        loaded: Any = iter(DataLoader(data, batch_size=None, sampler=requests, num_workers=workers, collate_fn=_as_is,
                                      worker_init_fn=functools.partial(_begin, guard), pin_memory=pin_memory, timeout=POLL))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # Else torch raises wherever the main thread is when a worker dies, and not where its batch is waited for.
    _remove_worker_pids(id(loaded))
    loaded._worker_pids_set = False
    started = set(multiprocessing.active_children()) - others
    try:
        while True:
            try:
                read = _next(loaded, timeout)
            except StopIteration:
                return False
            except (ConnectionError, EOFError, RuntimeError) as error:  # the first two: it died as it handed its memory over
                if not isinstance(error, RuntimeError):
                    wait([worker.sentinel for worker in started], POLL)
                died = [worker for worker in started if worker.exitcode]
                if guard.give_up(died):
                    return True
                if isinstance(error, RuntimeError) and not died:
                    raise
                how = ", ".join(_end(worker.exitcode) for worker in died) or type(error).__name__
                raise RuntimeError(f"DataLoader worker exited unexpectedly ({how})") from error
            sent.popleft()
            yield read
    finally:
        loaded._shutdown_workers()  # before they are killed, which it would report as an error
        for worker in started:
            worker.kill()  # one that hangs


def _next(loaded: Iterator[T], timeout: float) -> T:
    began = time.monotonic()
    while True:
        try:
            return next(loaded)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if timeout and time.monotonic() - began > timeout:
                raise RuntimeError(f"DataLoader timed out after {timeout:g} seconds") from error


def _end(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _begin(guard: Guard, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    guard.begin(worker)


def _as_is(read: T) -> T:
    return read
