"""One live line about a run on a terminal; elsewhere a plain line every few seconds."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

import torch

from fastvlp.train.interrupt import writable


@dataclass(frozen=True)
class Rates:
    """What a step, or some, took.

    Attributes:
        seconds: in all. samples, tokens: over all processes. waited: seconds until the data was there.
        mfu: the share of the devices' matrix rate that the samples needed (``train.flops``).
    """

    seconds: float
    samples: int
    tokens: int
    waited: float = 0.0
    mfu: float = 0.0


class Progress:
    """Shows how far a run is.

    Args:
        total: steps of the whole run. every: seconds between plain lines when ``stream`` is no terminal.
    """

    def __init__(self, total: int, every: float, stream: TextIO | None = None, enabled: bool = True) -> None:
        self.total, self.every, self.enabled = total, every, enabled
        self.stream = stream or sys.stdout or io.StringIO()  # Python has no stdout where its descriptor was closed
        self.live = self.stream.isatty()
        self.rates: dict[str, float] = {}
        self.seconds_per_step = 0.0
        self._next = 0.0
        self._open = False

    def update(self, step: int, took: Rates, values: Mapping[str, float], note: str = "") -> None:
        """Count one finished step; writes at most ten times a second, or every ``every`` seconds.

        Args:
            values: loss first, then its terms by name, then what is not shown here (grad_norm, lr).
        """
        now = time.perf_counter()
        rates = {"samples": took.samples / took.seconds, "tokens": took.tokens / took.seconds, "step": took.seconds,
                 "waiting": took.waited / took.seconds, "mfu": took.mfu}
        for name, value in rates.items():
            # Smoothed over about ten steps: packed batches of pictures differ in work.
            self.rates[name] = value if name not in self.rates else 0.9 * self.rates[name] + 0.1 * value
        if not self.enabled or (now < self._next and step < self.total):
            return
        self._next = now + (0.1 if self.live else self.every)
        terms = " + ".join(f"{name} {shown(value)}" for name, value in values.items() if name not in ("loss", "grad_norm", "lr"))
        waiting = f"  {self.rates['waiting']:.0%} waiting for data" if self.rates["waiting"] > 0.05 else ""
        line = (f"step {step}/{self.total}  loss {shown(values['loss'])}{f' = {terms}' if terms else ''}  "
                f"{self.rates['samples']:.0f} samples/s  {human(self.rates['tokens'])} tokens/s  {self.rates['mfu']:.0%} MFU{waiting}  "
                f"{human(memory_in_use(), 'B')}  ETA {clock((self.total - step) * self.rates['step'])}{note}")
        if self.live:
            width = shutil.get_terminal_size().columns
            # Back to the start and clear to the end: a shorter line leaves nothing of a longer one, and a full one would wrap.
            self._write("\r\x1b[K" + line[: width - 1])
            self._open = True
        else:
            self._write(line + "\n")

    def say(self, text: str) -> None:
        """A line of its own, above the live line."""
        if self.enabled:
            self.close()
            self._write(text + "\n")

    def close(self) -> None:
        """End the live line, which stays on the screen."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        """A terminal that was closed, a pipe that nobody reads or a full disk behind it never stops a training."""
        try:
            if self._writable():
                self.stream.write(text)
                self.stream.flush()
        except (OSError, ValueError):
            self.enabled = False
            with contextlib.suppress(OSError, ValueError):  # else what is left in its buffer fails again when Python ends
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)

    def _writable(self) -> bool:
        try:
            return writable(self.stream.fileno())
        except io.UnsupportedOperation:  # it is in memory
            return True


def memory_in_use() -> int:
    """Bytes: CUDA memory at its peak where there is a device, else the resident size of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def shown(value: float) -> str:
    """A loss, or a term of one, with three decimals; a small one with the digits that it has."""
    return f"{value:.3f}" if value == 0 or not abs(value) < 0.01 else f"{value:.2g}"


def human(number: float, unit: str = "") -> str:
    """12345 -> "12.3k"; with unit "B" 1.5e9 -> "1.5 GB"."""
    space = " " if unit else ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{space}{letter}{unit}"
    return f"{number:.0f}{space}{unit}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
