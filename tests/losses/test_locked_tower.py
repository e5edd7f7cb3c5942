"""A locked tower costs nothing (LiT, Zhai et al. 2022, arXiv:2111.07991): the product that would make its gradient is not computed."""

import pytest
import torch
from torch.nn import functional as F

from fastvlp.losses import ClipLoss, SigLipLoss, contrastive_loss, focal_sigmoid_loss, rank_clip_loss
from fastvlp_kernels._testing import forbid_large_tensors

N, WIDTH = 96, 48
IDS = torch.arange(N) // 2


class Products(forbid_large_tensors):
    """Counts multiplications of matrix products in units of the N x N x D of S, also inside custom operators."""

    def __init__(self):
        super().__init__(1 << 60)
        self.units = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [argument for argument in args if isinstance(argument, torch.Tensor)][-2:]
            self.units += left.shape[0] * left.shape[1] * right.shape[1] / (N * N * WIDTH)
        return super().__torch_dispatch__(func, types, args, kwargs)


# With both towers, with one, with the scale alone, with nothing. CLIP: S, and in backward S again and a gradient of each tower. The sigmoid
# makes gradients with the value. RankCLIP: CLIP's, and four matrices, of whose eight sides each tower is four.
LOSSES = {
    "ClipLoss": (lambda *given: ClipLoss()(*given), (4, 3, 3, 1)),
    "SigLipLoss": (lambda *given: SigLipLoss()(*given, -3.0), (3, 2, 2, 1)),
    "contrastive_loss": (contrastive_loss, (4, 3, 3, 1)),
    "contrastive_loss, focal": (lambda *given: contrastive_loss(*given, focal_gamma=2.0), (4, 3, 3, 1)),
    "contrastive_loss, ids": (lambda *given: contrastive_loss(*given, ids=IDS), (4, 3, 3, 1)),
    "focal_sigmoid_loss": (focal_sigmoid_loss, (3, 2, 2, 1)),
    "rank_clip_loss": (rank_clip_loss, (4 + 12, 3 + 8, 3 + 8, 1 + 4)),
}


def units(loss, *trains):
    features = F.normalize(torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(0)), dim=2)
    inputs = [tensor.clone().requires_grad_(train) for tensor, train in zip((*features, torch.tensor(9.0)), trains, strict=True)]
    with Products() as products:
        found = loss(*inputs)
        if any(trains):
            found.backward()
    assert [tensor.grad is not None for tensor in inputs] == list(trains)
    return products.units


@pytest.mark.parametrize("name", LOSSES)
def test_a_locked_tower_costs_no_product(name):
    loss, (both, one, scale, nothing) = LOSSES[name]
    for trains_scale in (False, True):
        assert units(loss, True, True, trains_scale) == pytest.approx(both)
    assert units(loss, True, False, False) == pytest.approx(one) == units(loss, False, True, False)
    assert units(loss, False, False, True) == pytest.approx(scale)
    assert units(loss, False, False, False) == pytest.approx(nothing)
