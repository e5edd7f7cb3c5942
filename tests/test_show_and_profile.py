"""What is drawn is what the operators did, and what is counted is what PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvlp import cli, config
from fastvlp.models import TwoTower
from fastvlp.profile import block_flops, profile, table
from fastvlp.show import LINE, tokens
from tests.train.conftest import one_thread, settings, shard  # noqa: F401  (fixtures)


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


def test_a_model_compares_what_it_embeds(tmp_path, capsys):
    checkered(tmp_path)
    torch.manual_seed(0)
    TwoTower().save(tmp_path / "model")
    out = tmp_path / "out.png"
    words = ["show", "tokens", str(tmp_path / "picture.png"), "--out", str(out), "--merge", "0.25", "--model", str(tmp_path / "model")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{out}: 12 patches, 9 tokens after merging\n" and out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.png", "--keep", "0.5"], "nowhere.png"),
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


def test_operations_are_those_that_pytorch_counts(settings):  # noqa: F811
    """Products by PyTorch's own counter; attention, which it does not see in our operator, by the counter on the same lengths alone."""
    made = config.from_dict(settings)
    layers = [layer for layer in profile(made) if layer.stage == 1]
    from fastvlp.data import Stage, Stream, load_tokenizer
    from fastvlp.train.batches import split

    stage = Stage(32, 1.0, 0.5)
    batch = next(iter(Stream(made.data.train, load_tokenizer("mini", 12), 12, 8, 12, seed=0, stage_at=stage)))
    micro = split(batch, stage, 8, None, None, torch.device("cpu"))
    model = TwoTower(made.model)
    for tower, packed, encode in (("image", micro.images[0], model.encode_image), ("text", micro.texts[0], model.encode_text)):
        own = getattr(made.model, tower)
        with FlopCounterMode(display=False) as counter:
            encode(packed)
        attention = sum(_attention(n, own.width) for n in packed.lengths.tolist()) * own.depth
        products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
        ours = sum(layer.flops for layer in layers if layer.tower == tower)
        assert ours * 12 == pytest.approx(products + attention)
        assert {layer.tokens for layer in layers if layer.tower == tower and layer.name == "block 1"} == {packed.total / 12}


def _attention(n: int, width: int) -> int:
    """Of one segment and block: q k' and p v as products."""
    q = torch.randn(n, width)
    with FlopCounterMode(display=False) as counter:
        (q @ q.T) @ q
    return counter.get_total_flops()


def test_a_block_of_equal_segments():
    from fastvlp.models import TowerConfig

    assert block_flops(torch.tensor([10] * 4), TowerConfig(width=8, heads=1)) == 4 * (24 * 64 * 10 + 4 * 8 * 100)


def test_the_table_has_every_layer_of_every_stage(settings, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "recipe.yaml"
    made = config.from_dict(settings)
    path.write_text(config.dump(made))
    assert cli.main(["profile", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (4 + 2 + 1)  # patches, two blocks, projection; one block, projection; the sum
    assert lines[7].startswith("stage 0, up to 50% of the steps: image_size 24, keep 0.5: ")
    assert "\n".join(lines) == table(profile(made), made)
    assert cli.main(["profile", "mimi"]) == 2 and "did you mean mini?" in capsys.readouterr().err
    assert cli.main(["profile", str(path), "data.train=nowhere.tar"]) == 2 and "nowhere" in capsys.readouterr().err
