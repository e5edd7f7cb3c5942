"""The ladder and the scaling curves: every rung trains, what does not fit is named and not tried, and both are drawn."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import batches, html, ladder, measure, open_clip_baseline, report, rivals, scaling
from fastvlp.data import pack_images

pytestmark = pytest.mark.skipif(rivals.version("open_clip_torch") is None, reason="both begin with open_clip, which is not installed")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pairs, few rounds, and nothing flushed."""
    monkeypatch.setattr(ladder, "QUICK_PAIRS", 6)
    monkeypatch.setattr(measure.Clock, "__init__", lambda self, device: vars(self).update(device=device, _flush=torch.empty(1)))
    for module in (measure, scaling):
        monkeypatch.setattr(module, "QUICK", measure.Budget(0, 1, 1))


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"quick": True, "device": "cpu", "seconds": None} | changes)


@pytest.fixture(scope="module")
def pairs():
    return ladder.draw(6, CPU)


def test_both_batches_hold_the_same_pairs(pairs):
    assert pairs.clip.keys == pairs.own.keys and torch.equal(pairs.clip.image.x, pairs.own.image.x)
    ids, square, pictures = pairs.padded(), pairs.square(), batches.pictures(pairs.clip.image)
    again = pack_images(pictures, 16)
    assert torch.equal(again.x, pairs.clip.image.x) and torch.equal(again.pos, pairs.clip.image.pos)
    assert [row[row != 0].tolist() for row in ids] == [text.tolist() for text in pairs.clip.text.segments()]
    assert torch.equal(ids.argmax(1), pairs.clip.text.lengths - 1)  # where open_clip pools
    for canvas, picture in zip(square, pictures, strict=True):
        height, width = picture.shape[:2]
        top, left = (64 - height) // 2, (64 - width) // 2
        assert torch.equal(canvas[:, top : top + height, left : left + width].permute(1, 2, 0), picture)
        assert int(canvas.long().sum()) == int(picture.long().sum()) + 255 * 3 * (64 * 64 - height * width)


def test_every_rung_is_a_step_that_changes_the_weights(tmp_path, monkeypatch):
    optimizers = []
    real = torch.optim.AdamW.__init__

    def remember(self, parameters, **options):
        real(self, parameters, **options)
        optimizers.append((self, [p.detach().clone() for group in self.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "__init__", remember)
    found = ladder.run(options(), tmp_path)
    names = [name for name in ladder.RUNGS if name not in ladder.BESIDE]
    assert [row["rung"] for row in found["rows"]] == names and len(optimizers) == len(names)
    for optimizer, before in optimizers:
        after = [p for group in optimizer.param_groups for p in group["params"]]
        changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        assert sum(changed) > 0.95 * len(changed)
    first = found["rows"][0]
    assert first["ratio_first"] == first["ratio_previous"] == 1 and all(row["images_per_second"] > 0 for row in found["rows"])
    (path,) = tmp_path.glob("*/ladder.json")
    assert json.loads(path.read_text())["rows"] == found["rows"]
    assert path.with_suffix(".csv").read_text().startswith("rung,about,images_per_second")
    assert report.ladder({"cpu-x": {"ladder": found}}).count("\n") == 2 + len(names)
    page = html.page({"cpu-x": {"ladder": found}})
    assert page.count("<rect ") == len(names) and "GradCache" in page and "None" not in page


def test_a_gpu_s_ladder_has_steps_beside_it_and_runs_in_bfloat16(monkeypatch):
    """On a CPU, small, and not really compiled."""
    size, compiled, dtypes = open_clip_baseline.Size(32, 30, 64, 12, 64, 1, 32), [], set()
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(ladder, "_training", lambda model, backward: backward)
    monkeypatch.setattr(ladder, "MICRO_BATCHES", 2)
    pairs = ladder.invent(5, CPU, size)
    lengths = pairs.clip.text.lengths.tolist()
    assert pairs.padded().shape == (5, 30) and pairs.padded().argmax(1).tolist() == [length - 1 for length in lengths]
    assert pairs.own.text.lengths.tolist() == lengths and pairs.square().shape == (5, 3, 32, 32)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *tensors, real=torch.nn.functional.linear: seen(dtypes, real(*tensors)))
    steps = ladder.rungs(pairs)
    assert list(steps) == list(ladder.RUNGS) and len(compiled) == 1
    for name, step in steps.items():
        dtypes.clear()
        step()
        assert torch.bfloat16 in dtypes, name
    before = {name: getattr(open_clip_baseline.VIT_B_16, name) for name in ("side", "context", "width", "layers")}
    assert before == {"side": 224, "context": 77, "width": 768, "layers": 12}


def seen(dtypes, result):
    dtypes.add(result.dtype)
    return result


@pytest.mark.parametrize("drop", [False, True])
def test_grad_cache_splits_the_batch_that_the_rung_before_takes_whole(pairs, drop, monkeypatch):
    seen = []
    real = ladder.gradients
    monkeypatch.setattr(ladder, "gradients", lambda system, whole, parts, **rest: seen.append((whole, parts)) or real(
        system, whole, parts, **rest))  # fmt: skip
    ladder.RUNGS["GradCache" if drop else "half of the patches"][1](pairs)()
    ((whole, parts),) = seen
    assert whole.image.total == sum(max(1, int(n * 0.5 + 0.5)) for n in pairs.own.image.lengths.tolist())
    assert len(parts) == (ladder.MICRO_BATCHES if drop else 1) and torch.cat(list(parts)).sort().values.tolist() == list(range(6))


def test_what_does_not_fit_is_named_and_the_other_goes_on(monkeypatch):
    """open_clip's memory grows with the square of the batch, ours less; 0.9 GB are free."""
    monkeypatch.setattr(scaling, "free_memory", lambda device: 9 * 10**8)
    needs = {"open_clip": lambda batch: 12000 * batch**2, "fastvlp": lambda batch: 1000 * batch}
    monkeypatch.setattr(scaling, "elsewhere", lambda *command: needs[command[3]](int(command[4])))
    rows = list(scaling.sweep("batch", (64, 128, 256, 512), CPU, measure.Budget(0, 1, 1), memory=True))
    theirs, ours = ([row for row in rows if row["kind"] == kind] for kind in ("rival", "ours"))
    notes = [f"would need up to {needed} GB of 0.9 GB that are free" for needed in (0.8, 3.1)]
    assert [row.get("note") for row in theirs] == [None, None, *notes]
    assert [row["x"] for row in ours if row["p50_ms"] > 0] == [64, 128, 256, 512]
    assert [row["ratio_rival"] is None for row in ours] == [False, False, True, True]
    table = report.scaling({"cpu-x": {"scaling": {"rows": rows}}})
    assert "| cpu-x | batch | 512 | fastvlp |" in table and f"| {notes[1]} |" in table


def test_a_slow_point_is_called_once(monkeypatch):
    """Each doubling takes four times as long; from SLOW on time and memory come from one call."""
    made = []
    monkeypatch.setattr(scaling, "SLOW", 30.0)
    monkeypatch.setitem(scaling.MAKERS, "batch", (lambda provider, x, device: lambda: made.append(x), ("ours", "theirs")))
    monkeypatch.setattr(scaling, "Clock", lambda device: SimpleNamespace(seconds=lambda call: call() or made[-1] ** 2 / 1000))
    monkeypatch.setattr(scaling, "elsewhere", lambda *command: 10**6)
    monkeypatch.setattr(scaling, "growth", lambda call, device: call() or 2 * 10**6)
    rows = list(scaling.sweep("batch", (64, 128, 256), CPU, measure.Budget(0, 2, 2), memory=True))
    assert [(row["x"], row["samples"], row["extra_mb"], row["p50_ms"]) for row in rows if row["provider"] == "ours"] == [
        (64, 2, 1.0, 4096.0), (128, 2, 1.0, 16384.0), (256, 1, 2.0, 65536.0)
    ]  # fmt: skip
    assert made.count(128) == 6 and made.count(256) == 2


@pytest.mark.slow
def test_all_sweeps_are_measured_written_and_drawn(tmp_path):
    found = scaling.run(options(), tmp_path)
    sweeps = {(row["sweep"], row["x"]): set() for row in found["rows"]}
    for row in found["rows"]:
        sweeps[row["sweep"], row["x"]].add(row["provider"])
    assert sweeps["batch", 64] == {"fastvlp", "open_clip"} and sweeps["image size", 128] == {"packed", "open_clip"}
    assert sweeps["processes", 1] == sweeps["processes", 2] >= {"fastvlp gather", "fastvlp ring", "open_clip"}
    assert sweeps["devices (predicted)", 1024] == {"fastvlp gather", "fastvlp ring", "fastvlp grouped"}
    (path,) = tmp_path.glob("*/scaling.json")
    assert json.loads(path.read_text())["rows"] == found["rows"]
    page = html.page({"cpu-x": {"scaling": found}})
    assert page.count("ms over ") == 2 * len(scaling.SWEEPS)
    assert page.count("extra MB over ") == page.count("extra MB over devices (predicted)") == 2  # a quick run measures no memory
    with_memory = [row | {"extra_mb": 1.0 + row["x"]} for row in found["rows"] if row["sweep"] == "batch"]
    assert html.page({"cpu-x": {"scaling": found | {"rows": with_memory}}}).count("extra MB over batch") == 2


def test_both_losses_of_the_batch_sweep_are_the_same_function():
    ours, theirs = (scaling.task("batch", provider, "96")() for provider in ("fastvlp", "open_clip"))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_memory_is_measured_in_a_process_of_its_own():
    """open_clip's loss keeps several matrices of 1024 x 1024."""
    from benchmarks.peak import elsewhere

    extra = elsewhere("benchmarks.peak", "benchmarks.scaling", "batch", "open_clip", "1024")
    assert extra is None or 2 * 4 * 1024**2 < extra < 20 * 4 * 1024**2
    with pytest.raises(RuntimeError, match=r"(?s)benchmarks.scaling speed .*failed with exit code 1:.*KeyError: 'speed'"):
        elsewhere("benchmarks.peak", "benchmarks.scaling", "speed", "open_clip", "8")
