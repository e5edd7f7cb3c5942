"""Signals, waits without end, closed terminals, locks: each in a forked process, since each ends one."""

import ctypes
import io
import multiprocessing
import os
import resource
import signal
import sys
import time

import pytest

from fastvlp.config import ConfigError
from fastvlp.train import interrupt
from fastvlp.train.interrupt import StopRequest, Watchdog, standard_descriptors
from fastvlp.train.lock import RunLock
from fastvlp.train.progress import Progress, Rates


class Child:
    """A forked process that runs ``act``; what it writes on stderr, or passes to ``tell``, is read here."""

    def __init__(self, act, full=False):
        self.ear, mouth = os.pipe()
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        self.pid = os.fork()
        if self.pid:
            os.close(mouth)
            return
        status = 99
        try:
            os.dup2(mouth, 2)
            if full:  # and nobody reads it
                os.set_blocking(2, False)
                while interrupt.writable(2):
                    os.write(2, b"x" * 512)
                os.set_blocking(2, True)
            act(lambda word: os.write(2, f"{word}\n".encode()))
            status = 0
        finally:
            os._exit(status)

    def hear(self, word, seconds=10.0):
        """Read until a word comes; returns all that was said."""
        said, end = "", time.monotonic() + seconds
        os.set_blocking(self.ear, False)
        while word not in said:
            assert time.monotonic() < end, f"{word!r} did not come: {said}"
            try:
                data = os.read(self.ear, 1 << 16)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            assert data, f"it ended without {word!r}: {said}"
            said += data.decode()
        return said

    def send(self, signum):
        os.kill(self.pid, signum)

    def status(self, seconds=20.0):
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.ear)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                pytest.fail("it did not end")
            time.sleep(0.005)


def stuck_in_c():
    """Holds neither the interpreter's lock nor an ear for signals, as a compiler or a collective operation does."""
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


@pytest.mark.parametrize("wait", [stuck_in_c, lambda: time.sleep(60)], ids=["in C", "in Python"])
def test_the_first_signal_is_answered_and_the_second_ends_at_once(wait):
    def act(tell):
        with StopRequest():
            tell("ready")
            wait()

    child = Child(act)
    child.hear("ready")
    child.send(signal.SIGINT)
    child.hear("SIGINT heard: stopping with a checkpoint after this step; once more stops at once")
    child.send(signal.SIGINT)
    assert child.status() == 130


def test_the_second_one_takes_the_loading_processes_along():
    def act(tell):
        with StopRequest():
            worker = multiprocessing.Process(target=time.sleep, args=(60,))  # as it is, it would be waited for at the end
            worker.start()
            tell(f"worker {worker.pid}.")
            stuck_in_c()

    child = Child(act)
    worker = int(child.hear(".").removeprefix("worker ").partition(".")[0])
    child.send(signal.SIGINT)
    child.hear("once more stops at once")
    child.send(signal.SIGINT)
    assert child.status() == 130
    assert gone(worker)


def gone(process, seconds=10.0):
    """Whether a process that is nobody's child any more ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_that_comes_twice_at_once_is_one(number):
    """A shell and the kernel both send SIGHUP; a scheduler sends SIGTERM to torchrun and to its processes, which torchrun does, too."""
    def act(tell):
        interrupt.SAME = 60.0
        with StopRequest() as stop:
            tell("ready")
            while not stop.signum:
                time.sleep(0.001)
            assert stop.signum == number
            time.sleep(0.2)
            interrupt.SAME = 0.0
            tell("still here")
            time.sleep(60)

    child = Child(act)
    child.hear("ready")
    child.send(number)
    child.hear("heard")
    child.send(number)
    child.hear("still here")
    child.send(number)
    assert child.status() == 128 + number


def test_a_wait_ends_on_a_signal():
    def act(tell):
        with StopRequest() as stop:
            assert stop.waiting(lambda: "a batch") == "a batch"
            tell("ready")
            assert stop.waiting(lambda: time.sleep(60) or "too late") is None
            assert stop.waiting(lambda: "no more") is None and stop.signum == signal.SIGTERM
            tell("saved")

    child = Child(act)
    child.hear("ready")
    child.send(signal.SIGTERM)
    child.hear("saved")
    assert child.status() == 0


def test_a_child_s_signals_are_not_its_parent_s():
    def act(tell):
        with StopRequest() as stop:
            worker = os.fork()
            if not worker:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.05)
                os._exit(0)
            os.waitpid(worker, 0)
            time.sleep(0.05)
            assert stop.signum == 0
            tell("untouched")

    child = Child(act)
    assert "heard" not in child.hear("untouched")
    assert child.status() == 0


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with StopRequest():
        assert signal.getsignal(signal.SIGHUP) not in before
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("told, code", [(False, 1), (True, 143)], ids=["in silence", "told to stop"])
def test_a_wait_without_end_is_ended_with_stacks(told, code):
    def act(tell):
        def waits_for_a_dead_mount():
            time.sleep(60)

        stop = StopRequest()
        stop.signum = signal.SIGTERM * told
        with Watchdog(0.2 if not told else 50.0, stop, grace=0.2) as watchdog:
            watchdog.doing("waiting for batch 7")
            waits_for_a_dead_mount()

    child = Child(act)
    said = child.hear("waits_for_a_dead_mount")
    assert "nothing has happened" in said and "while waiting for batch 7" in said and "MainThread" in said
    assert child.status() == code


def test_a_terminal_that_nobody_reads_does_not_keep_it():
    def act(tell):
        with Watchdog(0.2, StopRequest()):
            time.sleep(60)

    assert Child(act, full=True).status() == 1


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    """Five seconds between two looks are an hour of SIGSTOP, or of a closed lid."""
    now, ended = [0.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupt, "end_at_once", lambda status: (_ for _ in ()).throw(SystemExit))
    watchdog = Watchdog(100.0, StopRequest())
    looks = iter([1.0, 2.0, 3602.0, 3603.0, 3690.0, 3699.0])

    def wait(period):
        now[0] = next(looks, None) or 0.0
        return now[0] == 0.0

    monkeypatch.setattr(watchdog._over, "wait", wait)
    monkeypatch.setattr(interrupt, "say", ended.append)
    watchdog._watch()
    assert not ended


def test_closed_descriptors_are_not_given_to_files(tmp_path):
    """``>&- 2>&-``: the next file that is opened would be number 1, and what is printed would stand in it."""
    def act(tell):
        os.close(1)
        os.close(2)
        with standard_descriptors(), (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2
            interrupt.say("lost")
        assert (tmp_path / "file").read_text() == ""

    assert Child(act).status() == 0


@pytest.mark.parametrize("kind", ["full pipe", "closed pipe", "full disk", "closed stdout"])
def test_a_terminal_never_stops_the_lines_of_a_run(kind, monkeypatch):
    reader, writer = os.pipe()
    if kind == "closed pipe":
        os.close(reader)
    if kind == "closed stdout":
        monkeypatch.setattr(sys, "stdout", None)
    stream = None if kind == "closed stdout" else open("/dev/full", "w") if kind == "full disk" else open(writer, "w", closefd=False)
    shown = Progress(3000, 0.0, stream)
    for step in range(3000):
        shown.update(step, Rates(0.1, 8, 80), {"loss": 1.0})
    shown.say("done")
    if isinstance(stream, io.TextIOWrapper) and kind != "full pipe":
        assert not shown.enabled
        stream.close()  # and what was left in its buffer fails no more
    if kind == "full pipe":
        assert len(os.read(reader, 1 << 20)) > 30_000


def test_a_lock_dies_with_its_process_whatever_it_forked(tmp_path):
    """A loading process that hangs must not hold the lock of a killed run."""
    def act(tell):
        with RunLock(tmp_path / "run"):
            if not os.fork():
                tell(f"worker {os.getpid()}.")
                time.sleep(60)
            time.sleep(60)

    child = Child(act)
    worker = int(child.hear(".").removeprefix("worker ").partition(".")[0])
    with pytest.raises(ConfigError, match="is in use: process [0-9]+ on .* is training there"), RunLock(tmp_path / "run"):
        pass
    child.send(signal.SIGKILL)
    assert child.status() == -signal.SIGKILL
    os.kill(worker, 0)  # it lives
    with RunLock(tmp_path / "run"):
        os.kill(worker, signal.SIGKILL)
