"""Processes that read ahead: how they end, and what they do not hear."""

import os
import re
import signal
import time

import pytest

from fastvlp.data.headers import Unusable
from fastvlp.data.workers import Guard, from_workers


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


def burn():
    """Never returns, keeps the interpreter's lock and hears no signal that Python handles: the worst that a decoder could do."""
    re.match("(a|a)+$", "a" * 60 + "b")


class Strange:
    """Samples of which one is never done, one crashes, and one reads another that is never done."""

    def __init__(self):
        self.guard = Guard(seconds=0.5)
        self.bad = {3: burn, 4: os.abort, 8: lambda: os.kill(os.getpid(), signal.SIGSEGV)}

    def __getitem__(self, number):
        try:
            with self.guard.reading(0, 7, number):
                if number == 9:
                    with self.guard.reading(0, 7, 0):
                        pass
                    burn()
                self.bad.get(number, int)()
        except Unusable as reason:
            return number, str(reason)
        return number, ""


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sample_that_costs_a_worker_its_life_is_given_up_and_others_take_over(workers):
    strange = Strange()
    found = dict(from_workers(strange, range(12), workers, strange.guard))
    crash, long = "decoder crashes on it", "takes too long to decode"
    assert list(found) == list(range(12))
    assert {number: said for number, said in found.items() if said} == {3: long, 4: crash, 8: crash, 9: long}
    assert strange.guard.lost == {(0, 7, 3): long, (0, 7, 4): crash, (0, 7, 8): crash, (0, 7, 9): long}


def test_time_is_the_processor_s_and_each_sample_has_its_own():
    """A slow disk is no hostile file, and a batch of many honest samples may take long."""
    class Honest:
        guard = Guard(seconds=0.4)

        def __getitem__(self, number):
            with self.guard.reading(0, 0, number):
                time.sleep(0.6)
            for part in range(6):
                with self.guard.reading(0, 0, 100 + part):
                    until = time.process_time() + 0.1
                    while time.process_time() < until:
                        pass
            return number

    honest = Honest()
    assert list(from_workers(honest, range(2), 1, honest.guard)) == [0, 1] and not honest.guard.lost


def test_a_worker_that_is_killed_otherwise_is_no_sample_s_fault():
    """By the kernel, for memory: which process was the one is chance."""
    class Killed:
        guard = Guard()

        def __getitem__(self, number):
            with self.guard.reading(0, 0, number):
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"DataLoader worker exited unexpectedly \(killed by SIGKILL\)"):
        next(from_workers(Killed(), [0], 1, Killed.guard))
    assert not Killed.guard.lost


def test_in_a_process_that_is_no_worker_nothing_is_ended():
    guard = Guard(seconds=0.01)
    with guard.reading(0, 0, 0):
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
