"""The live line, the plain lines, the log."""

import io
import json
import sys
import types

import pytest

from fastvlp import config
from fastvlp.train import log, plots, progress
from fastvlp.train.log import JsonLines, Log, lines, series
from fastvlp.train.memory import keep_freed_memory
from fastvlp.train.plots import smooth
from fastvlp.train.progress import Rates


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_one_line_that_is_rewritten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    shown = progress.Progress(100, every=10, stream=stream)
    for step in range(1, 101):
        now[0] += 0.05
        shown.update(step, Rates(0.05, 32, 1600), {"loss": 1 / step, "grad_norm": 3.0, "lr": 0.1})
    shown.say("done")
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.endswith("\ndone\n")
    assert 40 <= text.count("\r") <= 51  # at most ten times a second, and the last step
    assert "step 100/100  loss 0.010  640 samples/s  32.0k tokens/s" in text and "ETA 0:00" in text and "waiting" not in text


def test_elsewhere_there_is_a_plain_line_every_so_many_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    shown = progress.Progress(101, every=10, stream=stream)
    for step in range(1, 102):
        now[0] += 0.5
        shown.update(step, Rates(0.5, 10, 20, waited=0.2), {"loss": 2.0, "contrastive": 1.5, "caption": 0.5, "lr": 0.1}, "  1 skipped")
    written = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in written] == [1, 21, 41, 61, 81, 101]
    assert written[2].startswith("step 41/101  loss 2.000 = contrastive 1.500 + caption 0.500  20 samples/s  40 tokens/s")
    assert "40% waiting for data" in written[2]
    assert written[2].endswith("ETA 0:30  1 skipped")
    assert "\r" not in stream.getvalue()


def test_other_ranks_say_nothing():
    stream = io.StringIO()
    shown = progress.Progress(1, 0, stream=stream, enabled=False)
    shown.update(1, Rates(1.0, 1, 1), {"loss": 1.0})
    shown.say("x")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "gone"), ValueError("I/O operation on closed file")])
def test_a_stream_that_is_gone_stops_nothing(error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    shown = progress.Progress(3, 0, stream=Gone())
    for step in (1, 2, 3):
        shown.update(step, Rates(1.0, 1, 1), {"loss": 1.0})
    shown.say("x")
    assert not shown.enabled


@pytest.mark.parametrize("number, unit, text", [(0, "", "0"), (999, "", "999"), (12345, "", "12.3k"), (2.5e6, "", "2.5M"),
                                                (1.5e9, "B", "1.5 GB"),
                                                (12, "B", "12 B")])
def test_numbers_for_people(number, unit, text):
    assert progress.human(number, unit) == text


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")])
def test_times_for_people(seconds, text):
    assert progress.clock(seconds) == text


def test_memory_is_that_of_this_process():
    assert 50e6 < progress.memory_in_use() < 50e9


def test_a_resumed_log_forgets_what_will_be_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    assert [line["step"] for line in lines(path)] == list(range(1, 8))
    writer = JsonLines(path, start=5)
    writer.write(6, {"loss": float("nan"), "lr": 0.5})
    writer.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 6, "loss": None, "lr": 0.5}
    assert series(lines(path), "loss") == ([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0])
    JsonLines(path, start=0).close()
    assert path.read_text() == ""


def test_loggers_by_name_get_the_numbers(tmp_path, monkeypatch):
    """Stand-ins with the interface of the two packages, which need not be installed."""
    heard = []
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder, purge_step: types.SimpleNamespace(
        add_scalar=lambda name, value, step: heard.append(("board", name, value, step)),
        close=lambda: heard.append(f"board closed, cut at {purge_step}"))
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: types.SimpleNamespace(
        id="new", log=lambda values, step: heard.append(("wandb", values, step)), finish=lambda: heard.append(options["name"]))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    made = config.load("clip", ["run.name=n", "run.log=[tensorboard, wandb]"])
    log_ = log.Log(tmp_path, made, 1, enabled=True)
    log_.write(2, loss=0.5, sample="x")
    log_.close()
    assert heard == [("board", "loss", 0.5, 2), ("wandb", {"loss": 0.5}, 2), "board closed, cut at 2", "n"]
    Log(tmp_path / "nowhere", made, 0, enabled=False).write(1, loss=1.0)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_goes_on_keeps_its_id_and_one_that_starts_over_gets_another(tmp_path, monkeypatch):
    asked, fresh = [], iter(("first", "second", "third"))
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: asked.append(options["id"]) or types.SimpleNamespace(
        id=options["id"] or next(fresh), log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    made = config.load("clip", ["run.name=n", "run.log=[wandb]"])
    for start, folder in ((0, "n"), (4, "n"), (0, "n"), (9, "n"), (4, "other")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Log(tmp_path / folder, made, start, enabled=True).close()
    assert asked == [None, "first", None, "second", None]  # the last goes on from a run that another folder holds


def test_a_log_without_some_quantities_is_drawn(tmp_path):
    """Of a run of one step, with a loss that was no number, without scores."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": null, "lr": 0.1, "grad_norm": 0.0}\n{"step": 1, "skipped": "x"}\n')
    plots.curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_smoothing_has_no_bias_at_its_start():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([0.0, 1.0], keep=0.5) == pytest.approx([0.0, 2 / 3])


def test_glibc_is_asked_to_keep_memory():
    import platform

    assert keep_freed_memory() == (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")
