"""Micro-batches change the memory, not the gradient: compared in float64 with autograd through the dense batch."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

from fastvlp.data import Batch, Stage, pack_images, pack_texts
from fastvlp.models import ImageConfig, ModelConfig, TextConfig, TwoTower
from fastvlp.train import batches, grad_cache

PATCH, PAIRS = 4, 11
CPU = torch.device("cpu")


def make_batch() -> Batch:
    torch.manual_seed(0)
    sides = torch.randint(1, 5, (PAIRS, 2)) * PATCH
    images = [torch.randint(0, 256, (int(h), int(w), 3), dtype=torch.uint8) for h, w in sides]
    texts = [torch.randint(0, 50, (int(n),)) for n in torch.randint(1, 9, (PAIRS,))]
    return Batch(images, texts, torch.full((PAIRS,), -1), [str(i) for i in range(PAIRS)], 0, torch.arange(PAIRS))


def make_model(bias: float | None = None) -> TwoTower:
    torch.manual_seed(1)
    return TwoTower(ModelConfig(
        embed_dim=8, image=ImageConfig(width=16, depth=1, heads=2, patch_size=PATCH, image_size=16),
        text=TextConfig(width=16, depth=1, heads=2, vocab_size=50, context_length=8), init_bias=bias)).double()


def clip(image, text, scale, bias):
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(image, text, scale, bias):
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def gradients(model: TwoTower) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def dense(model: TwoTower, batch: Batch, keep: float, loss) -> tuple[torch.Tensor, dict]:
    """The batch one picture and one caption at a time, in one graph."""
    pictures = [pack_images([x], PATCH, keep=keep, seeds=seed[None]) for x, seed in zip(batch.images, batch.seeds, strict=True)]
    image = torch.cat([model.encode_image(x) for x in pictures])
    text = torch.cat([model.encode_text(pack_texts([x])) for x in batch.texts])
    value = loss(image, text, model.scale(), model.logit_bias)
    value.backward()
    return value.detach(), gradients(model)


def cached(model: TwoTower, batch: Batch, keep: float, loss, image_budget: int | None, text_budget: int | None):
    micro = batches.split(batch, Stage(16, keep), PATCH, image_budget, text_budget, CPU)
    value = grad_cache.backward(grad_cache.Towers(model), model, micro, loss, contextlib.nullcontext, lambda x: x)
    return value, gradients(model), micro


@pytest.mark.parametrize("loss, bias", [(clip, None), (siglip, -3.0)])
@pytest.mark.parametrize("budgets", [(None, None), (16, None), (None, 8), (20, 9)], ids=str)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_any_budget_gives_the_gradient_of_the_whole_batch(loss, bias, budgets, keep):
    batch = make_batch()
    value, expected = dense(make_model(bias), batch, keep, loss)
    got_value, got, micro = cached(make_model(bias), batch, keep, loss, *budgets)
    assert (len(micro.images) > 1) == (budgets[0] is not None) and (len(micro.texts) > 1) == (budgets[1] is not None)
    torch.testing.assert_close(got_value, value, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_gets_no_gradient_and_the_other_the_same(frozen):
    batch, one, other = make_batch(), make_model(), make_model()
    for model in (one, other):
        getattr(model, frozen).requires_grad_(False)
    _, expected = dense(one, batch, 1.0, clip)
    _, got, _ = cached(other, batch, 1.0, clip, 20, 9)
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_gradients_accumulate_and_scale():
    """What a float16 run needs: the loss times a factor gives the gradients times this factor, on top of what is there."""
    batch, model = make_batch(), make_model()
    _, first, _ = cached(model, batch, 1.0, clip, 20, 9)
    first = {name: gradient.clone() for name, gradient in first.items()}
    micro = batches.split(batch, Stage(16), PATCH, 20, 9, CPU)
    grad_cache.backward(grad_cache.Towers(model), model, micro, clip, contextlib.nullcontext, lambda x: 3 * x)
    for name, gradient in first.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 4 * gradient, rtol=1e-9, atol=1e-12)


def test_micro_batches_hold_every_sample_once_within_the_budget():
    batch = make_batch()
    micro = batches.split(batch, Stage(16, 0.5), PATCH, 16, 9, CPU)
    lengths = torch.cat([packed.lengths for packed in micro.images])
    patches = [image.shape[0] * image.shape[1] // PATCH**2 for image in batch.images]
    kept = [max(1, int(n * 0.5 + 0.5)) for n in patches]
    assert lengths[micro.image_rows].tolist() == kept and micro.image_tokens == sum(kept) == sum(p.total for p in micro.images)
    assert all(packed.total <= 16 for packed in micro.images) and all(packed.total <= 9 for packed in micro.texts)
    tokens = [segment for packed in micro.texts for segment in packed.segments()]
    assert all(torch.equal(tokens[row], text) for row, text in zip(micro.text_rows.tolist(), batch.texts, strict=True))
    assert all(packed.lengths.tolist() == sorted(packed.lengths.tolist()) for packed in [*micro.images, *micro.texts])
