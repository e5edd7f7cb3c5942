"""Processes that read ahead."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def from_workers(data: Dataset[T], requests: Iterable[Any], workers: int, pin_memory: bool = False, timeout: float = 0) -> Iterator[T]:
    """``data[request]`` of each request in turn, from processes that end when the iterator does, even those that hang.

    What a whole group of processes is sent is for the process that reads, which stops the workers when it has written what it must; they
    ignore it from their first instruction on.

    Args:
        timeout: seconds to wait for a worker, 0 for ever.

    Raises:
        RuntimeError: a worker died, raised, or did not answer within ``timeout``.
    """
    others = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: a worker unblocks them when it ignores them
    try:
        loaded = iter(DataLoader(data, batch_size=None, sampler=requests, num_workers=workers, collate_fn=_as_is,
                                 worker_init_fn=_ignore_signals, pin_memory=pin_memory, timeout=timeout))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    started = set(multiprocessing.active_children()) - others
    try:
        yield from loaded
    except (ConnectionError, EOFError) as error:  # it died between saying that a batch is ready and handing the memory over
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({type(error).__name__})") from error
    finally:
        loaded._shutdown_workers()  # type: ignore[attr-defined]  # before they are killed, which it would report as an error
        for worker in started:
            worker.kill()  # one that hangs


def _ignore_signals(worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _as_is(read: T) -> T:
    return read
