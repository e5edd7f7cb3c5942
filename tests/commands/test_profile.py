"""What ``fastvlp profile`` prints is what the data and the formulas say; tests/systems/test_flops.py has the counting itself."""

import dataclasses

import pytest
import torch

from fastvlp import cli, config
from fastvlp.commands.profile import profile, table
from fastvlp.train import loop
from fastvlp.train.parallel import World
from tests.train.conftest import one_thread, recipe_of, settings, shard  # noqa: F401  (fixtures)


def lengths_of(recipe, stage):
    """Tokens of the first batch, in one stage of it."""
    _, stream = loop.prepare(recipe, World(0, 1, torch.device("cpu")))
    stream.stage_at = recipe.schedule.stages[stage]
    return next(iter(stream)).streams


def test_parts_cost_what_the_formulas_say(settings):  # noqa: F811
    """24 C C n + 4 C n n for each block; patches of 8 pixels; twice as much backward, but pixels need no gradient."""
    recipe = recipe_of(settings)
    streams, parts = profile(recipe)
    for stage in (0, 1):
        batch = lengths_of(recipe, stage)
        found = {part.name: part for part in parts if part.stage == stage}
        n = batch["image"].lengths.double()
        assert found["image.patch"].forward * 12 == float((2 * 3 * 8 * 8 * 32 * n).sum()) == 12 * found["image.patch"].backward
        for block in ("image.blocks.0", "image.blocks.1"):
            assert found[block].forward * 12 == pytest.approx(float((24 * 32**2 * n + 4 * 32 * n**2).sum()))
            assert found[block].backward == pytest.approx(2 * found[block].forward) and found[block].tokens == float(n.mean())
        assert found["image_head"].forward == 2 * 32 * 16
        told = next(one for one in streams if (one.stage, one.name) == (stage, "text"))
        assert (told.tokens, told.shortest, told.longest) == (
            batch["text"].total / 12, int(batch["text"].lengths.min()), int(batch["text"].lengths.max()))
    assert next(p for p in parts if p.name == "image.blocks.0").tokens < parts[-1].tokens * 100  # both stages are there
    assert {part.stage for part in parts} == {0, 1}


def test_merged_tokens_are_fewer_from_block_to_block(settings):  # noqa: F811
    settings["model"]["image"]["merge"] = 0.5
    _, parts = profile(recipe_of(settings))
    down = {part.name: part for part in parts if part.stage == 1}
    assert down["image.blocks.1"].tokens < 0.6 * down["image.blocks.0"].tokens


def test_frozen_parts_need_no_backward(settings):  # noqa: F811
    recipe = recipe_of(settings)
    stages = (dataclasses.replace(recipe.schedule.stages[0], frozen=("image",)), recipe.schedule.stages[1])
    _, parts = profile(dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, stages=stages)))
    backward = {(part.stage, part.name): part.backward for part in parts}
    assert backward[0, "image.blocks.1"] == 0 < backward[1, "image.blocks.1"] and backward[0, "text.blocks.0"] > 0


def test_the_table_has_every_part_of_every_stage(settings, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "recipe.yaml"
    made = recipe_of(settings)
    path.write_text(config.dump(made))
    assert cli.main(["profile", str(path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    names = [line.split()[1] for line in lines if line[0] in "01"]
    assert names == 2 * ["image.patch", "image.blocks.0-1", "image_head", "text.blocks.0", "text_head", "loss"]
    assert [line.partition(":")[0] for line in lines if line.startswith("stage ") and "up to" in line] == [
        "stage 0, up to 50% of the steps", "stage 1, up to 100% of the steps"]
    assert out == table(*profile(made), made) + "\n"
    for stage in ("0", "1"):
        shares = [float(line.split()[5].rstrip("%")) for line in lines if line[0] == stage]
        assert sum(shares) == pytest.approx(100, abs=0.5)  # rounded to a tenth each


@pytest.mark.parametrize("arguments, message", [(["coka"], "did you mean coca?"), (["clip", "data.train=nowhere.tar"], "nowhere")])
def test_what_cannot_be_profiled_is_one_line(arguments, message, capsys):
    assert cli.main(["profile", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
