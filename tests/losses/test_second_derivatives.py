"""A gradient of a gradient is refused by name, also where the loss is differentiated directly and a penalty on its gradient added."""

import pytest
import torch
from batches import LOSSES

from fastvlp import losses
from fastvlp.losses import gather_batch

WORDS = "no second derivatives"
FUSED = {"rank": losses.rank_clip_loss, "focal": losses.focal_sigmoid_loss}


def penalised(loss, image, text):
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    value = loss(image, text, 5.0)
    (gradient,) = torch.autograd.grad(value, image, create_graph=True)
    once = torch.autograd.grad(loss(image, text, 5.0), image)[0]
    assert torch.equal(gradient.detach(), once)
    (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("name", FUSED)
def test_sums_over_pairs(name):
    with pytest.raises(RuntimeError, match=WORDS):
        penalised(FUSED[name], torch.randn(5, 4), torch.randn(5, 4))


def across(rank, size, strategy, name):
    torch.manual_seed(rank)
    if strategy == "gather_batch":
        def loss(image, text, scale):
            return losses.contrastive_loss(*gather_batch(image, text), scale, impl="reference", group=losses.ALONE)
    else:
        loss = LOSSES[name](strategy=strategy, **({"node_size": 2} if strategy == "grouped" else {}))
    penalised(loss, torch.randn(3, 4), torch.randn(3, 4))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("strategy", ["gather", "ring", "grouped", "gather_batch"])
def test_across_processes(processes, strategy, name):
    for answer in processes.run(2, across, strategy, name):
        assert answer.kind == "RuntimeError" and WORDS in answer.message, answer
