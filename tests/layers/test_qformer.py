"""The Q-Former against that of transformers with the same weights."""

import importlib

import pytest
import torch
from torch import nn

from benchmarks.rivals import import_open_clip
from fastvlp.layers import QFormer
from fastvlp_kernels import Packed

WIDTH, ENCODER, QUERIES, LENGTHS = 24, 20, 5, (7, 3, 9)


@pytest.fixture(scope="module")
def both():
    """Ours and theirs, in float64, with weights by LAVIS's names and by theirs."""
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    try:
        import_open_clip()  # makes torchvision importable, which transformers imports where it is installed
    except ModuleNotFoundError:
        pass
    blip = importlib.import_module("transformers.models.blip_2.modeling_blip_2")
    config = blip.Blip2QFormerConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40, encoder_hidden_size=ENCODER,
        cross_attention_frequency=2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, ours = blip.Blip2QFormerModel(config).double().eval(), QFormer(ENCODER, WIDTH, 4, 3, 40).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    names = {lavis(name): parameter.detach() for name, parameter in theirs.named_parameters()}
    ours.load_state_dict(names)
    return ours, theirs


def lavis(name):
    name = name.replace("attention.attention.", "attention.self.")
    return f"bert.embeddings.LayerNorm.{name.split('.')[1]}" if name.startswith("layernorm.") else f"bert.{name}"


def test_equals_transformers_on_images_of_several_sizes(both):
    ours, theirs = both
    queries = torch.randn(len(LENGTHS), QUERIES, WIDTH, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(sum(LENGTHS), ENCODER, dtype=torch.float64, requires_grad=True)
    packed = Packed.of(tokens, LENGTHS)
    padded, mask = packed.to_padded()
    expected = theirs(query_embeds=queries, encoder_hidden_states=padded, encoder_attention_mask=mask.long()).last_hidden_state
    found = ours(queries, packed)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(found)
    parameters = dict(ours.named_parameters())
    grads = torch.autograd.grad(found, [queries, tokens, *parameters.values()], upstream)
    others = {lavis(name): parameter for name, parameter in theirs.named_parameters()}
    wanted = torch.autograd.grad(expected, [queries, tokens, *(others[name] for name in parameters)], upstream)
    for name, one, other in zip(["queries", "tokens", *parameters], grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=name)


def test_shared_queries_dense_images_and_merged_tokens(both):
    ours, _ = both
    queries, images = torch.randn(QUERIES, WIDTH, dtype=torch.float64), torch.randn(2, 6, ENCODER, dtype=torch.float64)
    found = ours(queries, images)
    torch.testing.assert_close(found, ours(queries.expand(2, -1, -1), Packed.from_padded(images)))
    torch.testing.assert_close(found, ours(queries[None], images))
    twice = torch.cat((images, images[:, :2]), 1)  # a token of size 2 weighs as two of it
    size = torch.tensor([2.0, 2, 1, 1, 1, 1]).repeat(2)
    torch.testing.assert_close(ours(queries, Packed.from_padded(images).replace(size=size)), ours(queries, twice))
    with pytest.raises(ValueError, match="for 2 images"):
        ours(queries.expand(3, -1, -1), images)
    with pytest.raises(ValueError, match=rf"they must be \[Q, {WIDTH}\]"):
        ours(queries[:, 1:], images)
    with pytest.raises(ValueError, match=rf"the tokens of images have shape .* made for \[T, {ENCODER}\]"):
        ours(queries, images[..., 1:])
    with pytest.raises(ValueError, match="the heads must divide"):
        QFormer(hidden_size=10, num_heads=3)


def test_the_image_tokens_are_projected_once(both):
    ours, _ = both
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.linear and args[0].shape[-1] == ENCODER:
                calls.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    with Watch():
        ours(torch.randn(QUERIES, WIDTH, dtype=torch.float64), torch.randn(2, 6, ENCODER, dtype=torch.float64))
    assert calls == [(2 * 2 * WIDTH, ENCODER)]
