"""Micro-batches change the memory, not the gradient: compared in float64 with autograd through the dense batch."""

import contextlib
import subprocess
import sys

import pytest
import torch
from fastvlp.models import ImageConfig, ModelConfig, TextConfig, TwoTower
from torch import nn
from torch.nn import functional as F

from fastvlp.data import Batch, Stage, pack_images, pack_texts
from fastvlp.losses import ClipLoss, SigLipLoss, contrastive_loss
from fastvlp.losses.filip import filip_loss
from fastvlp.train import GradCache, batches, grad_cache
from fastvlp_kernels.packed import Packed

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


def towers(count: int, dropout: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(3)
    return nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(dropout), nn.Linear(12, 8)) for _ in range(count)).double()


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(tower):
    return lambda x: F.normalize(tower(x), dim=-1)


SCALE = torch.tensor(7.0, dtype=torch.float64)
weights, alike = torch.rand(11, generator=torch.Generator().manual_seed(4)).double() + 0.5, torch.arange(11) // 3


@pytest.mark.parametrize("loss", [
    pytest.param(lambda image, text, *_: ClipLoss()(image, text, SCALE), id="clip"),
    pytest.param(lambda image, text, *_: SigLipLoss()(image, text, SCALE, -2.0), id="siglip"),
    pytest.param(lambda image, text, hard: contrastive_loss(image, text, SCALE, text_negatives=hard), id="hard-negatives"),
    pytest.param(lambda image, text, *_: contrastive_loss(image, text, SCALE, weights=weights, ids=alike), id="weights-and-ids"),
    pytest.param(lambda image, text, *_: contrastive_loss(image, text, SCALE, label_smoothing=0.1, prefixes=[4, 8]), id="matryoshka"),
])
def test_any_loss_of_any_number_of_towers(loss):
    """Three towers, two of the losses leave the third out: its gradient is zero, like that of a part that the loss ignores."""
    inputs, cuts = [rows(11, 0), rows(11, 1), rows(5, 2)], ([4, 4, 3], [6, 5], [5])
    direct, cached = towers(3), towers(3)
    value = loss(*(unit(tower)(x) for tower, x in zip(direct, inputs, strict=True)))
    value.backward()
    cache = GradCache([unit(tower) for tower in cached], loss)
    got = cache.backward(*(x.split(cut) for x, cut in zip(inputs, cuts, strict=True)))
    torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=0)
    for one, other in zip(direct.parameters(), cached.parameters(), strict=True):
        expected = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(other.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_tower_may_give_tokens_and_their_number():
    """FILIP: segments of several lengths, split between segments."""
    lengths = {"image": [3, 1, 4, 2, 2], "text": [2, 2, 1, 5, 3]}
    inputs = {name: list(rows(sum(n), seed).split(n)) for seed, (name, n) in enumerate(lengths.items())}

    def tokens_of(tower):
        return lambda segments: (F.normalize(tower(torch.cat(segments)), dim=-1), torch.tensor([len(segment) for segment in segments]))

    def loss(image, text):
        return filip_loss(Packed.of(image[0], image[1]), Packed.of(text[0], text[1]), SCALE)

    direct, cached = towers(2), towers(2)
    value = loss(*(tokens_of(tower)(x) for tower, x in zip(direct, inputs.values(), strict=True)))
    value.backward()
    image, text = inputs.values()
    got = GradCache([tokens_of(tower) for tower in cached], loss).backward([image[:2], image[2:]], [text[:1], text[1:3], text[3:]])
    torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=0)
    for one, other in zip(direct.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-12)


def test_dropout_is_the_same_in_both_passes():
    """The direct computation draws in the order of the first pass, and what is drawn after the step does not repeat what the step drew."""
    direct, cached, inputs = towers(2, 0.5), towers(2, 0.5), [rows(11, 0).split([4, 4, 3]), rows(11, 1).split([6, 5])]
    torch.manual_seed(5)
    parts = [[unit(tower)(x) for x in some[:-1]] for tower, some in zip(direct, inputs, strict=True)]
    for tower, some, part in zip(direct, inputs, parts, strict=True):
        part.append(unit(tower)(some[-1]))
    after = torch.rand(3)
    ClipLoss()(*(torch.cat(part) for part in parts), SCALE).backward()
    torch.manual_seed(5)
    GradCache([unit(tower) for tower in cached], lambda image, text: ClipLoss()(image, text, SCALE)).backward(*inputs)
    assert torch.equal(torch.rand(3), after)
    for one, other in zip(direct.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-12)


def test_parameters_of_the_loss_and_shared_tensors():
    """A scale that the loss holds, or one that comes with the last micro-batches, gets the same gradient."""
    inputs, found = [rows(11, 0).split(4), rows(11, 1).split(6)], []
    for held in (True, False):
        both, log_scale = towers(2), nn.Parameter(torch.tensor(1.5).double())
        options = {} if held else {"shared": lambda log_scale=log_scale: (log_scale.exp(), None)}

        def loss(image, text, scale=None, nothing=None, log_scale=log_scale):
            return ClipLoss()(image, text, log_scale.exp() if scale is None else scale)

        GradCache([unit(tower) for tower in both], loss, **options).backward(*inputs)
        found.append([log_scale.grad, *(parameter.grad for parameter in both.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_wrong_lists_are_refused():
    for lists in ([[rows(2, 0)]], [[rows(2, 0)], []]):
        with pytest.raises(ValueError, match="micro-batches for 2 towers; give each tower a list of at least one"):
            GradCache([unit(tower) for tower in towers(2)], clip).backward(*lists)
    with pytest.raises(TypeError, match=r"got a Tensor; give each tower a list of micro-batches"):
        GradCache([unit(tower) for tower in towers(2)], clip).backward(rows(2, 0), rows(2, 1))
    for wrong, message in ((lambda a, b: a @ b.T, r"of shape \(\d, \d\); it must give one"), (lambda a, b: 1.0, "gave a float")):
        for number in (1, 2):
            with pytest.raises(ValueError, match=message):
                GradCache([unit(tower) for tower in towers(2)], wrong).backward([rows(2, 0)] * number, [rows(2, 1)] * number)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are off"):
        GradCache([unit(tower) for tower in towers(2)], clip).backward([rows(2, 0)], [rows(2, 1)])


LARGE = """
import torch
from torch import nn
from torch.nn import functional as F
from benchmarks.peak import growth
from fastvlp.losses import ClipLoss
from fastvlp.train import GradCache

torch.manual_seed(0)
pairs, width = 32768, 16
towers = [nn.Linear(12, width) for _ in range(2)]
cache = GradCache([lambda x, t=t: F.normalize(t(x), dim=1) for t in towers], lambda image, text: ClipLoss()(image, text, 10.0))
inputs = [torch.randn(pairs, 12) for _ in towers]
cache.backward(*(x[:512].split(128) for x in inputs))
for tower in towers:
    tower.zero_grad()
print(growth(lambda: cache.backward(*(x.split(2048) for x in inputs)), torch.device("cpu")))
assert all(p.grad.abs().max() > 0 and p.grad.isfinite().all() for t in towers for p in t.parameters())
"""


def test_32768_pairs_take_megabytes():
    """The similarities alone would be 4 GiB; features, their gradients and the loss's tiles are a few dozen MiB."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, cwd=batches.__file__.rpartition("/fastvlp/")[0])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 2**20
