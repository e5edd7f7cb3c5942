"""open_clip's classes as people use them: overridden methods, compilation, export; and derivatives that are refused by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastvlp import losses
from fastvlp.losses import ClipLoss, CoCaLoss, DistillClipLoss, MomentumEncoder, SigLipLoss
from fastvlp.losses.across.gather_batch import gather_batch


def features(n=6, d=8, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=random, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]


class Soft(ClipLoss):
    def get_ground_truth(self, device, num_logits):
        return 0.8 * torch.eye(num_logits, device=device) + 0.2 / num_logits


class Half(ClipLoss):
    def get_logits(self, *args, **options):
        return tuple(logits / 2 for logits in super().get_logits(*args, **options))


class Friends(SigLipLoss):
    """Pairs 0 and 1 are alike."""

    def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
        labels = super().get_ground_truth(device, dtype, num_logits, negative_only)
        return labels.index_put((torch.tensor([0, 1]), torch.tensor([1, 0])), torch.ones((), dtype=dtype))


def expected(name, x, y):
    S, own = x @ y.T, torch.arange(len(x))
    if name == "Soft":
        target = (0.8 * torch.eye(len(x)) + 0.2 / len(x)).to(S.dtype)
        return (F.cross_entropy(10 * S, target) + F.cross_entropy(10 * S.T, target)) / 2
    if name == "Half":
        return (F.cross_entropy(5 * S, own) + F.cross_entropy(5 * S.T, own)) / 2
    signs = 2 * torch.eye(len(x), dtype=S.dtype) - 1
    signs[0, 1] = signs[1, 0] = 1
    return F.softplus(-signs * (10 * S - 3)).sum() / len(x)


OVERRIDING = {"Soft": Soft, "Half": Half, "Friends": Friends}


@pytest.mark.parametrize("name", OVERRIDING)
def test_overridden_methods_are_called(name):
    x, y = features(dtype=torch.float64)
    torch.testing.assert_close(OVERRIDING[name]()(x, y, 10.0, -3.0), expected(name, x, y))


def overridden(rank, size, name, local_loss):
    x, y = (side.split([3, 3])[rank].requires_grad_() for side in features(dtype=torch.float64))
    options = {"local_loss": True} if local_loss else {}
    loss = OVERRIDING[name](**options)(x, y, 10.0, -3.0)
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize(("name", "local_loss"), [("Soft", False), ("Half", False), ("Half", True), ("Friends", False)])
def test_overridden_methods_see_the_whole_batch(processes, name, local_loss):
    x, y = (side.requires_grad_() for side in features(dtype=torch.float64))
    exact = expected(name, x, y)
    exact.backward()
    shares = processes.results(2, overridden, name, local_loss)
    assert sum(value for value, _ in shares) / 2 == pytest.approx(exact.item(), rel=1e-12)
    found = torch.cat([torch.as_tensor(grad) for _, grad in shares]) / 2
    torch.testing.assert_close(found, x.grad, rtol=1e-10, atol=1e-13)


def test_what_cannot_be_honoured_is_refused_at_construction():
    with pytest.raises(TypeError, match="get_ground_truth is overridden, but strategy='ring' has no logits; use 'gather'"):
        Soft(strategy="ring")
    distill = type("Own", (DistillClipLoss,), {"dist_loss": lambda self, teacher, student: 0})
    with pytest.raises(TypeError, match="DistillClipLoss: Own overrides dist_loss, which is never called"):
        distill()
    with pytest.raises(TypeError, match="SigLipLoss: Own overrides _loss, which is never called"):
        type("Own", (SigLipLoss,), {"_loss": lambda self, *args: 0})()
    with pytest.raises(ValueError, match="chunk_size=-1; it must be an int, 0 or more"):
        SigLipLoss(chunk_size=-1)
    assert type("Plain", (CoCaLoss,), {})(1.0, 1.0) is not None


def test_logits_as_open_clip_gives_them():
    x, y = features()
    by_images, by_texts = ClipLoss().get_logits(x, y, 10.0, -1.0)
    torch.testing.assert_close(by_images, 10 * x @ y.T - 1)
    torch.testing.assert_close(by_texts, by_images.T)
    assert ClipLoss().get_ground_truth(torch.device("cpu"), 4).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(SigLipLoss(False, 0, 1, None, 2).get_logits(x, y, 10.0, -1.0), 10 * x @ y.T - 1)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_compiled_once_for_all_batch_sizes(name):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(getattr(losses, name)(), backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True)
    for n in range(4, 9):
        compiled(*features(n), torch.tensor(10.0), torch.tensor(-5.0))
    assert len(graphs) <= 2


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_export_with_a_dynamic_batch(name):
    rows = torch.export.Dim("rows", min=2, max=64)
    loss = getattr(losses, name)()
    exported = torch.export.export(loss, (*features(), torch.tensor(10.0)), dynamic_shapes=({0: rows}, {0: rows}, None))
    x, y = features(9)
    torch.testing.assert_close(exported.module()(x, y, torch.tensor(10.0)), loss(x, y, torch.tensor(10.0)))


def test_coca_loss_in_one_graph():
    torch._dynamo.reset()
    x, y = features()
    logits, labels = torch.randn(6, 3, 5), torch.randint(1, 5, (6, 3))
    loss = CoCaLoss(1.0, 1.0)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, logits, labels, torch.tensor(10.0)), loss(x, y, logits, labels, torch.tensor(10.0)))


FORWARD = {
    "ClipLoss": lambda x, y: ClipLoss()(x, y, 3.0),
    "contrastive_loss": lambda x, y: losses.contrastive_loss(x, y, 3.0, label_smoothing=0.3),
    "rank_clip_loss": lambda x, y: losses.rank_clip_loss(x, y, 3.0),
    "focal_sigmoid_loss": lambda x, y: losses.focal_sigmoid_loss(x, y, 3.0),
    "light_clip_loss": lambda x, y: losses.light_clip_loss(x, y, 3.0, soft=0.2),
    "llip_loss": lambda x, y: losses.llip_loss(x.view(6, 2, 2, 2), x.view(6, 2, 2, 2), y.view(6, 4, 2)[:, :2], y[:, :4], 3.0),
    "dcd_loss": lambda x, y: losses.dcd_loss(x, y, torch.tensor([[1, 2]] * 6), torch.ones(6, 3, dtype=x.dtype), 3.0),
    "prolip": lambda x, y: losses.inclusion_loss(x, y, y, x),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_right_or_refused_by_name(name):
    x, y = features(dtype=torch.float64)
    v = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    try:
        found = torch.func.jvp(lambda a: FORWARD[name](a, y), (x,), (v,))[1]
    except RuntimeError as error:
        assert "forward-mode" in str(error)
        return
    want = (FORWARD[name](x + 1e-6 * v, y) - FORWARD[name](x - 1e-6 * v, y)) / 2e-6
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


def forward_mode(rank, size, strategy):
    x, y = features(seed=rank)
    loss = (lambda a: gather_batch(a)[0].sum()) if strategy == "gather_batch" else lambda a: ClipLoss(strategy=strategy)(a, y, 3.0)
    torch.func.jvp(loss, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("strategy", ["gather", "ring", "gather_batch"])
def test_forward_mode_is_refused_across_processes(processes, strategy):
    for answer in processes.run(2, forward_mode, strategy):
        assert answer.kind == "RuntimeError" and "forward-mode" in answer.message, answer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_averages_of_16_bit_weights_move(dtype, cast):
    """1,000 updates at 0.999 go 63.2 % of the way."""
    torch.manual_seed(0)
    encoder = nn.Linear(16, 16)
    copy = MomentumEncoder(encoder.to(dtype) if cast == "before" else encoder, 0.999).to(dtype)
    encoder.to(dtype)
    start = copy.module.weight.detach().float().clone()
    with torch.no_grad():
        encoder.weight.mul_(1.1)
    way = encoder.weight.detach().float() - start
    for _ in range(1000):
        copy.update(encoder)
    gone = ((copy.module.weight.float() - start) * way).sum() / way.square().sum()
    assert abs(gone - (1 - 0.999**1000)) < 0.02 and copy.module.weight.dtype == dtype
    assert copy.state_dict()["average_0"].dtype == torch.float32
