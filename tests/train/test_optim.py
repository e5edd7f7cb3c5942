import pytest
import torch
from torch import nn

from fastvlp.config import ConfigError
from fastvlp.recipe import Optim
from fastvlp.systems.siglip import SigLip
from fastvlp.systems.system import freeze
from fastvlp.towers import Text, Vit
from fastvlp.train.ema import Ema
from fastvlp.train.optim import build_optimizer, parameter_groups

YES = torch.tensor(True)


def model(depth: int = 1) -> SigLip:
    return SigLip(Vit(width=16, depth=depth, heads=2, patch_size=4, image_size=16), Text(width=16, depth=1, heads=2, vocab_size=50), 8)


def by_name(system: nn.Module, groups: list[dict], key: str) -> dict[str, float]:
    names = {id(p): name for name, p in system.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


def test_only_matrices_that_multiply_decay():
    system = model()
    decay = by_name(system, parameter_groups(system, Optim(weight_decay=0.3)), "weight_decay")
    assert decay.keys() == dict(system.named_parameters()).keys() and set(decay.values()) == {0.0, 0.3}
    decaying = {name for name, value in decay.items() if value}
    assert {"image.patch.weight", "image_head.projection", "text_head.projection"} <= decaying
    assert not decaying & {"scale.log_scale", "scale.bias", "image.rows", "image.columns", "text.places", "text.tokens.weight",
                           "image.patch.bias", "image.norm_out.weight", "text.norm_out.bias"}
    assert not any(name.rpartition(".")[2] == "bias" for name in decaying)


def test_frozen_parameters_are_left_out():
    system = model()
    freeze(system.image)
    assert by_name(system, parameter_groups(system, Optim()), "scale").keys() == {
        name for name, _ in system.named_parameters() if not name.startswith("image.")}
    freeze(system)
    with pytest.raises(ConfigError, match="no parameter that trains"):
        parameter_groups(system, Optim())


def test_the_longest_beginning_of_a_name_sets_its_rate():
    system = model(depth=2)
    scales = {"image": 0.1, "image.blocks.1": 0.5, "text.norm_out.bias": 0.0}
    found = by_name(system, parameter_groups(system, Optim(scales=scales)), "scale")
    for name, scale in found.items():
        expected = 0.5 if name.startswith("image.blocks.1.") else 0.1 if name.startswith("image.") else float(name != "text.norm_out.bias")
        assert scale == expected, name
    assert found["image_head.projection"] == 1.0  # image is a part, not the beginning of a word
    with pytest.raises(ConfigError, match="optim.scales names image_hea, .*its parts are image, image_head, scale, text, text_head"):
        parameter_groups(system, Optim(scales={"image_hea": 1.0}))


def test_each_block_learns_slower_than_the_one_above():
    system = model(depth=3)
    found = by_name(system, parameter_groups(system, Optim(layer_decay=0.5, scales={"text": 2.0})), "scale")
    for name, scale in found.items():
        if name.startswith("image.blocks."):
            assert scale == 0.5 ** (2 - int(name.split(".")[2])), name
    assert found["image.patch.weight"] == found["image.rows"] == 0.125
    assert found["image.norm_out.weight"] == found["image_head.projection"] == found["scale.log_scale"] == 1.0
    assert found["text.tokens.weight"] == 1.0 and found["text.blocks.0.norm1.weight"] == 2.0  # one block: 2.0 * 0.5 below it


def test_steps_equal_the_published_update_in_double_precision():
    """AdamW, algorithm 2 of Loshchilov and Hutter 2019 with the decay outside the gradient and multiplied by the learning rate."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = build_optimizer(layer, Optim(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5))
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    for t in range(1, 4):
        for name, p in layer.named_parameters():
            p.grad = torch.randn_like(p)
            first, second = moments[name]
            first.mul_(0.8).add_(0.2 * p.grad)
            second.mul_(0.9).add_(0.1 * p.grad**2)
            update = (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-6)
            decay = 0.5 if name == "weight" else 0.0
            expected[name] = expected[name] - 0.01 * (update + decay * expected[name])
        optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_ema_equals_its_recurrence_and_gives_the_weights_back():
    torch.manual_seed(0)
    layer = nn.Linear(2, 1, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    ema = Ema(layer, 0.3)
    expected = layer.weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        ema.update(YES)
        d = min(0.3, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * layer.weight.detach()
    assert ema.updates == 6 and list(ema.averages) == ["weight"]
    torch.testing.assert_close(ema.averages["weight"], expected, rtol=1e-12, atol=0)
    before = ema.averages["weight"].clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update(~YES)  # a step that does not count
    assert torch.equal(ema.averages["weight"], before)
    own = layer.weight.detach().clone()
    with ema.applied():
        assert torch.equal(layer.weight, before) and not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert torch.equal(layer.weight, own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_average_of_sixteen_bits_is_kept_in_32(dtype):
    """Steps of 1e-4 towards a weight of 1: in 16 bits each would be rounded away, near 0.5 and on."""
    layer = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, 0.5)
    ema = Ema(layer, 0.9999)
    ema.updates = 1_000_000  # past its warm-up
    nn.init.constant_(layer.weight, 1.0)
    for _ in range(100):
        ema.update(YES)
    average = ema.averages["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((1, 1), 1 - 0.5 * 0.9999**100), rtol=1e-5, atol=0)
    with ema.applied():
        assert layer.weight.dtype == dtype and torch.equal(layer.weight, average.to(dtype))
    assert layer.weight.item() == 1.0
