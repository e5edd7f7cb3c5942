"""The quality experiment: its variants are what they are called, run one at a time, and end in a table and a picture."""

import argparse
import json

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import e2e, padded_train, quality, report
from fastvlp import config
from fastvlp.commands.profile import profile
from fastvlp.data import pack_images, pack_texts
from fastvlp.towers import Text, Vit
from tests.benchmarks.test_benchmark_e2e import SCORES


def options(*words: str) -> argparse.Namespace:
    return command_line.parser().parse_args(["run", "--e2e", "quality", "--seeds", "0", *words])


def test_the_variants_differ_in_their_tokens_alone():
    tokens = {}
    for name, variant in quality.VARIANTS.items():
        made = config.load("mini", [*variant.changes, "data.batch_size=16"])
        blocks = [part.tokens for part in profile(made)[1] if part.name.startswith("image.blocks.")]
        tokens[name] = [blocks[0], blocks[5]]  # the first stage
        assert all(line.startswith(("schedule.stages", "model.image.merge", "data.batch_size"))
                   for line in config.differences(config.load("mini"), made))  # fmt: skip
    whole = tokens["all patches"][0]
    assert tokens["all patches"] == [whole, whole] == tokens["all patches padded"]
    assert tokens["half dropped"] == pytest.approx([whole / 2] * 2, rel=0.1)
    assert tokens["merged"][0] == whole and tokens["merged"][1] < 0.6 * whole
    assert tokens["half dropped and merged"][0] == tokens["half dropped"][0] and tokens["half dropped and merged"][1] < 0.4 * whole


def test_the_padded_towers_are_the_packed_ones():
    torch.manual_seed(0)
    vit, text = Vit().double(), Text().double()
    images = pack_images([torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in ((32, 48), (64, 64), (16, 16))], 16)
    texts = pack_texts([torch.randint(0, 4096, (n,)) for n in (3, 9, 1)])
    torch.testing.assert_close(padded_train.encode_image(vit, images).x, vit(images).x)
    torch.testing.assert_close(padded_train.encode_text(text, texts).x, text(texts).x)


def test_one_variant_at_a_time_and_the_table_of_those_that_are_there(tmp_path, monkeypatch, capsys):
    speeds = {"all patches": 100.0, "merged": 150.0}

    def measure(part):
        asked.append(part.system)
        return {"part": part.name, "system": part.system, "seed": part.seed, "tower_parameters": 5, "version": "source"} | SCORES | {
            "images_per_second": speeds[part.system]}  # fmt: skip

    monkeypatch.setattr(e2e, "measure", measure)
    for variant in speeds:
        asked: list[str] = []
        quality.run(options("--variant", variant), tmp_path)
        assert asked == [variant]
    (path,) = tmp_path.glob("*/quality.json")
    assert [system["system"] for system in json.loads(path.read_text())["systems"]] == list(speeds)
    assert path.with_suffix(".csv").read_text().count("\n") == 3
    table = report.quality(report.load(tmp_path))
    device = path.parent.name
    assert f"| {device} | merged | 1 | 150 | 1.50x | 1.0 | 25.0 | 25.0 | 50.0 |" in table
    assert table.endswith(f"(benchmarks/results/{device}/quality.png)\n")
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        options("--variant", "squared")
    assert "invalid choice: 'squared'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_variant_trains_and_leaves_its_scores(tmp_path):
    """The padded one, whose process is no other test's."""
    quality.run(options("--quick", "--variant", "all patches padded", "--set", "schedule.steps=2"), tmp_path)
    (path,) = tmp_path.glob("*/quality.json")
    (system,) = json.loads(path.read_text())["systems"]
    assert system["system"] == "all patches padded" and system["images_per_second"] > 0 and 0 <= system["top1"] <= system["top5"] <= 1
