"""Pictures made to hang, to fill the memory or to write on the terminal, and every honest kind that must still be read."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tar_files import encoded, picture

from fastvlp.data import images
from fastvlp.data.headers import inspect
from fastvlp.data.images import Unusable, as_pixels, decode, fit

ROOT = Path(__file__).parent.parent.parent
FORMS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"},
         "TIFF": {}}

T = Image.Transpose
INVERSE = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


def _exif(orientation, kind=3):
    """EXIF data of one entry, written by hand in Motorola's order."""
    value = struct.pack(">HH", orientation, 0) if kind == 3 else struct.pack(">I", orientation)
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


@pytest.mark.parametrize("form", FORMS)
def test_pictures_are_turned_upright(form):
    """The stored picture is the scene, moved by the inverse of what EXIF says; a viewer (Pillow's exif_transpose) sees the scene."""
    scene = Image.new("RGB", (48, 32), (255, 255, 255))
    scene.paste((255, 0, 0), (0, 0, 24, 16))
    scene.paste((0, 0, 255), (24, 16, 48, 32))
    for turn in range(1, 9):
        stored = scene if turn == 1 else scene.transpose(INVERSE[turn])
        exif = Image.Exif()
        exif[0x0112] = turn
        data = encoded(stored, form, exif=exif if form == "TIFF" else _exif(turn), **FORMS[form])
        found = decode(data)
        assert found.size == scene.size and np.abs(np.asarray(found).astype(int) - np.asarray(scene)).max() < 40, turn
        opened = Image.open(io.BytesIO(data))
        for given in (found, opened):  # once, not twice, and whoever opened the file
            assert np.abs(as_pixels(given, 48, 16).numpy().astype(int) - np.asarray(scene)).max() < 40, turn
        if form != "TIFF":  # which Pillow turns as it reads
            assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))


@pytest.mark.parametrize("exif, upright", [
    (_exif(6, kind=4), False), (_exif(0), True), (_exif(9), True), (_exif(6)[:-8], True), (b"Exif\0\0", True),
    (b"Exif\0\0II*\0\xff\xff\xff\xff", True), (b"Exif\0\0" + bytes(range(200)), True),
    (b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 65535) + bytes(100), True)])
def test_odd_exif_data_spoil_no_picture(exif, upright):
    assert decode(encoded(picture(1, (20, 14)), "JPEG", exif=exif)).size == ((20, 14) if upright else (14, 20))


def _modes():
    """A picture in each mode that a file may hold, and the colour of its first pixel on white."""
    deep = np.full((6, 5), 0x4020, dtype=np.uint16)
    grey, colour = Image.new("L", (5, 6), 70), Image.new("RGB", (5, 6), (10, 200, 30))
    clear = colour.copy()
    clear.putalpha(0)
    half = colour.copy()
    half.putalpha(128)
    index = colour.quantize(4)
    yield "JPEG", grey, {}, (70,) * 3
    yield "JPEG", Image.new("CMYK", (5, 6), (255, 0, 0, 0)), {}, (0, 255, 255)
    yield "PNG", Image.new("1", (5, 6), 1), {}, (255,) * 3
    yield "PNG", Image.fromarray(deep), {}, (0x40,) * 3
    yield "PNG", grey, {"transparency": 70}, (255,) * 3
    yield "PNG", colour, {"transparency": (10, 200, 30)}, (255,) * 3
    yield "PNG", index, {}, (10, 200, 30)
    yield "PNG", index, {"transparency": 0}, (255,) * 3
    yield "PNG", clear, {}, (255,) * 3
    yield "PNG", half, {}, (132, 227, 142)  # 255 - 245 * 128 / 255 and so on
    yield "PNG", half.convert("LA"), {}, (189,) * 3  # 0.299 * 10 + 0.587 * 200 + 0.114 * 30 = 124, half of it white
    yield "WEBP", half, {"lossless": True}, (132, 227, 142)
    yield "AVIF", half, {"quality": 100}, (132, 227, 142)
    yield "TIFF", Image.fromarray(deep), {}, (0x40,) * 3
    yield "TIFF", Image.fromarray(deep.astype(">u2")), {}, (0x40,) * 3
    yield "TIFF", Image.new("CMYK", (5, 6), (255, 0, 0, 0)), {}, (0, 255, 255)
    yield "TIFF", half, {"compression": "tiff_lzw"}, (132, 227, 142)
    yield "TIFF", Image.new("1", (5, 6), 0), {"compression": "group4"}, (0,) * 3
    yield "BMP", index, {}, (10, 200, 30)
    for form in ("GIF", "WEBP", "PNG", "AVIF"):  # animated: the first frame
        options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "AVIF" else {}
        yield form, colour, {"save_all": True, "append_images": [grey.convert("RGB")], **options}, (10, 200, 30)
    yield "MPO", colour, {"save_all": True, "append_images": [grey.convert("RGB")]}, (10, 200, 30)  # what phones call .jpg


@pytest.mark.parametrize("block", [1 << 20, 7])  # as a whole, and row by row as large ones
@pytest.mark.parametrize("form, image, options, colour", list(_modes()))
def test_every_kind_of_picture(form, image, options, colour, block, monkeypatch):
    monkeypatch.setattr(images, "BLOCK", block)
    found = decode(encoded(image, form, **options))
    assert found.mode == "RGB" and found.size == (5, 6)
    assert np.abs(np.asarray(found).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("image", [Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 70_000), Image.new("I", (4, 4), -1)])
def test_pixels_of_32_bits_have_no_agreed_range(image):
    with pytest.raises(Unusable, match="image has pixels of 32 bits"):
        decode(encoded(image, "TIFF"))
    with pytest.raises(ValueError, match="convert it to RGB first"):
        as_pixels(image, 16, 16)


@pytest.mark.parametrize("form", ["PPM", "TGA", "PCX", "SGI", "ICO", "DDS", "JPEG2000", "EPS", "IM", "MSP", "XBM"])
def test_only_the_promised_formats_are_decoded(form):
    """Whatever Pillow could read: each decoder that is let in is one more that strangers can reach."""
    data = encoded(picture(1).convert("1") if form in ("MSP", "XBM") else picture(1), form)
    with pytest.raises(Unusable, match="not an image"):
        decode(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"])
def test_one_decoder_is_asked_for(form, monkeypatch):
    """Pillow, left to choose, tries all that it has on a broken file."""
    asked, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, formats=None: asked.append(formats) or open_image(file, formats=formats))
    decode(encoded(picture(1), form))
    assert asked == [(form,)]


@pytest.mark.parametrize("low, high", [(-1.7, 2.6), (0, 255), (0, 1.01), (-0.01, 1), (0, float("nan")), (0, float("inf"))])
def test_floats_outside_0_to_1_are_refused(low, high):
    with pytest.raises(ValueError, match=r"must be in 0\.\.1: divide by 255, undo the normalisation"):
        as_pixels(torch.tensor([low, high, 0.5]).expand(3, 2, 3), 16, 16)
    rounded = as_pixels(torch.tensor([-1e-3, 1 + 1e-3, 0.5]).expand(3, 16, 3), 16, 1)
    assert rounded.unique().tolist()[::2] == [0, 255]  # rounding is no error


@pytest.mark.parametrize("wanted", [1, 99, 100, 101, 200, 399, 400, 401, 799, 1600, 5000])
def test_a_jpeg_is_never_decoded_smaller_than_wanted(wanted):
    small = decode(encoded(picture(7, (1600, 800)), "JPEG", quality=95), wanted=wanted)
    assert min(wanted, 1600) <= max(small.size) and small.width == 2 * small.height


def test_half_of_what_is_wanted_would_show():
    """Stripes of a period of four pixels at the size that is wanted: decoded at half of it they would be grey."""
    stripes = np.zeros((400, 400, 3), dtype=np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    data = encoded(Image.fromarray(stripes).resize((1600, 1600), Image.Resampling.NEAREST), "JPEG", quality=95, subsampling=0)
    assert fit(decode(data, wanted=400), 400, 16).std() > 110


def _png(width, height, colour=6, before=b"", data=None):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour])
    body = data if data is not None else b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)) + before
            + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def _tables(prefix, kind, entries=5400, size=30_000):
    """A segment whose directory has thousands of entries that all claim the same bytes."""
    table = b"".join(struct.pack("<HHII", 300 + i, kind, size, 8) for i in range(entries))
    table = prefix + b"II*\0" + struct.pack("<IH", 8, entries) + table
    return table + bytes(max(0, 65_500 - len(table)))


def _with_segment(marker, contents):
    data = encoded(picture(1), "JPEG")
    return data[:2] + marker + struct.pack(">H", len(contents) + 2) + contents + data[2:]


def _scans(count, size=64):
    data = encoded(Image.new("RGB", (size, size), (9, 99, 200)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda"):-2]
    return data[:-2] + last * count + data[-2:]


def _tiff_with_tags():
    return _tables(b"", 7, 4000, 1 << 20) + bytes(1 << 20)


def _gif_with_comments():
    data = encoded(picture(1).convert("L"), "GIF")
    head = 13 + 3 * 2 ** ((data[10] & 7) + 1)  # with the palette
    return data[:head] + b"\0" + b"!\xfe\x01a\0" * 500_000 + data[head:]


def _bmp_in_runs(side=8000):
    return (b"BM" + struct.pack("<IHHI", 1 << 20, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
            + bytes(1024) + b"\x01\x02" * 400_000 + b"\0\1")


EMPTY_CHUNK = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
BOMBS = {  # None: may be read or refused, within the bounds
    "more pixels than allowed": (lambda: _png(60_000, 60_000, data=zlib.compress(bytes(99))), "too many pixels"),
    "long and thin": (lambda: _png(67_000_000, 1, 0), "too many pixels"),
    "RGBA of 8190 x 8190": (lambda: _png(8190, 8190), "too much memory"),
    "RGBA of 7000 x 7000": (lambda: _png(7000, 7000), None),
    "grey of 7600 x 7600": (lambda: _png(7600, 7600, 0), None),
    "three million empty chunks": (lambda: _png(64, 64, before=EMPTY_CHUNK * 3_000_000), "too much decoding"),
    "5,000 scans": (lambda: _scans(5000), "too much decoding"),
    "scans of a large picture": (lambda: _scans(60, 6000), "too much decoding"),
    "progressive, full colour": (lambda: encoded(Image.new("RGB", (7000, 7000), (9, 99, 200)), "JPEG", progressive=True, subsampling=0),
                                 "too much memory"),
    "EXIF tables": (lambda: _with_segment(b"\xff\xe1", _tables(b"Exif\0\0", 7, 5400, 64_000)), None),
    "MPF tables": (lambda: _with_segment(b"\xff\xe2", _tables(b"MPF\0", 3)), None),
    "a hundred thousand segments": (lambda: _with_segment(b"\xff\xfe", b"") .replace(b"\xff\xfe\0\2", b"\xff\xfe\0\2" * 100_000),
                                    "too much decoding"),
    "AVIF's EXIF tables": (lambda: encoded(picture(1), "AVIF", exif=_tables(b"Exif\0\0", 7, 4000, 40_000)), "too much decoding"),
    "TIFF tags": (_tiff_with_tags, "too much decoding"),
    "TIFF in one strip": (lambda: encoded(Image.new("RGBA", (7000, 7000)), "TIFF", compression="tiff_lzw", tiffinfo={278: 7000}),
                          "too much memory"),
    "WebP of 8190 x 8190": (lambda: bytes.fromhex(
        "524946461e000000574542505650384c110000002ffd5fff1707d0b12614b9078188e87f0000"), "too much memory"),
    "GIF comments": (_gif_with_comments, "too much decoding"),
    "BMP in runs": (_bmp_in_runs, "too much decoding"),
    "a file of 120 MB": (lambda: encoded(picture(1), "PNG") + bytes(120 << 20), "file is too large"),
}
MEASURE = """
import io, pathlib, sys, time
from PIL import Image
from fastvlp.data.images import Unusable, decode, fit
def kilobytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
for form in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF"):  # what is imported once is no part of it
    out = io.BytesIO(); Image.new("RGB", (9, 9)).save(out, form); decode(out.getvalue())
for path in sys.argv[1:]:
    data = pathlib.Path(path).read_bytes()
    open("/proc/self/clear_refs", "w").write("5")
    before, start, own = kilobytes(), time.process_time(), 0
    try:
        image = decode(data, wanted=64)
        own = image.width * image.height * 4 / 1024
        fit(image, 64, 16)
        said = "read"
    except Unusable as reason:
        said = str(reason)
    print(pathlib.Path(path).name, (kilobytes() - before - own) / 1024, time.process_time() - start, said, sep="\\t")
    image = None
"""


@pytest.mark.filterwarnings("ignore")  # of Pillow's, while the files are made
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory can be reset on Linux alone")
def test_memory_and_time_of_hostile_pictures_have_bounds(tmp_path):
    """At most 256 MB beside the pixels, and seconds of the processor, for each."""
    paths = []
    for name, (make, _) in BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(make())
    run = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, timeout=240,
                         env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    found = {name: (float(megabytes), float(seconds), said) for name, megabytes, seconds, said in lines}
    assert found.keys() == BOMBS.keys()
    for name, (megabytes, seconds, said) in found.items():
        assert megabytes < 256 and seconds < 15, (name, megabytes, seconds)
        assert BOMBS[name][1] is None or BOMBS[name][1] in said, (name, said)
    assert [name for name in ("EXIF tables", "MPF tables", "RGBA of 7000 x 7000") if found[name][2] != "read"] == []


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "GIF", "TIFF", "BMP", "AVIF"])
def test_what_decoders_think_of_a_file_stays_off_the_terminal(form, capfd):
    """Damaged files of every format, TIFF in each compression: an RGB picture or Unusable, and no output (libtiff's comes from C)."""
    rng = np.random.default_rng(5)
    kinds = [{"compression": c} for c in (None, "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")] if form == "TIFF" else [{}]
    for options in kinds:
        data = encoded(picture(4), form, **options)
        for number in range(60):
            broken = bytearray(data[:rng.integers(len(data))] if number % 4 == 0 else data)
            for place in rng.integers(0, max(1, len(broken)), 1 + number % 6):
                if broken:
                    broken[place] = rng.integers(256)
            try:
                assert decode(bytes(broken), max_pixels=1 << 20).mode == "RGB"
            except Unusable:
                pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")  # of Pillow's, while the files are made
def test_the_decoder_is_given_no_metadata():
    """Parsers of metadata have asked for gigabytes (EXIF, MPF and TIFF tables, joined comments); pixels do not need them."""
    image, secret = picture(1), b"metadata-" + b"x" * 40
    text = PngInfo()
    text.add_text("comment", secret.decode())
    exif = Image.Exif()
    exif[271], exif[0x0112] = secret.decode(), 1
    exif.get_ifd(0x8769)[0x9286] = secret
    for form, options in {"JPEG": {"exif": exif, "comment": secret, "xmp": secret, "icc_profile": secret},
                          "PNG": {"exif": exif, "pnginfo": text, "icc_profile": secret}, "GIF": {"comment": secret, "save_all": True},
                          "MPO": {"save_all": True, "append_images": [image], "exif": exif}}.items():
        data = encoded(image, form, **options)
        given = inspect(data).data
        assert secret in data or b"icc_profile" in data and form == "PNG", form
        assert secret not in given and not re.search(rb"Exif|MPF\0|iCCP|tEXt|eXIf|http:", given), form
        same, whole = (np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in (given, data))
        assert np.array_equal(same, whole)
    data = encoded(image, "TIFF", exif=exif)
    kept = Image.open(io.BytesIO(inspect(data).data)).tag_v2
    assert 271 in Image.open(io.BytesIO(data)).tag_v2 and not {271, 34665} & set(kept) and {256, 257, 258, 273} <= set(kept)


def test_output_comes_back_after_a_tiff(capfd):
    with pytest.raises(Unusable):
        decode(encoded(picture(4), "TIFF", compression="tiff_lzw")[:-60] + bytes(60))
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_exotic_compressions_are_refused_by_name():
    for compression in ("lzma", "zstd"):
        with pytest.raises(Unusable, match="image has a compression that is not read"):
            decode(encoded(picture(4), "TIFF", compression=compression))
