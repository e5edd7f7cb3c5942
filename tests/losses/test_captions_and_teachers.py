"""CoCaLoss and DistillClipLoss: open_clip's numbers on one process, those of the whole batch on many, and no batch x batch tensor."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.rivals import import_open_clip
from fastvlp.losses import CoCaLoss, DistillClipLoss
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors

NAMES = ("CoCaLoss", "DistillClipLoss")
TRAINED = {"CoCaLoss": ("image", "text", "logits", "scale"), "DistillClipLoss": ("image", "text", "scale")}
KEYS = {"CoCaLoss": ("contrastive_loss", "caption_loss"), "DistillClipLoss": ("contrastive_loss", "distill_loss")}
SIZES = {2: (6, 3), 3: (1, 7, 4)}
WEIGHTS = (0.75, 2.0)
LENGTHS = (5, 0, 3, 2, 5, 1, 4, 0, 0, 3, 2, 1)


@pytest.fixture(scope="module")
def open_clip():
    try:
        import_open_clip()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    return importlib.import_module("open_clip.loss")


def whole(pairs, dtype=torch.float64, scale=10.0, likeness=0.5, width=12):
    """All inputs of both losses; captions have from 0 to 5 tokens of a vocabulary of 11, in which 0 is the padding."""
    generator = torch.Generator().manual_seed(pairs)

    def unit(columns, like=None):
        noise = torch.randn(pairs, columns, generator=generator, dtype=torch.float64)
        return F.normalize(noise if like is None else likeness * like + (1 - likeness) * noise, dim=1)

    image, teacher = unit(width), unit(20)
    labels = torch.randint(1, 11, (pairs, 5), generator=generator)
    lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(pairs)])
    tensors = {
        "image": image,
        "text": unit(width, image),
        "logits": torch.randn(pairs, 5, 11, generator=generator, dtype=torch.float64),
        "teacher_image": teacher,
        "teacher_text": unit(20, teacher),
    }
    scalars = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {
        "labels": labels.masked_fill(torch.arange(5) >= lengths[:, None], 0),
        "scale": torch.tensor(scale, dtype=scalars),
        "teacher_scale": torch.tensor(30.0, dtype=scalars),
    }


def call(name, module, tensors, **options):
    """The two losses and the leaves."""
    leaves = {key: value.detach().clone().requires_grad_(key in TRAINED[name]) for key, value in tensors.items()}
    if name == "CoCaLoss":
        losses = module(leaves["image"], leaves["text"], leaves["logits"], leaves["labels"], leaves["scale"], **options)
    else:
        teacher = leaves["teacher_image"], leaves["teacher_text"], leaves["teacher_scale"]
        losses = module(leaves["image"], leaves["text"], leaves["scale"], *teacher, **options)
    return losses, leaves


def differentiated(name, module, tensors, **options):
    """Both losses, and the gradients of a weighted sum of them."""
    losses, leaves = call(name, module, tensors, **options)
    sum(weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True)).backward()
    return {f"loss {place}": loss.detach() for place, loss in enumerate(losses)} | {key: leaves[key].grad for key in TRAINED[name]}


def made(name, source=None, **options):
    """The loss of ours, or that of ``source``."""
    kind = {"CoCaLoss": CoCaLoss, "DistillClipLoss": DistillClipLoss}[name] if source is None else getattr(source, name)
    return kind(1.5, 0.5, **options) if name == "CoCaLoss" else kind(**options)


def assert_close(found, expected, tol):
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tol, atol=tol / 10, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_open_clips_numbers(open_clip, name):
    for scale, likeness in ((10.0, 0.5), (100.0, 0.45)):
        tensors = whole(33, scale=scale, likeness=likeness)
        for options in ({}, {"local_loss": True, "gather_with_grad": True, "cache_labels": True}):
            assert_close(differentiated(name, made(name, **options), tensors),
                         differentiated(name, made(name, open_clip, **options), tensors), 1e-9)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_open_clip(open_clip, name, dtype):
    for scale, likeness in ((10.0, 0.5), (100.0, 0.45)):
        tensors = whole(97, dtype, scale, likeness, width=40)
        exact = differentiated(name, made(name, open_clip), {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()})
        ours, eager = (differentiated(name, made(name, source), tensors) for source in (None, open_clip))
        for key in exact:
            tol = 4 * torch.finfo(torch.float32).eps * scale + (torch.finfo(dtype).eps / 2 if exact[key].ndim else 0)
            assert_no_worse_than(ours[key], eager[key], exact[key], tol, f"{key} at scale {scale}")
            assert ours[key].dtype == (torch.float32 if exact[key].ndim == 0 else dtype)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_begin_with_open_clips(open_clip, name):
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(type(made(name, source)), method)).parameters for source in (None, open_clip))
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[key].kind == theirs[key].kind and ours[key].default == theirs[key].default for key in theirs)


@pytest.mark.parametrize("name", NAMES)
def test_output_dict(name):
    tensors = whole(9)
    losses, _ = call(name, made(name), tensors)
    found, _ = call(name, made(name), tensors, output_dict=True)
    assert tuple(found) == KEYS[name]
    assert all(torch.equal(value, loss) for value, loss in zip(found.values(), losses, strict=True))


def share(rank, size, name, sizes, dtype, told):
    start = sum(sizes[:rank])
    tensors = {key: t if t.ndim == 0 else t[start : start + sizes[rank]] for key, t in whole(sum(sizes), dtype).items()}
    found = differentiated(name, made(name, rank=rank, world_size=size), tensors, local_sizes=list(sizes) if told else None)
    return {key: value.double().numpy() for key, value in found.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_whole_batch(processes, open_clip, name, size, dtype):
    """After DDP's average; local batches differ in pairs and in tokens."""
    sizes = SIZES[size]
    expected = differentiated(name, made(name, open_clip), whole(sum(sizes)))
    for told in (False, True):
        shares = processes.results(size, share, name, sizes, dtype, told)
        found = {key: np.concatenate([part[key] for part in shares]) / size if value.ndim else np.mean([part[key] for part in shares], 0)
                 for key, value in expected.items()}  # fmt: skip
        assert_close({key: torch.as_tensor(value) for key, value in found.items()}, expected, 1e-9 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_needs_no_matrix(dtype):
    pairs = 6000
    generator = torch.Generator().manual_seed(0)
    image, text, *teacher = (F.normalize(torch.randn(pairs, 24, generator=generator), dim=1).to(dtype) for _ in range(4))
    leaves = image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0, requires_grad=True)
    with forbid_large_tensors(pairs * pairs // 8):
        sum(DistillClipLoss()(*leaves, *teacher, 20.0)).backward()


def test_the_teacher_gets_no_gradient():
    tensors = whole(9)
    teacher = [tensors[key].requires_grad_() for key in ("teacher_image", "teacher_text", "teacher_scale")]
    contrastive, distilled = DistillClipLoss()(tensors["image"].requires_grad_(), tensors["text"], tensors["scale"], *teacher)
    (contrastive + distilled).backward()
    assert tensors["image"].grad is not None and all(part.grad is None for part in teacher)


def test_captions_alone_leave_a_zero_gradient():
    """With weight 0, contrastive inputs have a gradient, which DDP looks for; NaN in them stays out of the loss."""
    tensors = whole(9)
    tensors["text"][0] = torch.nan
    (contrastive, caption), leaves = call("CoCaLoss", CoCaLoss(1.0, 0.0), tensors)
    (contrastive + caption).backward()
    assert contrastive == 0 and caption.isfinite()
    assert all(leaves[key].grad is not None and not leaves[key].grad.any() for key in ("image", "text", "scale"))


def test_no_tokens():
    tensors = whole(9) | {"labels": torch.zeros(9, 5, dtype=torch.int64)}
    assert call("CoCaLoss", CoCaLoss(1.0, 1.0), tensors)[0][1] == 0


def refused(rank, size, name):
    tensors = whole(6)
    if rank == 1:
        tensors |= {"labels": tensors["labels"][:, :4], "teacher_image": tensors["teacher_image"][:5]}
    call(name, made(name), tensors)


def refused_label(rank, size, weight):
    tensors = whole(6)
    tensors["labels"][0, 0] += 11 * rank
    call("CoCaLoss", CoCaLoss(1.5, weight), tensors)


@pytest.mark.parametrize("name", NAMES)
def test_all_processes_stop_when_one_refuses(processes, name):
    one, other = processes.run(2, refused, name)
    assert (one.kind, other.kind) == ("RuntimeError", "ValueError") and "rank 1 of the group refused" in one.message


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_all_processes_stop_at_a_wrong_label(processes, weight):
    one, other = processes.run(2, refused_label, weight)
    assert "rank 1 of the group refused" in one.message and "allowed: 0 to 10, and pad_id, 0" in other.message


def test_labels_may_be_any_integers():
    tensors = whole(9)
    narrow = tensors | {"labels": tensors["labels"].int()}
    assert call("CoCaLoss", CoCaLoss(1.0, 1.0), tensors)[0] == call("CoCaLoss", CoCaLoss(1.0, 1.0), narrow)[0]


def test_refusals():
    tensors = whole(9)
    with pytest.raises(ValueError, match="for 9 pairs; they must be"):
        call("CoCaLoss", CoCaLoss(1.0, 1.0), tensors | {key: tensors[key][:8] for key in ("logits", "labels")})
    with pytest.raises(TypeError, match="labels torch.float64; they must be floating point and integers"):
        call("CoCaLoss", CoCaLoss(1.0, 1.0), tensors | {"labels": tensors["labels"].double()})
    with pytest.raises(ValueError, match=r"\[b, L, V\] and \[b, L\]"):
        call("CoCaLoss", CoCaLoss(1.0, 1.0), tensors | {"labels": tensors["labels"][:, :4]})
    with pytest.raises(ValueError, match="9 pairs of the student, 8 of the teacher"):
        call("DistillClipLoss", DistillClipLoss(), tensors | {key: tensors[key][:8] for key in ("teacher_image", "teacher_text")})
    with pytest.raises(ValueError, match="strategy='tree' is not one of this loss; allowed: gather, ring, grouped"):
        DistillClipLoss(strategy="tree")
    for kind in (CoCaLoss, DistillClipLoss):
        with pytest.raises(ValueError, match="use_horovod"):
            made(kind.__name__, use_horovod=True)
