"""Micro-batches change the memory, not the gradient: compared in float64 with autograd through the dense batch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastvlp.data import Batch
from fastvlp.losses import ClipLoss, SigLipLoss, contrastive_loss
from fastvlp.losses.filip import filip_loss
from fastvlp.systems.system import System, freeze
from fastvlp.train import GradCache, gradients
from fastvlp_kernels.packed import Packed
from tests.systems.small import SAMPLES, make, whole

WIDTHS = {"image": 32, "text": 32}


def clip(image, text, scale, bias=None):
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip(image, text, scale, bias):
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def batch_of(system: System) -> Batch:
    batch = whole()
    return dataclasses.replace(batch, counts=system.counts(batch))


def found(system: System) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in system.named_parameters()}


def one_by_one(system: System, loss) -> torch.Tensor:
    """Both towers one sample at a time, in one graph, and the loss written out."""
    batch = batch_of(system)
    image, text = (torch.cat([embed(stream.take([i])) for i in range(SAMPLES)]) for embed, stream in
                   ((system.embed_image, batch.image), (system.embed_text, batch.text)))
    value = loss(image, text, *system.scale())
    value.backward()
    return value.detach()


def same(got: dict, expected: dict, factor: float = 1.0) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], factor * gradient, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name, loss", [("clip", clip), ("siglip", siglip)])
@pytest.mark.parametrize("budgets", [{}, {"image": 16}, {"text": 9}, {"image": 30, "text": 12}], ids=str)
def test_any_budget_gives_the_gradient_of_the_whole_batch(name, loss, budgets):
    direct, cached = make(name), make(name)
    value = one_by_one(direct, loss)
    batch = batch_of(cached)
    parts = batch.split(batch.microbatches(budgets, WIDTHS), WIDTHS)
    assert (len(parts) > 1) == bool(budgets)
    losses, out = gradients(cached, batch, parts)
    torch.testing.assert_close(losses["contrastive"].reshape(()), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(out["text"], direct.embed_text(batch.text).detach(), rtol=1e-12, atol=0)  # in the order of the batch
    same(found(cached), found(direct))


@pytest.mark.parametrize("part", ["image", "text"])
def test_a_frozen_tower_gets_no_gradient_and_the_other_the_same(part):
    direct, cached = make("clip"), make("clip")
    for system in (direct, cached):
        freeze(getattr(system, part))
    one_by_one(direct, clip)
    gradients(cached, batch_of(cached), [torch.tensor(rows) for rows in ([0, 5, 2], [1, 3], [4, 6, 7])])
    same(found(cached), found(direct))
    assert any(p.grad is not None for p in cached.parameters())


@pytest.mark.parametrize("name", ["clip", "simvlm", "coca"])
@pytest.mark.parametrize("parts", [torch.arange(SAMPLES).split(size) for size in (SAMPLES, 3)], ids=len)
def test_gradients_accumulate_and_scale(name, parts):
    """What a float16 run needs: the loss times a factor gives the gradients times this factor, on top of what is there."""
    system = make(name)
    batch = batch_of(system)
    first = gradients(system, batch, parts)[0]
    once = {key: None if gradient is None else gradient.clone() for key, gradient in found(system).items()}
    again = gradients(system, batch, parts, scale_loss=lambda loss: 3 * loss)[0]
    assert all(torch.equal(again[key], first[key]) and not again[key].requires_grad for key in first)  # the terms are not multiplied
    same(found(system), once, 4.0)


@pytest.mark.parametrize("name", ["clip", "simvlm"])
def test_random_numbers_of_a_system_are_the_same_in_both_passes(name):
    """Dropout in micro-batches: part by part in one graph, from the same seed; and what comes after repeats nothing."""
    parts = torch.arange(SAMPLES).split(3)
    direct, cached = make(name), make(name)
    for system in (direct, cached):
        embed = system.text.tokens
        embed.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.5))
    batch = batch_of(direct)
    torch.manual_seed(5)
    outs = [direct.encode(batch.take(rows)) for rows in parts]
    after = torch.rand(3)
    sum(direct.objective({key: torch.cat([out[key] for out in outs]) for key in outs[0]}, batch).values()).backward()
    torch.manual_seed(5)
    gradients(cached, batch, parts)
    assert torch.equal(torch.rand(3), after)
    same(found(cached), found(direct))


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
pairs, width = 16384, 16
towers = [nn.Linear(12, width) for _ in range(2)]
cache = GradCache([lambda x, t=t: F.normalize(t(x), dim=1) for t in towers], lambda image, text: ClipLoss()(image, text, 10.0))
inputs = [torch.randn(pairs, 12) for _ in towers]
cache.backward(*(x[:512].split(128) for x in inputs))
for tower in towers:
    tower.zero_grad()
print(growth(lambda: cache.backward(*(x.split(2048) for x in inputs)), torch.device("cpu")))
assert all(p.grad.abs().max() > 0 and p.grad.isfinite().all() for t in towers for p in t.parameters())
"""


@pytest.mark.slow
def test_16384_pairs_take_megabytes():
    """The similarities alone would be 1 GiB; features, their gradients and the loss's tiles are a few dozen MiB."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 2**20
