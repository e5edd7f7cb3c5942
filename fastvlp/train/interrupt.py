"""Signals as a request that the training loop meets between two steps, and an end to waiting for ever."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; a scheduler's end; a closed terminal; the warnings that clusters send before they take a machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """Training stopped on a signal after it wrote a checkpoint."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """While entered, the first signal of ``SIGNALS`` is kept in ``signum``; the second ends the process at once with status 128 + number.

    Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loading process that inherited this handler: its parent decides on all but SIGTERM
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self.signum:
            end(128 + signum)
        self.signum = signum
        say(f"{signal.Signals(signum).name} heard: stopping with a checkpoint after this step; once more stops at once")


class Watchdog:
    """Ends the process when nothing has happened for ``timeout`` seconds, with the stacks of all its threads: nobody waits for ever.

    A process that was told to stop and hangs has ``grace`` seconds. The other processes of a run notice by the same clock, or by the
    connection that closes.
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
        while not self._over.wait(min(1.0, self.timeout / 4)):
            idle = time.monotonic() - self._last
            limit = self.grace if self.stop.signum else self.timeout
            if idle > limit:
                say(f"fastvlp: error: nothing has happened for {idle:.0f} s while {self._what} (run.timeout={self.timeout:g}); "
                    "the last whole checkpoint stays, the same command continues from it; where every thread waits:")
                faulthandler.dump_traceback(all_threads=True)
                end(128 + self.stop.signum if self.stop.signum else 1)


def say(text: str) -> None:
    """A line on stderr, from a signal handler or a thread too; a terminal that is gone is no error."""
    try:
        os.write(2, f"{text}\n".encode(errors="replace"))
    except OSError:
        return


def end(status: int) -> None:
    """Leave at once, and take the loading processes along."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout = sys.stderr  # nothing buffered may block on a pipe that nobody reads
    os._exit(status)
