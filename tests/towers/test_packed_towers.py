"""Each tower equals a loop over its segments in plain float64 mathematics, in values and gradients, and padding changes nothing."""

import copy

import pytest
import torch

from fastvlp.data import pack_images
from fastvlp.layers import Pool
from fastvlp.towers import Decoder, Joint, Text, Vit, padded
from fastvlp_kernels.packed import Packed
from tests.towers import plain
from tests.towers.plain import IMAGE, SIZES, SMALL, TEXT, images, same, texts


def made(cls, **options):
    torch.manual_seed(0)
    return cls(**options).double()


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"depth": 3, "merge": (0.3, 0.0, 0.5)}], ids=["relu2", "gelu", "merging"])
def test_vit(options):
    vit, batch = made(Vit, **IMAGE | options), images()
    found = vit(batch)
    each = zip(batch.segments(), batch.pos.split(batch.lengths.tolist()), strict=True)
    expected, sizes = zip(*(plain.tower(vit, plain.patches(vit, x, pos), plain.all_seen) for x, pos in each), strict=True)
    same(found.x, torch.cat(expected), vit.named_parameters())
    assert found.lengths.tolist() == [len(x) for x in expected]
    if "merge" in options:
        assert found.lengths.tolist() == [3, 6, 1, 3, 4]  # of 6, 16, 1, 8 and 9: without the whole part of 0.3 of them, and then of a half
        torch.testing.assert_close(found.size.double(), torch.cat(sizes))
    else:
        assert found.size is None and torch.equal(found.pos, batch.pos)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"merge": 0.25}], ids=["bidirectional", "causal", "merging"])
def test_text(options):
    text, batch = made(Text, **TEXT | options), texts()
    seen = plain.earlier_seen if text.causal else plain.all_seen
    expected, _ = zip(*(plain.tower(text, plain.words(text, ids), seen) for ids in batch.segments()), strict=True)
    found = text(batch)
    same(found.x, torch.cat(expected), text.named_parameters())
    assert found.lengths.tolist() == [len(x) for x in expected] == ([3, 7, 1, 5, 5] if "merge" in options else [3, 12, 1, 7, 7])


@pytest.mark.parametrize("mode", ["all", "causal", "prefix"])
def test_joint(mode):
    joint, x = made(Joint, **SMALL), torch.randn(14, 32, dtype=torch.float64)
    lengths, prefix = [5, 0, 1, 8], [2, 0, 1, 8]
    tokens = Packed.of(x, lengths)
    found = joint(tokens, torch.tensor(prefix) if mode == "prefix" else None, causal=mode == "causal")
    first = iter(prefix)

    def seen(n):
        return plain.earlier_seen(n, ahead) if mode != "all" else plain.all_seen(n)

    expected = []
    for segment in tokens.segments():
        ahead = next(first) if mode == "prefix" else 0
        expected.append(plain.tower(joint, segment, seen)[0] if len(segment) else segment)
    same(found.x, torch.cat(expected), joint.named_parameters())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["another's words", "own words"])
def test_decoder(own, gated):
    decoder = made(Decoder, **SMALL, vocab_size=50 if own else None, context_length=12, source=24, gated=gated)
    if gated:
        for number, layer in enumerate(decoder.cross):
            torch.nn.init.constant_(layer.gate, number - 0.3)
    batch = texts((3, 5, 1, 2))
    seen = Packed.of(torch.randn(9, 24, dtype=torch.float64), [4, 1, 2, 2])
    tokens = batch if own else batch.replace(x=torch.randn(batch.total, 32, dtype=torch.float64))
    expected = []
    for x, y in zip(tokens.segments(), seen.segments(), strict=True):
        x = plain.words(decoder.words, x) if own else x
        for block, layer in zip(decoder.blocks, decoder.cross, strict=True):
            x, _ = plain.block(block, x, plain.earlier_seen(len(x)), look=lambda x, layer=layer, y=y: plain.cross(layer, x, y))
        expected.append(plain.norm(decoder.norm_out, x))
    found = decoder(tokens, seen)
    same(found.x, torch.cat(expected), decoder.named_parameters())
    if own:
        torch.testing.assert_close(decoder(decoder.embed(batch), seen).x, found.x)


def test_a_gate_starts_closed_and_words_see_no_later_ones():
    torch.manual_seed(0)
    closed = Decoder(**TEXT, gated=True)
    batch, other = texts((4, 6)), Packed.of(torch.randn(5, 32), [2, 3])
    torch.testing.assert_close(closed(batch, other).x, closed(batch, other.replace(x=torch.randn(5, 32))).x)
    open_ = Decoder(**TEXT)
    changed = batch.x.clone()
    changed[3], changed[9] = 7, 7  # the last words
    before, after = open_(batch, other), open_(batch.replace(x=changed), other)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    torch.testing.assert_close(before.x[kept], after.x[kept])
    assert not torch.allclose(before.x[3], after.x[3])


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["bidirectional", "causal"])
def test_packed_equals_padded(options):
    vit, text = made(Vit, **IMAGE), made(Text, **TEXT | options)
    batch, captions = images(), texts()
    (x, mask), (pos, _) = batch.to_padded(), batch.replace(x=batch.pos).to_padded()
    same(vit(batch).x, padded.encode(vit, x, mask, pos)[mask], vit.named_parameters())
    ids, real = captions.to_padded()
    same(text(captions).x, padded.encode(text, ids, real)[real], text.named_parameters())
    for mode in ("mean", "last", "first"):
        pool = Pool(32, 24, mode).double()
        torch.testing.assert_close(padded.features(pool, padded.encode(text, ids, real), real), pool(text(captions)))


def test_dropped_patches_keep_their_places():
    vit = made(Vit, **IMAGE)
    pixels = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in SIZES]
    whole, kept = pack_images(pixels, 16), pack_images(pixels, 16, keep=0.5, generator=torch.Generator().manual_seed(0))
    at = {(s, *pos): row for row, (s, pos) in enumerate(zip(_owners(whole), whole.pos.tolist(), strict=True))}
    rows = [at[(s, *pos)] for s, pos in zip(_owners(kept), kept.pos.tolist(), strict=True)]
    assert len(rows) < whole.total
    torch.testing.assert_close(vit.embed(kept).x, vit.embed(whole).x[rows])


def _owners(packed):
    return [segment for segment, n in enumerate(packed.lengths.tolist()) for _ in range(n)]


def test_floating_pixels_are_the_same_pictures_and_have_gradients():
    vit, batch = made(Vit, **IMAGE), images()
    pixels = batch.x.float().requires_grad_()
    torch.testing.assert_close(vit(batch.replace(x=pixels)).x, vit(batch).x)
    (gradient,) = torch.autograd.grad(vit(batch.replace(x=pixels)).x.square().sum(), pixels)
    assert gradient.shape == pixels.shape and (gradient != 0).any()


@pytest.mark.parametrize("cls", [Vit, Text, Joint, Decoder])
def test_empty_segments_autocast_and_meta(cls):
    """Segments without tokens change nothing for the others; under autocast the values stay near; on meta tensors shapes come out."""
    torch.manual_seed(0)
    tower = cls(**{Vit: IMAGE, Text: TEXT, Joint: SMALL, Decoder: TEXT}[cls])
    batch = images() if cls is Vit else texts()
    if cls is Joint:
        batch = batch.replace(x=torch.randn(batch.total, 32))
    patches = Packed.of(torch.randn(7, 32), [2, 0, 1, 3, 1])
    more = (patches,) if cls is Decoder else ()
    whole = tower(batch, *more)
    counts = batch.lengths.tolist()
    holes = Packed.of(batch.x, [0, *counts[:2], 0, *counts[2:], 0], pos=batch.pos)
    around = tuple(Packed.of(part.x, [0, 2, 0, 0, 1, 3, 1, 0]) for part in more)
    torch.testing.assert_close(tower(holes, *around).x, whole.x, rtol=1e-5, atol=1e-5)
    nothing = tower(batch.take([]), *(part.take([]) for part in more))
    assert nothing.x.shape == (0, 32) and len(nothing) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = tower(batch, *more)
        near.x.float().square().sum().backward()
    assert (near.x.float() - whole.x).norm() < 0.03 * whole.x.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tower.parameters())
    meta = copy.deepcopy(tower).to("meta")
    assert meta(batch.to("meta"), *(part.to("meta") for part in more)).x.shape == whole.x.shape


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Vit(width=100, heads=3), "width is 100 and heads is 3; the width must be a multiple"),
    (lambda: Vit(depth=0), "depth 0"),
    (lambda: Vit(image_size=1024), "with patches of 16 and a grid of 32 it lies between 1 and 512"),
    (lambda: Vit(std=0), "std 0 must be positive"),
    (lambda: Vit(activation="tanh"), "allowed: gelu, relu2"),
    (lambda: Vit(merge=(0.1, 0.1)), r"merge is \[0.1, 0.1\]; shares from 0 to 0.5 .* each of 6 blocks or one for all"),
    (lambda: Text(merge=0.6), "from 0 to 0.5"),
    (lambda: Text(merge=0.1, causal=True), "needs causal=False"),
    (lambda: Text(context_length=2), "a context holds at least a start, an end and one token"),
    (lambda: Vit(**IMAGE)(images().replace(pos=None)), "no positions .* fastvlp.data.pack_images"),
    (lambda: Vit(**IMAGE, patch_size=8)(images()), r"the tokens of images have shape \(40, 768\); this layer was made for \[T, 192\]"),
    (lambda: Vit(**SMALL, grid=3, image_size=48)(images()), "rows and columns of patches go from 0 to 3; this tower has 0 to 2"),
    (lambda: Text(**TEXT)(texts().replace(pos=None)), "fastvlp.data.pack_texts"),
    (lambda: Text(**TEXT | {"vocab_size": 20})(texts()), "token ids go from . to ..; this tower has 0 to 19"),
    (lambda: Text(**TEXT | {"context_length": 8})(texts()), "places in the caption go from 0 to 11; this tower has 0 to 7"),
    (lambda: Joint(**SMALL)(texts().replace(x=torch.zeros(30, 16))), r"tokens of tokens have shape \(30, 16\)"),
    (lambda: Decoder(**TEXT)(texts(), Packed.of(torch.zeros(4, 32), [2, 2])), "x has 5 segments and y 2"),
    (lambda: Decoder(**TEXT, source=24)(texts((2, 1)), Packed.of(torch.zeros(4, 32), [2, 2])), r"tokens of y have shape \(4, 32\)"),
    (lambda: Decoder(**TEXT | {"vocab_size": None})(texts(), texts()), "no word embeddings"),
    (lambda: padded.encode(Text(**TEXT, merge=0.5), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3).bool()), "use the packed tower"),
    (lambda: padded.features(Pool(32, 4, "attention"), torch.zeros(1, 2, 32), torch.ones(1, 2).bool()), "has no padded twin"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="images is Tensor; it must be Packed"):
        Vit(**IMAGE)(torch.zeros(4, 768))
    with pytest.raises(TypeError, match=r"Text: the tokens are torch.float32 \(30,\); they must be ids"):
        Text(**TEXT)(texts().replace(x=torch.zeros(30)))
