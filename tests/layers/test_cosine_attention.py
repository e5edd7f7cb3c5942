"""CosineAttention against timm's WindowAttention and against loops over pairs of tokens in float64."""

import importlib.util
import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.rivals import import_torchvision
from fastvlp.layers import CosineAttention, RelativePositions, pairs
from fastvlp_kernels import Packed, token_select
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors

DIM, HEADS, WINDOW = 24, 3, (4, 3)


@pytest.fixture(scope="module")
def timm_attention():
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # makes one importable that was built for another torch, for timm
    pytest.importorskip("timm", reason="timm is not installed")
    return importlib.import_module("timm.models.swin_transformer_v2").WindowAttention


def disturbed(layer, seed=0):
    """The layer in float64 with every parameter moved, and one head above the largest scale."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
        layer.logit_scale[1] = math.log(100) + 0.5
    return layer


@pytest.fixture(scope="module")
def layer():
    return disturbed(CosineAttention(DIM, WINDOW, HEADS))


def log_spaced(offset, size):
    """The coordinate of an offset by the paper's formula, where a window is ``size`` wide."""
    scaled = 8 * offset / max(size - 1, 1)
    return math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled)


def places(grid, registers=0):
    rows, columns = grid
    own = [(0, r, c) for r in range(rows) for c in range(columns)]
    return torch.tensor([(index, -1, -1) for index in range(registers)] + own, dtype=torch.int32)


def batch(grids, registers=0, sizes=False, dtype=torch.float64):
    pos = [places(grid, registers) for grid in grids]
    total = sum(len(p) for p in pos)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(total, DIM, dtype=dtype, generator=generator)
    size = torch.randint(1, 5, (total,), generator=generator).float() if sizes else None
    return Packed.of(x, [len(p) for p in pos], size=size, pos=torch.cat(pos))


def looped(layer, packed):
    """Every pair of every segment by itself."""
    parts = []
    sizes = torch.ones(packed.total) if packed.size is None else packed.size
    window = layer.scaled_by
    for x, pos, size in zip(packed.segments(), *(t.split(packed.lengths.tolist()) for t in (packed.pos, sizes)), strict=True):
        q, k, v = F.linear(x, layer.qkv.weight, torch.cat((layer.q_bias, torch.zeros(DIM).double(), layer.v_bias))).split(DIM, 1)
        heads = []
        for h, (qh, kh, vh) in enumerate(zip(*(t.split(DIM // HEADS, 1) for t in (q, k, v)), strict=True)):
            scale = min(math.exp(layer.logit_scale[h].item()), 100)
            scores = torch.zeros(len(x), len(x), dtype=torch.float64)
            for i in range(len(x)):
                for j in range(len(x)):
                    scores[i, j] = scale * (qh[i] @ kh[j]) / (qh[i].norm() * kh[j].norm()) + math.log(size[j])
                    if pos[i, 1] >= 0 and pos[j, 1] >= 0:
                        away = [log_spaced(int(pos[i, a] - pos[j, a]), window[a - 1]) for a in (1, 2)]
                        hidden = layer.cpb_mlp[0](torch.tensor(away, dtype=torch.float64)).relu()
                        scores[i, j] += 16 * torch.sigmoid(hidden @ layer.cpb_mlp[2].weight[h])
            heads.append(scores.softmax(1) @ vh)
        parts.append(layer.proj(torch.cat(heads, 1)))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("window", "trained", "qkv_bias"), [((4, 3), (0, 0), True), ((3, 5), (7, 9), True), ((1, 6), (0, 0), True), ((2, 2), (1, 4), False)]
)
def test_windows_equal_timms_and_so_do_their_gradients(timm_attention, window, trained, qkv_bias):
    theirs = disturbed(timm_attention(DIM, window, HEADS, qkv_bias=qkv_bias, pretrained_window_size=trained))
    ours = CosineAttention(DIM, window, HEADS, qkv_bias, trained).double()
    assert ours.load_state_dict(theirs.state_dict()) and list(ours.state_dict()) == list(theirs.state_dict())
    # timm rounds its coordinates to float32.
    by = trained if trained[0] else window
    offsets = [[log_spaced(offset, b) for offset in range(1 - size, size)] for size, b in zip(window, by, strict=True)]
    exact = torch.cartesian_prod(*(torch.tensor(side, dtype=torch.float64) for side in offsets)).view_as(theirs.relative_coords_table)
    torch.testing.assert_close(theirs.relative_coords_table, exact, rtol=1e-6, atol=1e-6)
    theirs.relative_coords_table.copy_(exact)
    x = torch.randn(5, window[0] * window[1], DIM, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(found)
    names = [name for name, _ in ours.named_parameters()]
    grads = torch.autograd.grad(found, [x, *ours.parameters()], upstream)
    others = dict(theirs.named_parameters())
    wanted = torch.autograd.grad(expected, [x, *(others[name] for name in names)], upstream)
    for name, one, other in zip(["x", *names], grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, msg=name)
    assert grads[1 + names.index("logit_scale")][1] == 0 and grads[1 + names.index("logit_scale")][0] != 0


def test_packed_images_of_several_sizes_equal_loops(layer):
    packed = batch([(2, 3), (4, 3), (1, 1), (5, 2), (2, 3)], registers=1, sizes=True)
    kept = token_select(torch.rand(packed.total), packed.cu_seqlens, 0.8, lengths=packed.lengths, protected=1).apply(packed)
    for tokens in (packed, kept):
        torch.testing.assert_close(layer(tokens).x, looped(layer, tokens), rtol=1e-10, atol=1e-10)
    assert kept.total < packed.total


def test_windows_are_packed_images(layer):
    packed = batch([WINDOW] * 4)
    torch.testing.assert_close(layer(packed.x.view(4, -1, DIM)).flatten(0, 1), layer(packed).x)


def test_parts_of_shifted_windows_as_segments_need_no_mask(timm_attention, layer):
    """A picture of 8 x 6 rolled by (2, 1): windows hold parts from its opposite sides, which timm keeps apart by a mask."""
    theirs = timm_attention(DIM, WINDOW, HEADS).double()
    theirs.load_state_dict(layer.state_dict())
    picture = torch.randn(8, 6, DIM, dtype=torch.float64)
    part = torch.zeros(8, 6, dtype=torch.int64)
    for number, (rows, columns) in enumerate((r, c) for r in (slice(6), slice(6, 8)) for c in (slice(5), slice(5, 6))):
        part[rows, columns] = number

    def windows(t):
        return t.unflatten(0, (2, 4)).unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    x, parts = windows(picture), windows(part)
    mask = torch.where(parts[:, :, None] == parts[:, None], 0.0, -torch.inf).double()
    expected = theirs(x, mask)
    segments, where = [], []
    for window in range(4):
        for number in parts[window].unique():
            where.append((window, (parts[window] == number).nonzero().squeeze(1)))
            segments.append(x[window, where[-1][1]])
    assert len(segments) == 9
    found = layer(Packed.from_list(segments, [places(WINDOW)[tokens] for _, tokens in where])).segments()
    for (window, tokens), mine in zip(where, found, strict=True):
        torch.testing.assert_close(mine, expected[window, tokens], rtol=1e-6, atol=1e-6)  # timm's coordinates are float32


@pytest.mark.parametrize("scores", [1, 200, 1 << 22])
def test_gradients_and_memory_of_pieces(layer, monkeypatch, scores):
    """Segments of unequal lengths in an order that is worth sorting; with few scores at a time, backward computes them again."""
    packed = batch([(3, 4), (1, 2), (2, 2), (3, 4), (1, 2), (2, 2)] * 3, registers=1, sizes=True)
    relative = RelativePositions.of(packed)
    assert relative.pairs.order is not None
    with monkeypatch.context() as unsorted:
        pairs.plan.cache_clear()
        unsorted.setattr(importlib.import_module(pairs.plan.__module__), "TOKENS_PER_RUN", 0)
        plain = RelativePositions.of(packed)
        pairs.plan.cache_clear()
    assert plain.pairs.order is None
    whole = layer(packed, plain).x
    wanted = torch.autograd.grad(whole, tuple(layer.parameters()), torch.ones_like(whole))
    monkeypatch.setattr(pairs, "SCORES", scores)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        found = layer(packed, relative).x
    most = max((math.prod(shape) for shape in kept if len(shape) == 4 and shape[2] == shape[3]), default=0)
    assert most == 0 if scores < 1 << 22 else most > 0
    torch.testing.assert_close(found, whole)
    grads = torch.autograd.grad(found, tuple(layer.parameters()), torch.ones_like(whole))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)
    x = packed.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(packed.replace(x=x), relative).x, x, fast_mode=True)


def test_no_tensor_holds_the_pairs_of_all_tokens(layer, monkeypatch):
    monkeypatch.setattr(pairs, "SCORES", 1)
    packed = batch([(6, 6)] * 12)
    relative = RelativePositions.of(packed)
    x = packed.x.clone().requires_grad_()
    with forbid_large_tensors(packed.total * DIM * 6):  # one segment has 3,888 scores, the batch 186,624 pairs in each head
        layer(packed.replace(x=x), relative).x.sum().backward()
    assert x.grad is not None and packed.total * DIM * 6 < packed.total**2


def test_through_flex_attention(layer, monkeypatch):
    """Its masks, biases and gradients, uncompiled. PyTorch refuses gradients on CPUs, having no kernel there: the refusal is lifted."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    if not hasattr(flex, "_validate_device"):
        pytest.skip("this torch refuses gradients of FlexAttention on CPUs elsewhere")
    packed = batch([(4, 3), (9, 10), (2, 2), (8, 6)], registers=1, sizes=True)
    names = [name for name, _ in layer.named_parameters()]
    expected = layer(packed).x
    wanted = torch.autograd.grad(expected.square().sum(), tuple(layer.parameters()))
    monkeypatch.setattr(pairs, "flexes", lambda v: True)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    found = layer(packed).x
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, one, other in zip(names, torch.autograd.grad(found.square().sum(), tuple(layer.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():
        windows = packed.x[: 2 * 12].view(2, 12, DIM)
        through = layer(windows)
        monkeypatch.undo()
        torch.testing.assert_close(through, layer(windows))


def test_blocks_cover_every_pair_that_is_seen():
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    for lengths, causal in (([5, 300, 7, 200, 1], False), ([128, 128, 384], False), ([40] * 9, True), ([1], True)):
        seen = (lambda i, j: i >= j) if causal else None
        mask = pairs.Pairs.of(torch.tensor(lengths), "cpu", seen=seen, causal=causal).block_mask
        n = sum(lengths)
        assert mask.shape == (1, 1, n, n)
        exact = flex.create_block_mask(mask.mask_mod, None, None, n, n, device="cpu").to_dense()
        assert torch.equal(mask.to_dense(), exact)


def test_relative_positions_are_made_once_and_places_beyond_the_grid_are_on_its_border(layer):
    packed = batch([(4, 3), (2, 5)])
    relative = RelativePositions.of(packed)
    assert relative.grid == (4, 5)
    for other in (relative, RelativePositions.of(packed, (4, 5)), RelativePositions.of(packed, (7, 9))):
        torch.testing.assert_close(layer(packed, other).x, layer(packed).x)
    near = packed.replace(pos=torch.cat((packed.pos[:, :2], packed.pos[:, 2:].clamp_max(2)), 1))
    torch.testing.assert_close(layer(packed, RelativePositions.of(packed, (4, 3))).x, layer(near).x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_worse_than_timms(timm_attention, layer, dtype):
    theirs, ours, exact = timm_attention(DIM, WINDOW, HEADS), CosineAttention(DIM, WINDOW, HEADS), CosineAttention(DIM, WINDOW, HEADS)
    for module in (theirs, ours, exact):
        module.load_state_dict(layer.state_dict())
        module.to(dtype)
    x = torch.randn(64, 12, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = ours(x)
    assert found.dtype == dtype
    assert_no_worse_than(found, theirs(x), exact.double()(x.double()))


def test_autocast(timm_attention, layer):
    """The errors are smaller than timm's in the mean over draws; in one draw of ten its largest is smaller by luck."""
    theirs, ours, exact = timm_attention(DIM, WINDOW, HEADS), CosineAttention(DIM, WINDOW, HEADS), CosineAttention(DIM, WINDOW, HEADS)
    for module in (theirs, ours, exact):
        module.load_state_dict(layer.state_dict())
    exact.double()
    errors = []
    for _ in range(16):
        x = torch.randn(64, 12, DIM)
        with torch.autocast("cpu", torch.bfloat16):
            found, eager = ours(x), theirs(x)
        assert found.dtype == torch.bfloat16
        errors.append([error(out, exact(x.double())) for out in (found, eager)])
    mine, timms = torch.tensor(errors).mean(0)
    assert (mine <= timms).all(), f"(root mean square, largest) relative error {mine.tolist()}, timm's {timms.tolist()}"


def test_windows_compile_in_one_graph(layer):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 12, DIM, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(*(torch.autograd.grad(call(x).square().sum(), x)[0] for call in (compiled, layer)))


def test_empty_and_wrong_inputs(layer):
    assert layer(torch.zeros(0, 12, DIM, dtype=torch.float64)).shape == (0, 12, DIM)
    nothing = Packed.of(torch.zeros(0, DIM, dtype=torch.float64), [0, 0], pos=torch.zeros(0, 3, dtype=torch.int32))
    assert layer(nothing).x.shape == (0, DIM)
    for make, message in (
        (lambda: CosineAttention(10, WINDOW, 3), "they must divide the width"),
        (lambda: CosineAttention(10, WINDOW, 0), "0 heads; there must be at least 1"),
        (lambda: CosineAttention(24, (0, 3), 3), r"window_size=\(0, 3\)"),
        (lambda: layer(torch.zeros(2, 11, DIM)), r"x is \(2, 11, 24\); windows must be \[B, 12, C\]"),
        (lambda: layer(Packed.of(torch.zeros(4, DIM), [4])), "the batch has no pos"),
        (lambda: layer(Packed.of(torch.zeros(4, 5), [4])), r"the tokens of x have shape \(4, 5\); this layer was made for \[T, 24\]"),
        (lambda: RelativePositions.of(batch([(2, 2)]), (0, 4)), r"grid=\(0, 4\)"),
        (lambda: layer(batch([(2, 2)]), RelativePositions.of(batch([(2, 3)]))), "q has 4 tokens, the batch that the pairs were made for 6"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
