"""Adapters start as nothing, are all that trains, and take the weights of a run without them."""

import fiddle as fdl
import pytest
import torch

from benchmarks import rivals
from fastvlp import config
from fastvlp.systems import clip
from fastvlp.systems.files import build_system, take_weights
from fastvlp.towers import Vit, lora
from tests.systems.recipes import save_small, small
from tests.systems.small import vit, whole

rivals.import_torchvision()  # peft imports transformers, and that torchvision, also one that was built for another torch
pytest.importorskip("peft", reason="adapters are peft's")


def test_the_part_gives_what_it_gave_and_only_adapters_train():
    torch.manual_seed(0)
    plain = vit().double()
    expected = plain(whole().image).x.detach()
    part = lora(plain, rank=3, targets=("qkv", "up")).double()
    out = part(whole().image).x
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=0)
    out.square().sum().backward()
    trained = {name for name, p in part.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and (".qkv." in name or ".up." in name) for name in trained)
    assert all((p.grad is not None) == (name in trained) for name, p in part.named_parameters())
    assert part.width == 32


def test_a_recipe_names_it_and_a_run_without_adapters_fills_it(tmp_path):
    trained = save_small(tmp_path)
    recipe, _ = small()
    recipe.model.image = fdl.Config(lora, recipe.model.image, rank=2)
    again = config.from_dict(config.to_dict(recipe))
    torch.manual_seed(5)
    system = build_system(again)
    assert "fresh in image" in take_weights(system, tmp_path)  # the adapters
    frozen = {name.replace(".base_layer.", "."): value for name, value in system.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(frozen[name], value) for name, value in trained.state_dict().items())


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="no linear layer of Vit is called query; there are down, patch, proj, qkv, up"):
        lora(Vit(width=32, depth=1, heads=2), targets=("query",))
    assert clip.recipe().model.image.width == 192
