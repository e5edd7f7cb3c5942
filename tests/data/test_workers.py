"""Processes that read ahead: how they end, and what they do not hear."""

import os
import signal
import time

import pytest

from fastvlp.data.workers import from_workers


def _reset():
    raise ConnectionResetError(104, "Connection reset by peer")


class Unreachable:
    """Arrives as memory does whose owner has died meanwhile."""

    def __reduce__(self):
        return _reset, ()


class Slow:
    """Reading as a worker does that hears nothing of a stop."""

    def __getitem__(self, request):
        time.sleep(600)


def test_all_in_their_order():
    assert list(from_workers([number ** 2 for number in range(20)], range(19, -1, -1), 3)) == [n ** 2 for n in range(19, -1, -1)]


def test_a_worker_that_dies_while_it_hands_over():
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly"):
        next(from_workers([Unreachable()], [0], 1))


def test_signals_to_the_group_are_not_for_a_worker_that_just_starts():
    """Each is sent before the worker has run anything of ours: to a process that inherits what a fork finds."""
    children = []
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM) if os.getppid() == parent else None)
    parent = os.getpid()
    try:
        children.extend(from_workers([1, 2, 3], [0, 1, 2], 2))
    finally:
        parent = 0
    assert children == [1, 2, 3] and not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_that_hangs_is_waited_for_no_longer_than_said():
    read, before = from_workers(Slow(), [0], 1, timeout=1), time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        next(read)
    assert time.monotonic() - before < 60
