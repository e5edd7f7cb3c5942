"""Signals as a request that the training loop meets between two steps, and an end to waiting for ever."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

# Ctrl-C; a scheduler's end; a closed terminal; the warnings that clusters send before they take a machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME = 5.0  # seconds in which a signal that comes again is the same one: from the scheduler to all, and from a busy torchrun once more

T = TypeVar("T")


class Interrupted(Exception):
    """Training stopped on a signal; its work is in a checkpoint."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class _Stopped(BaseException):
    """Raised where the main thread waits, by the handler of a signal; caught where the waiting began."""


class StopRequest:
    """While entered, the first signal of ``SIGNALS`` is kept in ``signum``; a second one ends the process at once with status 128 + number.

    A thread of its own answers, so that both are heard while the main one is inside of a compiler or waits for another process. Only
    Ctrl-C counts as a second one at once; others are often sent twice, and count five seconds after the first.

    Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}
        self._wakeup = -1
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._interruptible = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            # Python runs a handler only between bytecodes of the main thread, which may sit in a collective; this thread always hears.
            self._thread = threading.Thread(target=self._listen, args=(self._ends[0],), name="fastvlp-signals", daemon=True)
            self._thread.start()
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._receive)
            # C code writes the number of each signal here, whatever Python's main thread is doing.
            self._wakeup = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ends is None or self._thread is None:
            return
        signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._ends[1].shutdown(socket.SHUT_WR)  # ends the thread, even if a child has the socket, too
        self._thread.join()
        for end in self._ends:
            end.close()

    def waiting(self, act: Callable[[], T]) -> T | None:
        """What ``act`` gives, or None when a signal comes meanwhile: for waits that may never end."""
        try:
            self._interruptible = True
            return None if self.signum else act()
        except _Stopped:
            return None
        finally:
            self._interruptible = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        if self._interruptible:
            self._interruptible = False
            raise _Stopped

    def _listen(self, end: socket.socket) -> None:
        first = 0.0
        while data := end.recv(64):
            for signum in data:
                now = time.monotonic()
                if signum not in SIGNALS:
                    continue
                if not first:
                    first, self.signum = now, self.signum or signum
                    say(f"{signal.Signals(signum).name} heard: stopping with a checkpoint after this step; once more stops at once")
                elif signum == signal.SIGINT or now - first > SAME:
                    end_at_once(128 + signum)


def _forget_in_child() -> None:
    """A loading process must not write its signals to its parent's thread."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


class Watchdog:
    """Ends the process when nothing has happened for ``timeout`` seconds, with the stacks of all its threads: nobody waits for ever.

    A process that was told to stop and hangs has ``grace`` seconds. The other processes of a run notice by the same clock, or by the
    connection that closes. Time in which the process itself was stopped does not count.
    """

    def __init__(self, timeout: float, stop: StopRequest, grace: float = 60.0) -> None:
        self.timeout, self.stop, self.grace = timeout, stop, min(grace, timeout)
        self._last = time.monotonic()
        self._what = "starting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastvlp-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def doing(self, what: str) -> None:
        """Something has happened, and this comes next."""
        self._last, self._what = time.monotonic(), what

    def _watch(self) -> None:
        period = min(1.0, self.timeout / 4)
        before = time.monotonic()
        while not self._over.wait(period):
            now = time.monotonic()
            if now - before > 2 * period + 5:  # SIGSTOP, or a machine that slept
                self._last += now - before
            before = now
            idle, limit = now - self._last, self.grace if self.stop.signum else self.timeout
            if idle > limit:
                say(f"fastvlp: error: nothing has happened for {idle:.0f} s while {self._what} (run.timeout={self.timeout:g}); "
                    "the last whole checkpoint stays, the same command continues from it; where every thread waits:")
                for line in stacks():
                    say(line)
                end_at_once(128 + self.stop.signum if self.stop.signum else 1)


def stacks() -> Iterator[str]:
    """Where every thread of this process is; the source, which may lie on what hangs, is not read."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in sys._current_frames().items():
        yield f"{names.get(ident, 'a thread')}, innermost last:"
        frames, frame = list[str](), top
        while frame is not None:
            frames.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        yield from reversed(frames)


def writable(descriptor: int) -> bool:
    """Whether a line can be written now without waiting for somebody to read it."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))


def say(text: str) -> None:
    """A line on stderr, from any thread; a terminal that is gone or that nobody reads is no error."""
    try:
        if writable(2):
            os.write(2, f"{text}\n".encode(errors="replace"))
    except OSError:
        return


def end_at_once(status: int) -> None:
    """Leave, and take the loading processes along."""
    # os._exit runs nothing that would end them, and they hold the shards and the memory.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


@contextmanager
def standard_descriptors() -> Iterator[None]:
    """Numbers 0 to 2 belong to no file of ours: where they are closed (``>&-``), what is printed would land in a checkpoint."""
    opened = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened.append(os.open(os.devnull, os.O_RDWR))  # takes the lowest number that is free
    try:
        yield
    finally:
        for number in opened:
            os.close(number)
