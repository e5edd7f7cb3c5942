"""The system calls that change what lies below a folder: counted, and one of them made to fail, or to be the last."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

CRASH, NO_SPACE, BROKEN_DISK = "crash", "ENOSPC", "EIO"
FAULTS = (CRASH, NO_SPACE, BROKEN_DISK)
CRASHED = 137  # exit status of a process that was made to crash, as of one that was killed
_PATHS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "open", "fsync")


class Calls:
    """What was called so far, (name, path) of each call; at number ``at``, from 1, the ``fault`` happens.

    An error comes instead of the call. A crash comes in the middle of it: of what was to be written, half is.
    """

    def __init__(self, folder: Path, at: int | None, fault: str) -> None:
        self.folder, self.at, self.fault = os.path.realpath(folder), at, fault
        self.made: list[tuple[str, str]] = []
        self._alone = threading.Lock()

    def about_to(self, name: str, place: Any, half: Callable[[], object] = lambda: None) -> None:
        """A call that changes ``place`` is about to be made."""
        path = self.below(place)
        if path is None:
            return
        with self._alone:
            self.made.append((name, path))
            if len(self.made) != self.at:
                return
        half()
        if self.fault == CRASH:
            os._exit(CRASHED)
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number), path)

    def below(self, place: Any) -> str | None:
        """The path of a file, or of what a descriptor has open, if it lies below the folder."""
        with contextlib.suppress(OSError, TypeError):
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.path.abspath(os.fspath(place))
            whole = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            return whole if whole.startswith(self.folder) else None
        return None


class _File(io.FileIO):
    """A file whose writes and whose end are counted."""

    calls: Calls

    def write(self, data: Any) -> int:
        self.calls.about_to("write", self.fileno(), lambda: super(_File, self).write(bytes(data)[: memoryview(data).nbytes // 2]))
        return super().write(data)

    def close(self) -> None:
        if not self.closed:
            descriptor = self.fileno()
            try:
                self.calls.about_to("close", descriptor)
            finally:
                super().close()


@contextlib.contextmanager
def faults(folder: Path, at: int | None = None, fault: str = CRASH) -> Iterator[Calls]:
    """Inside of this context the calls of Python's own file functions are counted; writes that C++ or Rust makes are not seen."""
    calls, plain, opened = Calls(folder, at, fault), {name: getattr(os, name) for name in _PATHS}, io.open
    kind = type("_Counted", (_File,), {"calls": calls})

    def counted(name: str) -> Callable[..., Any]:
        def call(place: Any, *rest: Any, **options: Any) -> Any:
            at_folder = options.get("dir_fd")
            whole = place if at_folder is None else os.path.join(os.readlink(f"/proc/self/fd/{at_folder}"), os.fspath(place))
            calls.about_to(name, whole)
            return plain[name](place, *rest, **options)

        return call

    def open_counted(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
                     closefd: bool = True, opener: Any = None) -> Any:
        if not set(mode) & set("wax") or isinstance(file, int) or calls.below(file) is None:
            return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
        calls.about_to("open", file)
        raw = kind(os.fspath(file), mode.replace("b", "").replace("t", ""))
        if "b" in mode:
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)

    with contextlib.ExitStack() as patches:
        for name in _PATHS:
            patches.enter_context(mock.patch.object(os, name, counted(name)))
        patches.enter_context(mock.patch.object(io, "open", open_counted))
        patches.enter_context(mock.patch.object(builtins, "open", open_counted))
        yield calls
