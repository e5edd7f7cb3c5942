"""What is counted is what PyTorch counts for the padded twins of the towers, sample by sample, and for autograd's own backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvlp.ops import grouped_linear
from fastvlp.systems.flops import FlopCount, visible_pairs
from fastvlp.systems.system import freeze
from fastvlp.towers import padded
from tests.systems.small import make, text, vit, whole


def plain(tower, packed, train=False):
    """Operations of each sample by itself, with attention as two products."""
    total = 0
    starts = packed.cu_seqlens.tolist()
    for low, high in zip(starts, starts[1:], strict=False):
        x, pos = packed.x[None, low:high], packed.pos[None, low:high]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = padded.encode(tower, x, torch.ones(x.shape[:2], dtype=torch.bool), pos)
            if train:
                out.sum().backward()
        total += counter.get_total_flops()
    return total


def freeze_first(tower):
    freeze(tower.blocks[0])
    return tower


@pytest.mark.parametrize("tower, stream", [(vit(), "image"), (text(), "text"), (freeze(vit()), "image"), (freeze_first(vit()), "image"),
                                           (freeze_first(text()), "text")])
def test_operations_are_those_that_pytorch_counts_forward_and_backward(tower, stream):
    packed = whole().streams[stream]
    tower = tower.double()
    with FlopCount(tower) as counted:
        tower(packed)
    assert sum(counted.forward.values()) == plain(tower, packed)
    if any(p.requires_grad for p in tower.parameters()):
        assert counted.needed == plain(tower, packed, train=True)
    else:
        assert not any(counted.backward.values())
    assert counted.tokens["blocks.1"] == packed.total and counted.forward["blocks.1.up"] == 2 * 32 * 128 * packed.total


def test_a_frozen_part_above_a_trained_one_needs_half_of_a_backward():
    tower = vit().double()
    freeze(tower.blocks[1])
    with FlopCount(tower) as counted:
        tower(whole().image)
    assert counted.backward["blocks.1.up"] == counted.forward["blocks.1.up"]
    assert counted.backward["blocks.0.up"] == 2 * counted.forward["blocks.0.up"]


def test_pytorch_s_own_counter_sees_our_operators():
    tower, packed = text(), whole().text
    with FlopCounterMode(display=False) as counter:
        tower(packed)
    assert counter.get_total_flops() == plain(tower, packed)


def test_a_linear_layer_by_types_counts_as_one():
    layer = torch.nn.Linear(4, 5)
    weight, x = torch.stack([layer.weight] * 3), torch.randn(7, 4)
    found = []
    for call in (lambda: grouped_linear(x, torch.arange(7) % 3, weight), lambda: layer(x)):
        with FlopCounterMode(display=False) as counter, FlopCount() as counted:
            call()
        found.append((counter.get_total_flops(), counted.needed))
    assert found[0] == found[1] == (2 * 7 * 4 * 5, 2 * 2 * 7 * 4 * 5)


@pytest.mark.parametrize("name", ["dlip", "brivl", "blip2"])
def test_without_gradients_the_same_is_counted(name):
    """Momentum copies and teachers run without gradient, always; what trains is told apart all the same."""
    system, batch = make(name), whole()
    batch = batch.take(range(len(batch)))
    object.__setattr__(batch, "counts", system.counts(batch))
    found = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCount(system) as counted:
            system.objective(system.encode(batch), batch)
        found.append((dict(counted.forward), dict(counted.backward)))
    assert found[0] == found[1]
    frozen = {name for name in found[0][0] if name.startswith(("teacher", "followers"))}
    assert (name == "blip2") != bool(frozen) and not any(found[0][1][name] for name in frozen)


@pytest.mark.parametrize("seed", range(5))
def test_visible_pairs_are_those_of_a_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths, keys, prefix = (torch.randint(0, 7, (6,), generator=generator) for _ in range(3))
    types = [torch.randint(0, 3, (int(side.sum()),), generator=generator) for side in (lengths, keys)]
    sees = torch.randint(0, 2, (3, 3), generator=generator).bool()
    causal = full = given = typed = typed_all = first_q = first_k = 0
    for n, m, p in zip(lengths.tolist(), keys.tolist(), prefix.tolist(), strict=True):
        for query in range(n):
            for key in range(m):
                full += 1
                causal += key <= query + m - n
                given += key <= query + m - n or key < p
                pair = bool(sees[types[0][first_q + query], types[1][first_k + key]])
                typed, typed_all = typed + (pair and (key <= query + m - n or key < p)), typed_all + pair
        first_q, first_k = first_q + n, first_k + m
    assert visible_pairs(lengths, keys, False) == full and visible_pairs(lengths, keys, True) == causal
    assert visible_pairs(lengths, keys, True, prefix) == given
    assert visible_pairs(lengths, keys, True, prefix, *types, sees) == typed
    assert visible_pairs(lengths, keys, False, None, *types, sees) == typed_all
