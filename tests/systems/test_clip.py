"""A CLIP of a recipe: raw pictures and captions in, files that give the same features, and one sentence where it does not fit."""

import pytest
import torch
from torch.nn import functional as F

import fastvlp
from fastvlp.data import pack_images, pack_texts
from fastvlp.systems import clip
from fastvlp.systems.dlip import Dlip
from fastvlp.systems.files import save, take_weights
from fastvlp.systems.system import Scale
from fastvlp.towers import Text, Vit
from tests.systems.recipes import small
from tests.towers.plain import images, texts


@pytest.fixture
def made():
    return small()


def test_files_give_the_same_features(made, tmp_path):
    recipe, system = made
    save(tmp_path / "run" / "model", system, recipe)
    captions = ["red apple", "a flag of France, with a lot of words that do not fit the context of this small model " * 3, ""]
    pixels = torch.randint(0, 256, (64, 48, 3), dtype=torch.uint8)
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        again = fastvlp.load(place)
        for name, tensor in system.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(system.encode_text(captions), again.encode_text(captions))
        assert torch.equal(system.encode_image([pixels]), again.encode_image([pixels]))


def test_pictures_of_pil_and_tensors_are_alike(made):
    from PIL import Image

    _, system = made
    pixels = torch.randint(0, 256, (64, 48, 3), dtype=torch.uint8)
    found = system.encode_image([pixels])
    assert torch.equal(found, system.encode_image([Image.fromarray(pixels.numpy())]))
    torch.testing.assert_close(found, system.encode_image([pixels.permute(2, 0, 1) / 255]))
    assert torch.equal(found, system.encode_image(pack_images([pixels], 16)))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1))


def test_features_are_the_pooled_tokens_projected():
    torch.manual_seed(0)
    narrow = {"width": 32, "depth": 1, "heads": 2}
    system = clip.Clip(Vit(**narrow, grid=8), Text(**narrow, vocab_size=50, causal=True), 24, pool_text="last").double()
    vit, text = system.image(images()), system.text(texts())
    for found, pooled, head in (
        (system.embed_image(images()), [x.mean(0) for x in vit.segments()], system.image_head),
        (system.embed_text(texts()), [x[-1] for x in text.segments()], system.text_head),
    ):
        torch.testing.assert_close(found, F.normalize(torch.stack(pooled) @ head.projection, dim=1))


def test_one_step_lowers_the_loss():
    torch.manual_seed(0)
    narrow = {"width": 32, "depth": 1, "heads": 2}
    system = clip.Clip(Vit(**narrow, grid=8), Text(**narrow, vocab_size=50), 24, Scale(10.0))
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-3)

    def loss():
        logits = system.scale()[0] * system.embed_image(images()) @ system.embed_text(texts()).T
        return F.cross_entropy(logits, torch.arange(5))

    before = loss()
    before.backward()
    assert all(p.grad is not None for p in system.parameters())
    optimizer.step()
    assert loss() < before


def test_errors_say_what_to_do(made, tmp_path):
    _, system = made
    with pytest.raises(FileNotFoundError, match="holds no model.json"):
        fastvlp.load(tmp_path)
    with pytest.raises(TypeError, match="pass a list of strings"):
        system.encode_text("one string")
    bare = clip.Clip(Vit(width=32, depth=1, heads=2), Text(width=32, depth=1, heads=2))
    with pytest.raises(ValueError, match="no field 'text' to prepare raw input with"):
        bare.encode_text(["no tokenizer"])
    with pytest.raises(ValueError, match="allowed: mean, last, first, attention"):
        clip.Clip(Vit(width=32, depth=1, heads=2), Text(width=32, depth=1, heads=2), pool_text="middle")
    assert bare.embed_text(pack_texts([torch.tensor([1, 2])])).shape == (1, 256)


def test_a_run_fills_the_teacher(tmp_path):
    """Of the weights of a run a teacher takes its own; the student stays fresh, though names and shapes would fit."""
    _, theirs = small()
    save(tmp_path / "clip", theirs, small()[0])
    torch.manual_seed(1)
    student = Dlip(small()[1].image, small()[1].text, clip.Clip(small()[1].image, small()[1].text, 24), 24)
    for parameter in student.parameters():
        parameter.data.add_(1)
    fresh = student.image.patch.weight.clone()
    take_weights(student, str(tmp_path / "clip"))
    assert all(torch.equal(tensor, student.teacher.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert torch.equal(student.image.patch.weight, fresh)
