"""patch_embed against a convolution per image in float64, as an operator, and its Triton kernels interpreted and compiled."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastvlp.data.patches import pack_images
from fastvlp_kernels import patch_embed
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.patch_embed import cpu, op
from fastvlp_kernels.patch_embed.positions import taps
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.25, 0.28)
SIZES = torch.tensor([[8, 12], [4, 4], [0, 4], [20, 8], [8, 12]])


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(sizes, dtype=torch.uint8, seed=0):
    values = torch.rand(3 * int(sizes.prod(1).sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (256 * values).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def parameters(patch, width, positions, dtype=torch.float64, rows=6, cols=5):
    """Leaves by name: weight and bias, and rows and cols or grid."""
    shapes = {"weight": (width, 3 * patch**2), "bias": (width,)}
    shapes |= {"factorised": {"rows": (rows, width), "cols": (cols, width)}, "grid": {"grid": (4, 3, width)}, "none": {}}[positions]
    return {name: randn(*shape, dtype=dtype, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}


def embed(pixels, sizes, leaves, patch, keep=None, impl=None, rotary=None):
    return patch_embed(
        pixels, sizes, leaves["weight"], leaves["bias"], patch_size=patch, mean=MEAN, std=STD, keep=keep, impl=impl, rotary=rotary,
        positions=leaves.get("grid", (leaves["rows"], leaves["cols"]) if "rows" in leaves else None),
    )  # fmt: skip


def convolutions(pixels, sizes, leaves, patch, keep=None, rotary=None):
    """A strided convolution of each normalised picture, positions added as pictures, rotations; everything in the leaves' dtype."""
    dtype, tokens, start = leaves["weight"].dtype, [leaves["weight"].new_zeros(0, len(leaves["weight"]))], 0
    unit, (mean, std) = 255 if pixels.dtype == torch.uint8 else 1, (torch.tensor(values, dtype=dtype) for values in (MEAN, STD))
    kernel = leaves["weight"].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    for h, w in sizes.tolist():
        image, start = pixels[start : start + 3 * h * w].view(h, w, 3), start + 3 * h * w
        if not h * w:
            continue
        x = F.conv2d(((image.to(dtype) / unit - mean) / std).permute(2, 0, 1)[None], kernel, leaves["bias"], stride=patch)
        if "rows" in leaves:
            x = x + leaves["rows"][: h // patch].T[None, :, :, None] + leaves["cols"][: w // patch].T[None, :, None]
        if "grid" in leaves:
            x = x + at_size(leaves["grid"], h // patch, w // patch)
        if rotary is not None:
            x = torch.einsum("hwij,bjhw->bihw", rotations(h // patch, w // patch, x.shape[1], rotary).to(dtype), x)
        tokens.append(x[0].flatten(1).T)
    x = torch.cat(tokens)
    return x if keep is None else x[keep]


def rotations(rows, cols, width, base):
    """[rows, cols, C, C]: exponentials of the generators of rotations in the planes of neighbouring channels."""
    generators = torch.zeros(2, width, width, dtype=torch.float64)
    for which in range(2):
        for i in range(width // 4):
            at = which * width // 2 + 2 * i
            generators[which, at + 1, at] = base ** (-2 * i / (width / 2))
    generators = generators - generators.mT
    angles = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).double()
    return torch.matrix_exp(torch.einsum("ng,gij->nij", angles, generators)).unflatten(0, (rows, cols))


def at_size(grid, rows, cols):
    """[1, C, rows, cols] by F.interpolate, which lacks half precision on CPUs, and repeats the first row of one column (PyTorch 2.13)."""
    wide = grid.permute(2, 0, 1)[None].to(torch.promote_types(grid.dtype, torch.float32))
    if cols > 1:
        return F.interpolate(wide, (rows, cols), mode="bilinear", antialias=True).to(grid.dtype)
    return F.interpolate(wide.mT, (cols, rows), mode="bilinear", antialias=True).mT.to(grid.dtype)


def gradients(x, leaves, upstream):
    zero = sum(0 * leaf.sum() for leaf in leaves.values())
    return torch.autograd.grad((x * upstream.to(x.device, x.dtype)).sum() + zero, list(leaves.values()))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=6), st.integers(1, 3), st.integers(1, 4),
       st.sampled_from(["none", "factorised", "grid"]), st.sampled_from([torch.uint8, torch.float32, torch.float64]),
       st.sampled_from(["cpu", "reference"]), st.one_of(st.none(), st.floats(0, 1)), st.sampled_from([None, 100.0]))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_images_equal_a_convolution(grids, patch, width, positions, dtype, impl, share, rotary):
    width *= 1 if rotary is None else 4
    sizes = patch * torch.tensor(grids, dtype=torch.int64).view(-1, 2)
    pixels, leaves = picture(sizes, dtype), parameters(patch, width, positions)
    total = int((sizes // patch).prod(1).sum())
    keep = None if share is None else (torch.rand(total, generator=torch.Generator().manual_seed(1)) < share).nonzero()[:, 0]
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(cpu, "ELEMENTS", 1)
        ours = embed(pixels, sizes, leaves, patch, keep, impl, rotary)
        exact = convolutions(pixels, sizes, leaves, patch, keep, rotary)
        torch.testing.assert_close(ours.x, exact, rtol=1e-10, atol=1e-10)
        upstream = randn(*exact.shape, seed=9)
        for mine, true in zip(gradients(ours.x, leaves, upstream), gradients(exact, leaves, upstream), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)
    places = [(i, 0, r, c) for i, (m, n) in enumerate(grids) for r in range(m) for c in range(n)]
    places = torch.tensor(places, dtype=torch.int64).view(-1, 4)
    places = places if keep is None else places[keep]
    assert torch.equal(ours.pos, places[:, 1:].int()) and ours.pos.dtype == torch.int32
    lengths = torch.bincount(places[:, 0], minlength=len(grids))
    assert torch.equal(ours.lengths, lengths) and ours.total == len(places) and ours.max_seqlen == max(lengths.tolist(), default=0)
    assert ours.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()] and ours.cu_seqlens.dtype == torch.int32


def test_patches_are_those_of_pack_images():
    images = [picture(size[None], seed=i).view(*size.tolist(), 3) for i, size in enumerate(SIZES[[0, 1, 3]])]
    weight = torch.eye(48, dtype=torch.float64)
    packed, ours = pack_images(images, 4), patch_embed(torch.cat([i.flatten() for i in images]), SIZES[[0, 1, 3]], weight, patch_size=4,
                                                       mean=0, std=1 / 255)  # fmt: skip
    torch.testing.assert_close(ours.x, packed.x.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.pos, packed.pos) and torch.equal(ours.cu_seqlens, packed.cu_seqlens)


@pytest.mark.parametrize("grid", [1, 4, 16])
def test_taps_are_those_of_interpolate(grid):
    for size in (1, 2, 3, 4, 7, 16, 40):
        eye = torch.eye(grid, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, 2)
        theirs = F.interpolate(eye, (size, 2), mode="bilinear", antialias=True, align_corners=False)[0, :, :, 0].T
        torch.testing.assert_close(taps(grid, size, torch.device("cpu"), torch.float64), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("positions", "rotary"), [("none", None), ("factorised", None), ("grid", None), ("grid", 100)])
def test_gradcheck(positions, rotary):
    leaves, keep = parameters(2, 3 if rotary is None else 4, positions), torch.tensor([0, 3, 4, 9])
    sizes, names = torch.tensor([[4, 6], [2, 8]]), list(leaves)
    pixels = picture(sizes)

    def tokens(*tensors):
        return embed(pixels, sizes, dict(zip(names, tensors, strict=True)), 2, keep, rotary=rotary).x

    assert torch.autograd.gradcheck(tokens, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("positions", "rotary"), [("factorised", None), ("grid", None), ("factorised", 100.0)])
def test_errors_are_no_larger_than_eager_pytorch(dtype, pixels, positions, rotary):
    sizes = torch.tensor([[32, 40], [48, 16], [40, 24]])
    pixels, leaves = picture(sizes, pixels), parameters(8, 24, positions, dtype)
    total, results = int((sizes // 8).prod(1).sum()), []
    for run, kind in ((embed, dtype), (convolutions, dtype), (convolutions, torch.float64)):
        here = {name: leaf.detach().to(kind).requires_grad_() for name, leaf in leaves.items()}
        x = run(pixels, sizes, here, 8, rotary=rotary)
        x = x if isinstance(x, torch.Tensor) else x.x
        results.append([x, *gradients(x, here, randn(total, 24, seed=9).to(dtype))])
    for name, mine, other, true in zip(("x", *leaves), *results, strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than(mine, other, true, tol=1e-6 if dtype == torch.float32 else 1e-3, name=name)


def test_pixels_are_never_all_floats_or_all_gathered():
    sizes = torch.tensor([[1024, 1024], [512, 2048]])
    pixels, leaves = picture(sizes), parameters(16, 8, "factorised", torch.float32, rows=64, cols=128)
    limit = pixels.numel() // 4
    with forbid_large_tensors(limit) as seen:
        embed(pixels, sizes, leaves, 16).x.square().sum().backward()
    assert cpu.ELEMENTS // 2 <= seen.largest < limit


def test_dropped_patches_are_neither_read_nor_multiplied(monkeypatch):
    pixels, leaves, keep = picture(SIZES, torch.float64), parameters(4, 3, "factorised"), torch.tensor([1, 6, 17])
    whole = embed(pixels, SIZES, leaves, 4).x[keep]
    gather, rows = torch.Tensor.index_select, []
    monkeypatch.setattr(torch.Tensor, "index_select", lambda t, d, i: rows.append(len(i)) or gather(t, d, i))
    torch.testing.assert_close(embed(pixels, SIZES, leaves, 4, keep).x, whole)
    assert rows[0] == 4 * len(keep)


@pytest.mark.parametrize(("positions", "rotary"), [("none", None), ("factorised", None), ("grid", None), ("none", 100.0)])
def test_opcheck(positions, rotary):
    leaves = parameters(4, 4, positions, torch.float32)
    tables = [leaves.get(name) for name in ("rows", "cols", "grid")]
    arguments = (picture(SIZES), SIZES, torch.tensor([0, 3, 8]), leaves["weight"], leaves["bias"], *tables)
    shared = (4, list(MEAN), list(STD), rotary)
    torch.library.opcheck(torch.ops.fastvlp.patch_embed.default, (*arguments, *shared, 3, torch.float32, "cpu"))
    held = [None if t is None else t.detach() for t in arguments]
    _, pos, where, _ = torch.ops.fastvlp.patch_embed(*held, *shared, 3, torch.float32, "cpu")
    backward = (torch.randn(3, 4), *held[:2], *held[3:], pos, where, *shared, [t is not None for t in arguments[3:]], "cpu")
    torch.library.opcheck(torch.ops.fastvlp.patch_embed_backward.default, backward)


@pytest.mark.parametrize(("positions", "rotary"), [("factorised", None), ("grid", 100.0)])
def test_compiled_once_for_all_images_on_meta_tensors_and_under_autocast(positions, rotary):
    leaves = parameters(4, 4, positions)
    torch._dynamo.reset()
    names = list(leaves)

    def step(pixels, sizes, *tensors):
        packed = embed(pixels * 1, sizes, dict(zip(names, tensors, strict=True)), 4, rotary=rotary)
        return packed.x.square().sum() + packed.pos.sum() * 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in (torch.cat((SIZES, SIZES, SIZES)), SIZES[:3], SIZES):
            pixels, sizes = picture(sizes), sizes.clone()  # a view is another kind of input
            ours, eager = (torch.autograd.grad(f(pixels, sizes, *leaves.values()), list(leaves.values())) for f in (compiled, step))
            for mine, true in zip(ours, eager, strict=True):
                torch.testing.assert_close(mine, true)
    meta = {name: leaf.detach().to("meta", torch.bfloat16).requires_grad_() for name, leaf in leaves.items()}
    packed = embed(picture(SIZES).to("meta"), SIZES, meta, 4, torch.tensor([0, 3]), rotary=rotary)
    assert packed.x.shape == (2, 4) and packed.x.dtype == torch.bfloat16 and packed.lengths.tolist() == [2, 0, 0, 0, 0]
    assert torch.autograd.grad(packed.x.sum(), meta["weight"])[0].shape == (4, 48)
    single = parameters(4, 4, positions, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = embed(picture(SIZES), SIZES, single, 4, rotary=rotary).x
    assert x.dtype == torch.bfloat16 and torch.autograd.grad(x.sum(), single["weight"])[0].dtype == torch.float32
    torch.testing.assert_close(x, embed(picture(SIZES), SIZES, single, 4, rotary=rotary).x.bfloat16())


@pytest.mark.parametrize(("positions", "rotary"), [("factorised", 100.0), ("grid", None)])
def test_one_upload_a_batch_and_constants_made_once(positions, rotary, monkeypatch):
    """What else comes from the host would make it wait for the device."""
    pixels, leaves, uploads, upload = picture(SIZES), parameters(4, 4, positions), [], op._upload

    def step():
        embed(pixels, SIZES, leaves, 4, torch.tensor([0, 3, 8]), rotary=rotary).x.sum().backward()

    step()
    monkeypatch.setattr(op, "_upload", lambda *args: uploads.append(args) or upload(*args))
    for module, names in ((cpu, ("_per_value",)), (op.positions, ("taps", "turns"))):
        for name in names:
            made = getattr(module, name)
            misses = made.cache_info().misses
            step()
            assert made.cache_info().misses == misses
    assert len(uploads) == 3


def test_only_needed_gradients_are_made_and_second_ones_refused(monkeypatch):
    seen = []
    for name in ("weight_backward", "table_backward"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, name=name, real=real: seen.append(name) or real(*args))
    for needed, made in (("weight", ["weight_backward"]), ("bias", []), ("cols", ["table_backward"])):
        leaves = {name: leaf.detach().requires_grad_(name == needed) for name, leaf in parameters(4, 3, "factorised").items()}
        embed(picture(SIZES), SIZES, leaves, 4).x.sum().backward()
        assert seen == made and leaves[needed].grad is not None
        seen.clear()
    leaves = parameters(4, 3, "grid")
    (gradient,) = torch.autograd.grad(embed(picture(SIZES), SIZES, leaves, 4).x.square().sum(), leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="patch_embed: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sizes": SIZES + torch.tensor([0, 1])}, ValueError, r"image 0 is \(8, 13\) pixels; .* multiples of patch_size=4: resize"),
        ({"sizes": SIZES[:3]}, ValueError, "the sizes make 336 values .* but pixels holds 1104"),
        ({"sizes": SIZES.float()}, TypeError, "sizes is torch.float32"),
        ({"sizes": SIZES[0]}, ValueError, r"sizes has shape \(2,\)"),
        ({"pixels": picture(SIZES).view(-1, 3)}, ValueError, "it must be flat"),
        ({"pixels": picture(SIZES).int()}, ValueError, "pixels is torch.int32"),
        ({"pixels": picture(SIZES, torch.float32).requires_grad_()}, ValueError, "pixels have no gradient here"),
        ({"weight": torch.zeros(3, 47)}, ValueError, r"with patches of 4 pixels it must be \[C, 48\]"),
        ({"weight": torch.zeros(3, 48).int()}, TypeError, "weight is torch.int32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); it must be \[3\]"),
        ({"positions": torch.zeros(4, 4, 2)}, ValueError, r"grid has shape \(4, 4, 2\)"),
        ({"positions": (torch.zeros(4, 3), torch.zeros(4, 3))}, ValueError, "an image has 5 rows of patches, but positions holds 4"),
        ({"positions": (torch.zeros(5, 3), torch.zeros(2, 3))}, ValueError, "an image has 3 cols of patches, but positions holds 2"),
        ({"positions": (torch.zeros(5, 3),)}, ValueError, "positions holds 1 tensors"),
        ({"keep": torch.tensor([0, 23])}, ValueError, "lie in 0 to 22"),
        ({"keep": torch.tensor([3, 3])}, ValueError, "keep must ascend"),
        ({"mean": (0.1, 0.2)}, ValueError, "mean holds 2 numbers"),
        ({"std": 0}, ValueError, "std is 0; it must be above 0"),
        ({"patch_size": 0}, ValueError, "patch_size is 0"),
        ({"rotary": 0, "weight": torch.zeros(4, 48)}, ValueError, "rotary is 0 .* must be finite and above 0"),
        ({"rotary": 100}, ValueError, "makes 3 channels; .* the channels a multiple of 4"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "move them to one device"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown"),
    ],
)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_what_does_not_fit_is_refused(changes, error, message, impl):
    usual = {"pixels": picture(SIZES), "sizes": SIZES, "weight": torch.zeros(3, 48), "patch_size": 4, "mean": 0.5, "std": 0.5, "impl": impl}
    with pytest.raises(error, match=message):
        patch_embed(**usual | changes)


def compare(sizes, patch, width, positions, dtype=torch.float32, pixels=torch.uint8, device="cpu", keep=None, rotary=None):
    images, leaves, results = picture(sizes, pixels), parameters(patch, width, positions, dtype, rows=40, cols=40), []
    for here, kind, impl in ((device, dtype, "triton"), ("cpu", torch.float64, "reference")):
        copies = {name: leaf.detach().to(here, kind).requires_grad_() for name, leaf in leaves.items()}
        packed = embed(images.to(here), sizes, copies, patch, keep, impl, rotary)
        upstream = randn(*packed.x.shape, seed=9).to(dtype)
        results.append([packed.x, packed.pos, packed.cu_seqlens, *gradients(packed.x, copies, upstream)])
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for mine, true in zip(*results, strict=True):
        scale = max(1.0, true.double().square().mean().sqrt().item()) if true.numel() else 1.0
        torch.testing.assert_close(mine.cpu().double(), true.double(), rtol=rounding, atol=rounding * scale)


def interpreted_cases() -> None:
    """Small tiles; runs in a process where Triton interprets."""
    from fastvlp_kernels.patch_embed import triton

    triton.config = lambda dtype: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    triton.PROGRAMS, triton.BLOCK_T = 4, 8
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare(SIZES, 4, 20, "factorised")
    compare(SIZES, 4, 20, "grid", torch.bfloat16, keep=torch.tensor([0, 5, 6, 7, 11, 16, 22]))
    compare(torch.tensor([[6, 8], [2, 2], [10, 4]]), 2, 5, "factorised", torch.float16)
    compare(torch.tensor([[6, 3]]), 3, 5, "none", torch.float16, torch.float32)
    compare(SIZES, 4, 20, "grid", torch.float32, torch.bfloat16, rotary=100.0)
    compare(SIZES, 4, 40, "factorised", torch.bfloat16, keep=torch.tensor([0, 5, 22]), rotary=100.0)
    compare(SIZES[:0], 4, 4, "factorised")
    for images in (2, 3, 4, 5, 8, 9, 17):
        compare(torch.tensor([[2, 2]] * images), 2, 1, "none")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch, monkeypatch):
    from fastvlp_kernels.patch_embed import triton

    names = ("_locate_kernel", "_forward_kernel", "_weight_kernel", "_table_kernel", "_turn_kernel")
    recorders = {name: Recorder(getattr(triton, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(triton, name, recorder)
    images = torch.zeros(4, 8, dtype=torch.int64)
    for patch, dtype, pixels in ((16, torch.bfloat16, torch.uint8), (14, torch.float32, torch.float32)):
        where, pos = triton.locate(images, torch.zeros(400, dtype=torch.int64), 400, patch)
        weight, flat = torch.zeros(768, 3 * patch**2, dtype=dtype), torch.zeros(4096, dtype=pixels)
        tables = [(pos[:, 1], torch.zeros(32, 768)), (pos[:, 2], torch.zeros(32, 768))]
        turn = (pos, torch.zeros(32, 384))
        for turned in (None, turn):
            out = triton.forward(flat, where, weight, None, tables, turned, patch, [127.0] * 3, [64.0] * 3, dtype)
        triton.rotate(out, *turn)
        triton.weight_backward(out, flat, where, weight, patch, [127.0] * 3, [64.0] * 3)
    triton.table_backward(out, torch.zeros(400, dtype=torch.int64), 32, torch.float32)
    for name, recorder in recorders.items():
        for launch in range(len(recorder.launches)):
            half = launch < len(recorder.launches) // 2
            if arch != 90 and not (half and name in ("_forward_kernel", "_weight_kernel")):
                continue
            recorder.compile(arch, launch).assert_fits(product=arch == 90 and half and name in ("_forward_kernel", "_weight_kernel"))


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", ["factorised", "grid"])
def test_on_the_device(dtype, positions):
    sizes = 16 * torch.tensor([[14, 14], [7, 30], [0, 3], [1, 1], [20, 9]])
    for rotary in (None, 100.0):
        compare(sizes, 16, 768, positions, dtype, device="cuda", rotary=rotary)
    compare(sizes // 16 * 14, 14, 384, positions, dtype, torch.float32, "cuda", torch.arange(0, 400, 3))
