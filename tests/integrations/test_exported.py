"""Accelerated models compiled whole, and written down for others: ``torch.export``, ONNX, ``torch.jit.trace``."""

import importlib
import importlib.util

import pytest
import torch
from torch import nn

import fastvlp
from tests.integrations import models
from tests.integrations.test_towers import PREFIX, by_the_loop, made, value
from tests.integrations.test_transformers import build, inputs


@pytest.fixture(scope="module", autouse=True)
def installed():
    models.libraries()


class Features(nn.Module):
    """Images in, features out, for every library."""

    def __init__(self, model, named):
        super().__init__()
        self.model, self.named = model, named

    def forward(self, x):
        return value(self.model({"pixel_values": x} if self.named else x))


CASES = [(models.deit_distilled, 3), (models.timm_registers, 0.2), (models.vit, 2), (models.siglip, None)]


def case(build, merge, dtype=torch.float64):
    """An accelerated model, its images, and the features that the loop gives for them."""
    model, batch, _ = made(build)
    stock, _, tower = made(build)
    named = isinstance(batch, dict)
    images = batch["pixel_values"] if named else batch
    if merge is not None:
        by_the_loop(stock, tower, None, merge if isinstance(merge, list) else [merge] * models.DEPTH, PREFIX[build])
    want = Features(stock, named)(images).detach()
    fastvlp.accelerate(model, **({"attention": "packed"} if merge is None else {"merge": merge}))
    return Features(model, named).to(dtype).eval(), images.to(dtype), want.to(dtype)


@pytest.mark.parametrize(("build", "merge"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_exported_with_a_dynamic_batch(build, merge):
    model, images, want = case(build, merge)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert not [node for node in program.graph.nodes if "fastvlp" in str(node.target)], "who reads it has none of our operators"
    torch.testing.assert_close(program.module()(images), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(program.module()(images[:2]), want[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_padding_stops_an_exported_model_that_merges():
    model, batch, _ = made(models.timm_class)
    fastvlp.accelerate(model, merge=2)
    seen = torch.ones(3, 1, 1, 17, dtype=torch.bool)
    program = torch.export.export(model, (batch,), {"attn_mask": seen}).module()
    torch.testing.assert_close(program(batch, attn_mask=seen), model(batch), rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="takes batches without padding"):
        program(batch, attn_mask=seen & (torch.arange(17) < 9))


@pytest.mark.parametrize(("build", "merge"), CASES[::2], ids=lambda x: getattr(x, "__name__", str(x)))
def test_onnx(build, merge, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model, images, want = case(build, merge, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False).save(tmp_path / "model.onnx")
    session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images[:2].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), want[:2], rtol=1e-4, atol=1e-4)


def test_traced():
    model, images, want = case(models.open_clip_clip, [3, 0, 2])
    traced = torch.jit.trace(model, (images,), check_trace=False)
    torch.testing.assert_close(traced(images[:2]), want[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_loss_compiled_whole(name):
    """Loss and gradients, and logits that are made when they are read from the compiled model's output."""
    transformers = importlib.import_module("transformers")
    model, batch = build(transformers, name), inputs(name, return_loss=True)
    stock = model(**batch)
    stock.loss.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fastvlp.accelerate(model)
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    torch.testing.assert_close(output.loss, stock.loss, rtol=1e-4, atol=1e-5)
    assert "logits_per_image" not in output.keys()
    torch.testing.assert_close(output.logits_per_image, stock.logits_per_image, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    for key, gradient in grads.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_hidden_states_compiled_whole():
    """Where a compiler reads a block's output for its hidden states, it sees every patch too."""
    _, batch, tower = made(models.siglip)
    fastvlp.accelerate(tower, merge=2)
    want = tower(**batch, output_hidden_states=True).hidden_states
    torch._dynamo.reset()
    found = torch.compile(tower, backend="aot_eager", fullgraph=True)(**batch, output_hidden_states=True).hidden_states
    assert [state.shape for state in found] == [state.shape for state in want]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
