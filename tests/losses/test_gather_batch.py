"""Every objective across processes by ``gather_batch``: the mean of the losses and all gradients are those of one process."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from processes import Failed

from fastvlp import losses
from fastvlp.losses import gather_batch
from fastvlp.ops import Packed

WIDTH, SCALE = 8, 12.0


def pairs(count, seed=0):
    """Leaves [count, WIDTH] of float64, and what else objectives ask of a pair."""
    random = torch.Generator().manual_seed(seed)

    def features(*shape):
        return F.normalize(torch.randn(count, *shape, generator=random, dtype=torch.float64), dim=-1)

    image = features(WIDTH)
    return {
        "image": image, "text": F.normalize(image + features(WIDTH), dim=-1), "hard": features(WIDTH),
        "of_image": features(WIDTH) - 3, "of_text": features(WIDTH) - 2, "keys": features(3, 2, 4), "values": features(3, 2, 4),
        "queries": features(2, 4), "patches": features(4, WIDTH), "words": features(2, WIDTH),
        "ids": torch.arange(count) // 2 % 4, "weights": torch.rand(count, generator=random, dtype=torch.float64),
    }  # fmt: skip


def packed(tokens):
    return Packed.of(tokens.flatten(0, 1), [tokens.shape[1]] * len(tokens))


def everyone(gather, own, *names):
    return gather(*(own[name] for name in names))


def contrastive(gather, own, scale):
    image, text, hard, ids, weights = everyone(gather, own, "image", "text", "hard", "ids", "weights")
    loss = partial(losses.contrastive_loss, image, text, scale, group=losses.ALONE)
    several = loss(ids=ids, weights=weights, label_smoothing=0.1, text_negatives=hard)
    nested = loss(prefixes=(2, 5, WIDTH), ids=ids, equal_ids="exclude", tau_plus=0.1)
    return several + nested + loss(focal_gamma=2.0)


def filip(gather, own, scale):
    return losses.filip_loss(*gather(packed(own["patches"]), packed(own["words"])), scale)


def grouping(gather, own, scale):
    return losses.grouping_loss(*gather(packed(own["patches"]), packed(own["words"])), scale)


def light(gather, own, scale):
    return losses.light_clip_loss(*everyone(gather, own, "image", "text"), scale, soft=0.3)


def rank(gather, own, scale):
    return losses.rank_clip_loss(*everyone(gather, own, "image", "text"), scale)


def focal(gather, own, scale):
    return losses.focal_sigmoid_loss(*everyone(gather, own, "image", "text"), scale, -3.0)


def proto(gather, own, scale):
    image, text, ids = everyone(gather, own, "image", "text", "ids")
    return losses.proto_clip_loss(image, losses.back_translate(image, ids, 4), ids, scale, teacher=losses.back_translate(text, ids, 4))


def prolip(gather, own, scale):
    means = everyone(gather, own, "image", "of_image", "text", "of_text")
    return losses.prolip_loss(*means, scale, -3.0) + losses.inclusion_loss(*means) + losses.gaussian_kl(*means[:2])


def llip(gather, own, scale):
    return losses.llip_loss(*everyone(gather, own, "keys", "values", "queries", "text"), scale, -3.0)


OBJECTIVES = (contrastive, filip, grouping, light, rank, focal, proto, prolip, llip)


def computed(gather, objective, own):
    leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point() and name != "weights") for name, tensor in own.items()}
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = objective(gather, leaves, scale)
    loss.backward()
    return loss.item(), scale.grad.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def on_a_process(rank, size, objective, sizes):
    start = sum(sizes[:rank])
    return computed(gather_batch, objective, {name: part[start : start + sizes[rank]] for name, part in pairs(sum(sizes)).items()})


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5, 2)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.__name__)
def test_equals_one_process(processes, objective, sizes):
    """Gradients of own rows are W times theirs in the whole batch, which DDP's average over the towers' parameters takes back."""
    loss, of_scale, gradients = computed(lambda *parts: parts, objective, pairs(sum(sizes)))
    answers = processes.results(len(sizes), on_a_process, objective, sizes)
    assert sum(answer[0] for answer in answers) / len(sizes) == pytest.approx(loss, rel=1e-12)
    assert sum(answer[1] for answer in answers) / len(sizes) == pytest.approx(of_scale, rel=1e-9)
    for rank, (_, _, own) in enumerate(answers):
        assert own.keys() == gradients.keys() and gradients
        for name, gradient in own.items():
            want = gradients[name].split(sizes)[rank]
            torch.testing.assert_close(gradient / len(sizes), want, rtol=1e-9, atol=1e-12)


def mixed(rank, size):
    rows = torch.arange(rank + 1)
    segments = Packed.of(torch.full((rank, 2), float(rank)), [rank], pos=torch.full((rank, 3), rank, dtype=torch.int32))
    gathered = gather_batch(rows, rows > 0, rows[:, None].bfloat16(), segments)
    return [*gathered[:3], gathered[3].x, gathered[3].pos, gathered[3].lengths]


def test_other_dtypes_and_segments_keep_their_kind(processes):
    for rows, true, half, x, pos, lengths in processes.results(3, mixed):
        assert rows.tolist() == [0, 0, 1, 0, 1, 2] and rows.dtype == torch.int64
        assert true.tolist() == [False, False, True, False, True, True] and half.dtype == torch.bfloat16 and half.shape == (6, 1)
        assert x.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]] and pos[:, 0].tolist() == [1, 2, 2] and lengths.tolist() == [0, 1, 2]


def with_half(rank, size, wrong):
    part = torch.randn(2, 3)
    return gather_batch(*wrong) if rank == size - 1 else gather_batch(part)


@pytest.mark.parametrize(
    "wrong,of_wrong,of_others",
    [
        ((["a"],), "TypeError", "refused its input"),
        ((torch.randn(2, 3).half(),), "ValueError", "differ in the dtype or the width of tensor 0"),
        ((torch.randn(2, 4),), "ValueError", "differ in the dtype or the width of tensor 0"),
        ((torch.randn(2, 3), torch.randn(2, 3)), "ValueError", "differ in the number of tensors (1 and 2)"),
    ],
)
def test_processes_that_differ_are_told(processes, wrong, of_wrong, of_others):
    *others, last = processes.run(3, with_half, wrong)
    assert isinstance(last, Failed) and last.kind == of_wrong
    for other in others:
        assert isinstance(other, Failed) and of_others in other.message


def test_one_process_gets_its_parts_back():
    part = torch.randn(2, 3)
    assert gather_batch(part)[0] is part
    with pytest.raises(TypeError, match="a part is list; allowed: tensors"):
        gather_batch([part])
