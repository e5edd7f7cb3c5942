"""What a log-sum-exp kept as one float32 number would lose: at logits of 100 it is rounded to 4e-6."""

import pytest
import torch
from torch.nn import functional as F

from fastvlp.losses import ClipLoss, NegativeQueue, contrastive_loss
from fastvlp_kernels._logsumexp import LogSumExp, logsumexp, merge


def confident(pairs, width, seed):
    """Pairs that are alike and differ from the others, [pairs, width]; the margin at scale 100 is above 20."""
    random = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.eye(pairs, width) + 0.2 * torch.randn(pairs, width, generator=random), dim=1)
    return image, F.normalize(image + 0.1 * torch.randn(pairs, width, generator=random), dim=1)


def gradients(loss, image, text, dtype):
    leaves = [side.to(dtype).requires_grad_() for side in (image, text)]
    return torch.cat(torch.autograd.grad(loss(*leaves), leaves)).double()


LOSSES = {
    "ClipLoss": lambda x, y: ClipLoss()(x, y, 100.0),
    "contrastive_loss": lambda x, y: contrastive_loss(x, y, 100.0),
    "unlike ids": lambda x, y: contrastive_loss(x, y, 100.0, ids=torch.arange(len(x)), equal_ids="sum"),
    "an empty queue": lambda x, y: contrastive_loss(x, y, 100.0, text_negatives=NegativeQueue(3, x.shape[1])),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_a_confident_pair_has_no_gradient_of_rounding(name, seed):
    image, text = confident(2, 5, seed)
    exact = gradients(lambda x, y: contrastive_loss(x, y, 100.0), image, text, torch.float64)
    assert exact.abs().max() < 1e-6
    assert (gradients(LOSSES[name], image, text, torch.float32) - exact).abs().max() < 1e-5 * exact.abs().max() + 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair_has_no_loss(name):
    for seed in range(20):
        image, text = (F.normalize(torch.randn(1, 9, generator=torch.Generator().manual_seed(seed + k)), dim=1) for k in (0, 50))
        assert LOSSES[name](image, text) == 0


def test_parts_merge_to_all_digits():
    """Relative to the logarithm of the sum, not to the log-sum-exp; also where a part, or everything, is empty."""
    random = torch.Generator().manual_seed(0)
    S = (100 + 3 * torch.randn(40, 60, generator=random)).requires_grad_()
    masked = S.masked_fill(torch.rand(40, 60, generator=random) < torch.linspace(0, 1.2, 40)[:, None], -torch.inf)
    parts = [logsumexp(part, 1) for part in masked.split([7, 1, 52], 1)]
    merged, exact = merge(*parts), masked.double().logsumexp(1)
    empty = exact == -torch.inf
    assert empty.any() and not empty.all() and torch.equal(merged.reference == -torch.inf, empty)
    near = exact - merged.reference.double()
    torch.testing.assert_close(merged.log.double()[~empty], near[~empty], rtol=0, atol=5e-7)
    assert merged.minus(torch.full((40,), 90.0))[empty].tolist() == [-torch.inf] * int(empty.sum())
    (mine,) = torch.autograd.grad(merged.value()[~empty].sum(), S, retain_graph=True)
    torch.testing.assert_close(mine, masked.detach().softmax(1).nan_to_num(0.0), rtol=1e-6, atol=1e-7)
    one = merge(LogSumExp(torch.tensor(100.0), torch.tensor(0.0)), LogSumExp(torch.tensor(70.0), torch.tensor(0.0)))
    assert one.minus(torch.tensor(100.0)).item() == pytest.approx(9.3576e-14, rel=1e-3)
