"""``patch_embed``: pixels of ragged images to tokens, with normalisation, positions and dropping in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp_kernels import _check, _inputs, _op
from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels.packed import Packed

from . import positions, reference

NAME = "patch_embed"
IMPLEMENTATIONS = ("triton", "cpu", "reference")


@_op.custom_op(NAME)
def _embed(
    pixels: Tensor, sizes: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None,
    grid: Tensor | None, patch_size: int, mean: list[float], std: list[float], rotary: float | None, total: int, dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values(pixels, sizes, keep, rows, cols, patch_size)
    shapes, cells = _shapes(sizes // patch_size)
    patches, S = (sizes // patch_size).prod(1), len(sizes)
    images = torch.stack((_before(patches), _before(3 * sizes.prod(1)), sizes[:, 1] // patch_size, cells))
    module = _op.module(__package__, impl)
    # One copy for all the small tables: each copy costs the host more than the bytes do.
    numbers = _upload(torch.cat((images.flatten(), patches.sum(0, keepdim=True), *([] if keep is None else [keep]))), pixels.device)
    images, kept = numbers[: 4 * S].view(4, S), None if keep is None else numbers[4 * S + 1 :]
    where, pos = module.locate(images, kept, total, patch_size)
    starts = torch.cat((images[0], numbers[4 * S : 4 * S + 1]))
    starts = (starts if kept is None else torch.searchsorted(kept, starts)).int()
    tables = [] if rows is None or cols is None else [(pos[:, 1], rows), (pos[:, 2], cols)]
    stored = [_stored(pixels, values) for values in (mean, std)]
    if grid is not None:
        tables = [(where[:, 2], positions.resize(grid, shapes, sum_dtype(dtype)))]
    turn = None if rotary is None else (pos, _turns(rotary, sizes, patch_size, weight, sum_dtype(dtype)))
    return module.forward(pixels, where, weight, bias, tables, turn, patch_size, *stored, dtype), pos, where, starts


@_embed.register_fake
def _(pixels, sizes, keep, weight, bias, rows, cols, grid, patch_size, mean, std, rotary, total, dtype, impl):
    pos, where = (weight.new_empty((total, 3), dtype=kind) for kind in (torch.int32, torch.int64))
    starts = weight.new_empty(sizes.shape[0] + 1, dtype=torch.int32)
    return weight.new_empty((total, weight.shape[0]), dtype=dtype), pos, where, starts


@_op.custom_op(f"{NAME}_backward")
def _embed_backward(
    grad: Tensor, pixels: Tensor, sizes: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None,
    grid: Tensor | None, pos: Tensor, where: Tensor, patch_size: int, mean: list[float], std: list[float], rotary: float | None,
    needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module, acc = _op.module(__package__, impl), sum_dtype(grad.dtype)
    grad = grad.contiguous()
    results = [weight.new_empty(0, dtype=dtype) for dtype in _dtypes(weight, bias, rows, cols, grid)]
    if rotary is not None:
        # A rotation's transpose is the rotation back; from here on the gradient is that of the sum before it.
        grad = module.rotate(grad, pos, _turns(rotary, sizes, patch_size, weight, acc, back=True))
    if needs[0]:
        stored = [_stored(pixels, values) for values in (mean, std)]
        results[0] = module.weight_backward(grad, pixels, where, weight, patch_size, *stored)
    if needs[1]:
        results[1] = grad.sum(0, dtype=acc).to(results[1].dtype)
    for i, table in ((2, rows), (3, cols)):
        if table is not None and needs[i]:
            results[i] = module.table_backward(grad, pos[:, i - 1], table.shape[0], acc).to(table.dtype)
    if grid is not None and needs[4]:
        shapes, _ = _shapes(sizes // patch_size)
        cells = module.table_backward(grad, where[:, 2], sum(m * n for m, n in shapes), acc)
        results[4] = positions.resize_backward(cells, grid, shapes).to(grid.dtype)
    return results[0], results[1], results[2], results[3], results[4]


@_embed_backward.register_fake
def _(grad, pixels, sizes, weight, bias, rows, cols, grid, pos, where, patch_size, mean, std, rotary, needs, impl):
    parameters = (weight, bias, rows, cols, grid)
    return tuple(
        weight.new_empty(t.shape if need else (0,), dtype=dtype)
        for t, need, dtype in zip(parameters, needs, _dtypes(*parameters), strict=True)
    )


def _setup(ctx, inputs, output) -> None:
    pixels, sizes, _, weight, bias, rows, cols, grid, ctx.patch_size, ctx.mean, ctx.std, ctx.rotary, _, _, ctx.impl = inputs
    ctx.save_for_backward(pixels, sizes, weight, bias, rows, cols, grid, *output[1:3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    needs = [ctx.needs_input_grad[i] for i in range(3, 8)]
    fixed = (ctx.patch_size, ctx.mean, ctx.std, ctx.rotary, needs, ctx.impl)
    results = torch.ops.fastvlp.patch_embed_backward(grad, *ctx.saved_tensors, *fixed)
    return None, None, None, *(r if need else None for r, need in zip(results, needs, strict=True)), *[None] * 7


_op.differentiate(NAME, _embed, _embed_backward, _setup, _backward)


def _dtypes(weight: Tensor, *others: Tensor | None) -> list[torch.dtype]:
    return [weight.dtype if t is None else t.dtype for t in (weight, *others)]


def _stored(pixels: Tensor, values: Sequence[float]) -> list[float]:
    return [255 * value for value in values] if pixels.dtype == torch.uint8 else list(values)


def _turns(rotary: float, sizes: Tensor, patch_size: int, weight: Tensor, dtype: torch.dtype, back: bool = False) -> Tensor:
    places = int(sizes.max()) // patch_size if len(sizes) else 0
    return positions.turns(rotary, places, weight.shape[0], back, weight.device, dtype)


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the host does not wait for the device."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def _before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _shapes(grids: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """The different (rows, columns) of patches, sorted, and where the cells of each image's own start when they lie end to end."""
    shapes, which = torch.unique(grids, dim=0, return_inverse=True)
    return [(m, n) for m, n in shapes.tolist() if m * n], _before(shapes.prod(1))[which]


def patch_embed(
    pixels: Tensor,
    sizes: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    positions: Tensor | tuple[Tensor, Tensor] | None = None,
    rotary: float | None = None,
    keep: Tensor | None = None,
    impl: str | None = None,
) -> Packed:
    """Images of any sizes, end to end in one buffer, to packed tokens: weight (pixel - mean) / std + bias + position of every patch.

    The patches are never laid out in memory, neither as floats nor as bytes, and dropped ones are not read (FLIP,
    https://arxiv.org/abs/2212.00794). Positions are factorised (NaViT, https://arxiv.org/abs/2307.06304): rows[row] + cols[col]; or one
    learned grid that each image sees as ``interpolate(grid, mode="bilinear", antialias=True)`` at its own size (SigLIP 2). ``rotary``
    turns that sum in two dimensions (after RoFormer, https://arxiv.org/abs/2104.09864): channels 2 i and 2 i + 1 of the first half are
    a plane turned by row * rotary^(-4 i / C); those of the second half, counted from its start, in the same way by the column.
    On uint8 pixels bfloat16 and float16 products round the weights alone, because 0 to 255 are exact there.

    Args:
        pixels: [sum of 3 h w]: uint8 in 0..255 or floating point in 0..1, each image row by row, channels last. Has no gradient.
        sizes: integers [S, 2] on the CPU: height and width in pixels, multiples of ``patch_size``. On a CUDA device: a synchronisation.
        weight: [C, P P 3], values of a patch in the order row, column, channel, which a convolution's weight [C, 3, P, P] has
            after ``.permute(0, 2, 3, 1).flatten(1)``. bias: [C].
        patch_size: P. mean, std: of pixels in 0..1; one number, or one for each of the three channels.
        positions: (rows [G, C], cols [G', C]), with G and G' at least the patches in a column and row; or grid [G, G', C].
        rotary: the base of the angles, usually 100 to 10000; None: nothing is turned. C must be a multiple of 4.
        keep: int64, ascending: which patches of all images' are embedded. On a CUDA device: a synchronisation.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        Packed: x [T, C] in autocast's dtype, else that of ``weight``, summed in float32 (float64 for float64) and rounded once; pos
        int32 [T, 3], (0, row, column) in patches; a segment per image.

    Raises:
        ValueError, TypeError: shapes, sizes, dtypes or devices do not fit; pixels that need a gradient.
        RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    sizes, keep = _host("sizes", sizes), None if keep is None else _host("keep", keep)
    rows, cols, grid = _tables(positions)
    _check_tensors(pixels, sizes, keep, weight, bias, rows, cols, grid, patch_size)
    shift, scale = _channels("mean", mean), _channels("std", std)
    if min(scale) <= 0:
        raise ValueError(f"{NAME}: std is {std}; it must be above 0")
    if rotary is not None and not (0 < rotary < float("inf") and weight.shape[0] % 4 == 0):
        raise ValueError(
            f"{NAME}: rotary is {rotary} and the weight makes {weight.shape[0]} channels; rotary must be finite and above 0, and "
            "the channels a multiple of 4: pairs for the row and pairs for the column"
        )
    rotary = None if rotary is None else float(rotary)
    dtype = _inputs.product_dtype(NAME, weight, None)
    chosen = _op.choose(NAME, impl, pixels.device, IMPLEMENTATIONS, (dtype, pixels.dtype), (pixels, weight, bias, rows, cols, grid))
    total = pixels.shape[0] // (3 * patch_size**2) if keep is None else keep.shape[0]
    if chosen == "reference":
        _check_values(pixels, sizes, keep, rows, cols, patch_size)
        x, pos = reference.patch_embed(
            pixels, sizes.tolist(), keep, weight, bias, rows, cols, grid, patch_size, shift, scale, rotary, dtype
        )
    else:
        x, pos, _, starts = torch.ops.fastvlp.patch_embed(
            pixels, sizes, keep, weight, bias, rows, cols, grid, patch_size, shift, scale, rotary, total, dtype, chosen
        )
    patches = (sizes // patch_size).prod(1)
    lengths = patches if keep is None else torch.searchsorted(keep, torch.stack((_before(patches), patches.cumsum(0)))).diff(dim=0)[0]
    if chosen == "reference":
        starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(pixels.device, torch.int32)
    # Read here while compiling, it would be baked into the graph; the total bounds it.
    longest = total if torch.compiler.is_compiling() else int(lengths.max()) if len(lengths) else 0
    return Packed(x, starts, lengths, total, longest, pos=pos)


def _host(name: str, numbers: Tensor) -> Tensor:
    _check.plain_tensors(NAME, **{name: numbers})
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{NAME}: {name} is {numbers.dtype}; it must be an integer tensor")
    return numbers.detach().to("cpu", torch.int64).contiguous()


def _tables(positions: Tensor | Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if positions is None or isinstance(positions, Tensor):
        return None, None, positions
    if len(positions) != 2:
        raise ValueError(f"{NAME}: positions holds {len(positions)} tensors; it must be (rows [G, C], cols [G, C]) or a grid [G, G, C]")
    return positions[0], positions[1], None


def _channels(name: str, values: float | Sequence[float]) -> list[float]:
    channels = [float(values)] * 3 if isinstance(values, (int, float)) else [float(value) for value in values]
    if len(channels) != 3:
        raise ValueError(f"{NAME}: {name} holds {len(channels)} numbers; it must be one, or one for each of the 3 channels")
    return channels


def _check_tensors(
    pixels: Tensor, sizes: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None,
    grid: Tensor | None, patch_size: int,
) -> None:  # fmt: skip
    parameters = {"weight": weight, "bias": bias, "rows": rows, "cols": cols, "grid": grid}
    _check.plain_tensors(NAME, 2, pixels=pixels, **parameters)
    if pixels.ndim != 1 or pixels.dtype not in (torch.uint8, *_check.FLOATS):
        got = f"{pixels.dtype} {tuple(pixels.shape)}"
        raise ValueError(f"{NAME}: pixels is {got}; it must be flat, uint8 or floating point (flatten each [h, w, 3] and join them)")
    if pixels.requires_grad:
        raise ValueError(f"{NAME}: pixels have no gradient here; pass pixels.detach()")
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"{NAME}: sizes has shape {tuple(sizes.shape)}; it must be [images, 2]: height and width in pixels")
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"{NAME}: patch_size is {patch_size}; it must be an int of at least 1")
    if keep is not None and keep.ndim != 1:
        raise ValueError(f"{NAME}: keep has shape {tuple(keep.shape)}; it must be [T]: which patches are embedded")
    values = 3 * patch_size**2
    if weight.ndim != 2 or weight.shape[1] != values or not weight.shape[0]:
        raise ValueError(f"{NAME}: weight has shape {tuple(weight.shape)}; with patches of {patch_size} pixels it must be [C, {values}]")
    C = weight.shape[0]
    for name, tensor, ndim in (("bias", bias, 1), ("rows", rows, 2), ("cols", cols, 2), ("grid", grid, 3)):
        if tensor is not None and (tensor.ndim != ndim or tensor.shape[-1] != C or not tensor.numel()):
            form = {"bias": f"[{C}]", "grid": f"[G, G, {C}]"}.get(name, f"[G, {C}]")
            raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}; it must be {form}, as wide as the weight")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype not in _check.FLOATS:
            raise TypeError(f"{NAME}: {name} is {parameter.dtype}; allowed: float32, bfloat16, float16, float64")


def _check_values(pixels: Tensor, sizes: Tensor, keep: Tensor | None, rows: Tensor | None, cols: Tensor | None, patch_size: int) -> None:
    odd = ((sizes < 0) | (sizes % patch_size != 0)).any(1)
    if odd.any():
        i = int(odd.int().argmax())
        raise ValueError(
            f"{NAME}: image {i} is {tuple(sizes[i].tolist())} pixels; height and width must be multiples of patch_size={patch_size}: "
            "resize or crop it"
        )
    values = 3 * int(sizes.prod(1).sum())
    if values != pixels.shape[0]:
        raise ValueError(f"{NAME}: the sizes make {values} values (3 h w each), but pixels holds {pixels.shape[0]}")
    patches = values // (3 * patch_size**2)
    if keep is not None and len(keep) and not (keep[0] >= 0 and keep[-1] < patches and bool((keep.diff() > 0).all())):
        raise ValueError(f"{NAME}: keep must ascend, without a patch twice, and lie in 0 to {patches - 1}: sort it")
    for name, table, side in (("rows", rows, 0), ("cols", cols, 1)):
        most = int(sizes[:, side].max()) // patch_size if len(sizes) else 0
        if table is not None and table.shape[0] < most:
            raise ValueError(f"{NAME}: an image has {most} {name} of patches, but positions holds {table.shape[0]}; give it more {name}")
