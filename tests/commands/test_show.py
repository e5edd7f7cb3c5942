"""What is drawn is what the operators did."""

import sys

import pytest
import torch

from fastvlp import cli, config
from fastvlp.commands.show import GAP, LINE, attention, tokens
from fastvlp.data import pack_images
from fastvlp.data.images import as_pixels
from fastvlp.systems.clip import Clip
from fastvlp.systems.files import build_system, save
from fastvlp.towers import Text, Vit
from tests.systems.recipes import save_small


def checkered(tmp_path=None):
    """64 x 48 pixels: two halves of one colour each, and one patch of another at the top left."""
    import numpy as np
    from PIL import Image

    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:], pixels[:16, :16] = (200, 0, 0), (0, 0, 200), (0, 200, 0)
    image = Image.fromarray(pixels)
    if tmp_path is not None:
        image.save(tmp_path / "picture.png")
    return image


def test_merged_patches_are_of_one_colour_and_share_a_token():
    drawn, token = tokens(checkered(), merge=0.25, image_size=64)
    assert token.shape == (3, 4) and len(token.unique()) == 12 - 3
    pixels = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).view(drawn.height, drawn.width, 3)
    assert drawn.width / drawn.height == 64 / 48
    scale = drawn.width // 4
    centres = pixels[scale // 2 :: scale, scale // 2 :: scale]
    for merged in token.unique().tolist():
        assert len(centres[token == merged].unique(dim=0)) == 1
    assert centres[0, 0].tolist() == [0, 200, 0]  # unlike all others
    assert pixels[scale // 2, scale].tolist() == list(LINE)  # between two tokens


def test_the_patches_that_stay_are_those_that_differ_most():
    drawn, token = tokens(checkered(), keep=0.1, image_size=64)
    assert token.tolist() == [[0, -1, -1, -1], [-1] * 4, [-1] * 4]  # floor(1.2) of 12
    faded = drawn.getpixel((drawn.width - 5, drawn.height - 5))
    assert min(faded) > 200 and faded[2] > faded[0] and drawn.getpixel((5, 5)) == (0, 200, 0)


@pytest.mark.parametrize("share, left", [(0.5, 6), (0.75, 3), (0.92, 1)])
def test_more_than_half_of_the_patches_merge_in_several_steps(share, left):
    _, token = tokens(checkered(), merge=share, image_size=64)
    assert token.unique().tolist() == list(range(left)) == list(range(12 - int(12 * share)))
    _, half = tokens(checkered(), merge=0.5, image_size=64)
    assert all(len(token[half == one].unique()) == 1 for one in range(6))  # the first step is that of a half


def test_attention_is_the_mean_of_a_model_s_softmax_over_queries_heads_and_blocks():
    """Against dense float64 attention from the blocks' own weights; what receives more is drawn nearer to the colour."""
    model = Clip(Vit(width=32, depth=2, heads=2, merge=(0.25,)), Text(width=32, depth=1, heads=2)).double()
    model.image.patch.weight.data.mul_(20)  # far from equal shares
    drawn, mass = attention(checkered(), model=model)
    packed = pack_images([as_pixels(checkered(), 64, 16)], 16)
    x, wanted = model.image.embed(packed).x, torch.zeros(12, dtype=torch.float64)
    for block in model.image.blocks:
        q, k, v = block.qkv(block.norm1(x)).view(12, 3, 2, 16).permute(1, 2, 0, 3)
        weights = (q @ k.mT / 4).softmax(-1)  # [2, 12, 12]
        wanted += weights.sum((0, 1))
        x = x + block.proj((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.down(block.activation(block.up(block.norm2(x))))
    torch.testing.assert_close(mass.flatten().double(), wanted / 4, rtol=1e-5, atol=0)  # of 2 heads and 2 blocks: 1 is an equal share
    assert mass.max() > 1.2 * mass.min()
    most, least = (divmod(int(place), 4) for place in (mass.argmax(), mass.argmin()))
    size = drawn.width // 4
    redder = [r - b for r, _, b in (drawn.getpixel((column * size + 5, row * size + 5)) for row, column in (most, least))]
    assert redder[0] > redder[1]


def test_without_a_model_patches_attend_by_their_pixels():
    _, mass = attention(checkered(), image_size=64)
    pixels = torch.zeros(3, 4, 3, dtype=torch.float64)
    pixels[:, :2, 0], pixels[:, 2:, 2], pixels[0, 0] = 200, 200, torch.tensor([0.0, 200, 0])
    rows = pixels.view(12, 3).repeat(1, 256) / 255
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    torch.testing.assert_close(mass.flatten().double(), (rows @ rows.T).softmax(1).sum(0), rtol=1e-5, atol=0)


def test_the_plain_command_draws_everything_side_by_side(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    checkered(tmp_path)
    assert cli.main(["show", "tokens", "picture.png"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tokens.png: ") and out.endswith(" times an equal share, from left to right\n")
    views = [tokens(checkered(), merge=0.4)[0], tokens(checkered(), keep=0.5)[0], attention(checkered())[0]]
    whole = Image.open("tokens.png")
    assert whole.size == (3 * views[0].width + 2 * GAP, views[0].height)
    for place, view in enumerate(views):
        left = place * (view.width + GAP)
        assert whole.crop((left, 0, left + view.width, view.height)).tobytes() == view.tobytes()
    assert cli.main(["show", "tokens", "picture.png", "--attend", "--out", "one.png"]) == 0
    assert Image.open("one.png").tobytes() == views[2].tobytes()


def test_a_model_compares_what_it_embeds(tmp_path, capsys):
    checkered(tmp_path)
    save_small(tmp_path / "model")
    out = tmp_path / "out.png"
    words = ["show", "tokens", str(tmp_path / "picture.png"), "--out", str(out), "--merge", "0.25", "--model", str(tmp_path / "model")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{out}: 12 patches, 9 tokens after merging\n" and out.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_a_recipe_file_of_ones_own(tmp_path, capsys):
    (tmp_path / "shown_recipe.py").write_text("""
import fiddle as fdl
from fastvlp.recipe import Recipe, Schedule
from fastvlp.systems.clip import Clip
from fastvlp.towers import Text, Vit


class Mine(Clip):
    pass


def recipe() -> Recipe:
    towers = fdl.Config(Vit, width=32, depth=1, heads=1), fdl.Config(Text, width=32, depth=1, heads=1)
    return Recipe(fdl.Config(Mine, *towers), Schedule(steps=1))
""")
    own, folder = str(tmp_path / "shown_recipe.py"), tmp_path / "model"
    checkered(tmp_path)
    made = config.load(own)
    save(folder, build_system(made), made)
    sys.modules.pop("shown_recipe")
    config._own_files.discard("shown_recipe")
    words = ["show", "tokens", str(tmp_path / "picture.png"), "--merge", "0.25", "--model", str(folder), "--out", str(tmp_path / "o.png")]
    assert cli.main(words) == 2 and "show --recipe FILE.py" in capsys.readouterr().err
    assert cli.main([*words, "--recipe", own]) == 0 and "9 tokens after merging" in capsys.readouterr().out
    sys.modules.pop("shown_recipe")
    config._own_files.discard("shown_recipe")


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.png", "--keep", "0.5"], "error: there is no picture nowhere.png; give the path of an image file, such as a PNG or JPEG\n"),
    (["{file}", "--keep", "0.5"], "cannot be shown: not an image"),
    (["{picture}", "--merge", "1.5"], "the share of the patches is 1.5; it lies between 0 and 1"),
    (["{picture}", "--keep", "0.5", "--model", "nowhere"], "nowhere holds no model.json"),
])  # fmt: skip
def test_what_cannot_be_shown_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkered(tmp_path)
    (tmp_path / "file.txt").write_text("words")
    words = [word.format(file="file.txt", picture="picture.png") for word in arguments]
    assert cli.main(["show", "tokens", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "tokens.png").exists()
