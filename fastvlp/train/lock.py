"""One writer to a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fastvlp._schema import ConfigError

NAME = ".lock"
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """A lock on a run's folder that dies with its process, on this machine and on file systems that share ``flock``.

    Raises:
        ConfigError: another process trains in the folder, or the folder cannot be written. OSError: the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        try:
            # Kept, so that a start that is refused removes only what it made.
            self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not "w": opening must not erase who holds it.
            self._file = (self.folder / NAME).open("a+")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise ConfigError(f"{error.filename or self.folder}: {error.strerror}; choose a run.dir that can be written") from error
        try:
            # The kernel lets go when the process dies, however it does; a file that only exists would outlive a SIGKILL.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(f"{self.folder} is in use: {holder} is training there; wait for it, stop it, or choose another "
                              "run.name") from None
        except OSError as error:
            self._file.close()
            raise ConfigError(f"{self.folder} is on a file system without locks ({error.strerror}): two runs could write there; choose a "
                              "run.dir on another one") from error
        _held.add(self)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        # At once, since whoever is refused next reads who holds it.
        self._file.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # a start that was refused leaves nothing: no folder with a lock alone
            if [path.name for path in self.folder.iterdir()] == [NAME]:
                (self.folder / NAME).unlink()
                self.folder.rmdir()
                for path in self._made[1:]:
                    path.rmdir()
        self._let_go()

    def _let_go(self) -> None:
        _held.discard(self)
        if self._file is not None:
            self._file.close()


def _forget() -> None:
    """A loading process inherits the open file, and with it the lock, which it would hold after its parent was killed."""
    for lock in list(_held):
        lock._let_go()


os.register_at_fork(after_in_child=_forget)
