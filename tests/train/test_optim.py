import math

import pytest
import torch
from fastvlp.models import ImageConfig, ModelConfig, TextConfig, TwoTower

from fastvlp.config import OptimConfig
from fastvlp.train.ema import Ema
from fastvlp.train.optim import build_optimizer, parameter_groups

TINY = ModelConfig(embed_dim=8, image=ImageConfig(width=16, depth=1, heads=2, patch_size=4, image_size=16),
                   text=TextConfig(width=16, depth=1, heads=2, vocab_size=50), init_bias=-10.0)


def test_only_matrices_that_multiply_decay():
    model = TwoTower(TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, no_decay = parameter_groups(model, 0.3)
    assert decay["weight_decay"] == 0.3 and no_decay["weight_decay"] == 0
    decaying = {names[id(p)] for p in decay["params"]}
    free = {names[id(p)] for p in no_decay["params"]}
    assert decaying | free == set(names.values()) and not decaying & free
    assert {"image.patch.weight", "image.projection", "text.projection"} <= decaying
    assert {"logit_scale", "logit_bias", "image.rows", "image.columns", "text.places", "text.tokens.weight", "image.patch.bias",
            "image.norm_out.weight", "text.norm_out.bias"} <= free


def test_frozen_parameters_are_left_out():
    model = TwoTower(TINY)
    model.image.requires_grad_(False)
    trained = sum(len(group["params"]) for group in parameter_groups(model, 0.1))
    assert trained == sum(1 for p in model.parameters() if p.requires_grad)


def test_steps_equal_the_published_update_in_double_precision():
    """AdamW, algorithm 2 of Loshchilov and Hutter 2019 with the decay outside the gradient and multiplied by the learning rate."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    config = OptimConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(layer, config)
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
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    ema = Ema(model, 0.3)
    expected = model.weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update()
        d = min(0.3, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
    torch.testing.assert_close(ema.averages["weight"], expected, rtol=1e-12, atol=0)
    own = model.weight.detach().clone()
    with ema.applied():
        assert torch.equal(model.weight, ema.averages["weight"]) and not torch.equal(model.weight, own)
    assert torch.equal(model.weight, own)


def test_ema_restarts_where_it_was_and_refuses_another_model():
    model = torch.nn.Linear(2, 1)
    ema = Ema(model, 0.9)
    ema.update()
    state = {**ema.state_dict(), "averages": {name: average.clone() for name, average in ema.averages.items()}}
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update()
    again = Ema(model, 0.9)
    again.load_state_dict(state)
    again.update()
    assert again.updates == ema.updates == 2
    assert all(torch.equal(again.averages[name], ema.averages[name]) for name in ema.averages)
    with pytest.raises(ValueError, match="another model"):
        Ema(torch.nn.Linear(2, 1, bias=False), 0.9).load_state_dict(state)
    assert math.isfinite(sum(float(a.sum()) for a in again.averages.values()))
