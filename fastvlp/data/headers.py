"""What of a picture file its decoder is given: the parts that make the first picture, after a look at what decoding them would take.

Metadata are left out (but for the orientation, which is read here): their parsers are where a file of a few kilobytes asks for
gigabytes, and a model sees none of them.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

SEGMENTS = 4096  # parts of a file before its pixels; cameras write dozens, with depth maps hundreds
CHUNKS = 1 << 16  # parts of a PNG, whose pixels come in parts as well
SCANS, SCANNED = 100, 1 << 30  # of a JPEG, and times its pixels; progressive files of usual tools have 10
ORIENTATION = 0x0112
PICTURE_TAGS = {  # of a TIFF: layout, compression and colours
    256, 257, 258, 259, 262, 266, 273, ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, 529,
    530, 531, 532}
GIF_PARTS = re.compile(rb"[!,;]")  # extension, picture, end
TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}  # with + for offsets of 64 bits
TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of a value, by the number of its type


class Unusable(Exception):
    """A sample cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Picture:
    """Attributes:
        format: Pillow's name. data: what the decoder is given. orientation: EXIF's 1..8.
        coefficients: bytes that a JPEG in several scans holds beside its pixels.
    """

    format: str
    data: bytes
    orientation: int = 1
    coefficients: int = 0


def inspect(data: bytes) -> Picture:
    """Find the format by the contents, whatever the name says, and drop what no decoder should see.

    Raises:
        Unusable: none of the formats, or one that takes its decoder more work than any honest picture.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Picture("WEBP", data, _webp_orientation(data))
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data)
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return _avif(data)
    if data[:4] in TIFF_ORDERS:
        return _tiff(data)
    if data[:2] == b"BM":
        return Picture("BMP", data)
    raise Unusable("not an image")


def orientation(exif: bytes) -> int:
    """EXIF's orientation, 1..8; 1 (upright) where it is missing or nonsense."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = TIFF_ORDERS.get(exif[:4])
    if order is None or exif[2:3] == b"+" or exif[3:4] == b"+" or len(exif) < 10:
        return 1
    start: int = struct.unpack(order + "I", exif[4:8])[0]
    if start + 2 > len(exif):
        return 1
    count: int = struct.unpack_from(order + "H", exif, start)[0]
    for at in range(start + 2, start + 2 + 12 * min(count, SEGMENTS, (len(exif) - start - 2) // 12), 12):
        tag, kind, _, short = struct.unpack_from(order + "HHIH", exif, at)
        if tag == ORIENTATION:
            value = struct.unpack_from(order + "I", exif, at + 8)[0] if kind == 4 else short
            return value if kind in (3, 4) and 1 <= value <= 8 else 1
    return 1


def _jpeg(data: bytes) -> Picture:
    """Keeps tables, frames, JFIF's and Adobe's segments (which say what the colours are) and all scans."""
    kept, at, turned, frame = [data[:2]], 2, 1, b""
    for _ in range(SEGMENTS):
        at = data.find(b"\xff", at)
        marker = data[at + 1:at + 2]
        if at < 0 or not marker:
            raise Unusable("image is broken")
        if marker in (b"\0", b"\x01", b"\xff") or b"\xd0" <= marker <= b"\xd9":  # padding, or a marker without contents
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
        if marker == b"\xda":
            break
        if marker == b"\xe1" and turned == 1 and data[at + 4:at + 10] == b"Exif\0\0":
            turned = orientation(data[at + 4:end])
        if not (b"\xe0" <= marker <= b"\xfe") or marker in (b"\xe0", b"\xee"):
            kept.append(data[at:end])
        if b"\xc0" <= marker <= b"\xcf" and marker not in (b"\xc4", b"\xc8", b"\xcc"):
            frame = data[at + 4:end]
        at = end
    else:
        raise Unusable("image takes too much decoding")
    coefficients = 0
    stop = data.find(b"\xff\xd9", at)  # what comes behind the end is another picture: a preview, a gain map
    pixels = data[at:] if stop < 0 else data[at:stop + 2]
    scans = pixels.count(b"\xff\xda")  # within coded pixels a byte of 255 is followed by 0
    if scans > 1 and len(frame) >= 6:
        height, width, parts = struct.unpack_from(">HHB", frame, 1)
        sampling = [(frame[i] >> 4, frame[i] & 15) for i in range(7, min(len(frame), 6 + 3 * parts), 3)]
        most = max((h * v for h, v in sampling), default=1) or 1
        coefficients = 2 * width * height * sum(h * v for h, v in sampling) // most
        if scans > SCANS or scans * width * height > SCANNED:
            raise Unusable("image takes too much decoding")
    return Picture("JPEG", b"".join([*kept, pixels]), turned, coefficients)


def _png(data: bytes) -> Picture:
    """Keeps the critical chunks and the transparent colour."""
    kept, at, turned = [data[:8]], 8, 1
    for _ in range(CHUNKS):
        length, kind = int.from_bytes(data[at:at + 4], "big"), data[at + 4:at + 8]
        end = at + 12 + length
        if kind == b"eXIf":
            turned = orientation(data[at + 8:end - 4])
        elif kind[:1].isupper() or kind == b"tRNS":
            kept.append(data[at:end])
        if kind == b"IEND" or end > len(data):
            return Picture("PNG", b"".join(kept), turned)
        at = end
    raise Unusable("image takes too much decoding")


def _webp_orientation(data: bytes) -> int:
    if data[12:16] != b"VP8X" or not data[20:21] or not data[20] & 8:  # a plain file, or one whose flags say that there is no EXIF
        return 1
    at = 12
    for _ in range(SEGMENTS):
        length = int.from_bytes(data[at + 4:at + 8], "little")
        if data[at:at + 4] == b"EXIF":
            return orientation(data[at + 8:at + 8 + length])
        at += 8 + length + length % 2
        if at >= len(data):
            return 1
    raise Unusable("image takes too much decoding")


def _gif(data: bytes) -> Picture:
    """Keeps the first picture and what follows it; of extensions only the one that says what is transparent."""
    if len(data) < 13:
        raise Unusable("image is broken")
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    kept, blocks = [data[:at]], 0
    while (found := GIF_PARTS.search(data, at)) and found[0] == b"!":
        begin = found.start()
        at = begin + 2
        while data[at:at + 1] not in (b"", b"\0") and blocks < SEGMENTS:
            at += 1 + data[at]
            blocks += 1
        at, blocks = at + 1, blocks + 1
        if blocks > SEGMENTS:
            raise Unusable("image takes too much decoding")
        if data[begin + 1:begin + 2] == b"\xf9":
            kept.append(data[begin:at])
    return Picture("GIF", b"".join([*kept, data[found.start():] if found else b""]))


def _avif(data: bytes) -> Picture:
    """Pillow parses the EXIF data of an AVIF as it opens the file: tables that could ask for more than they hold are refused."""
    view = memoryview(data)
    for number, found in enumerate(re.finditer(rb"II\*\0|MM\0\*|II\0\*|MM\*\0|II\+\0|MM\0\+", data)):
        order, wide = "<" if found[0][:2] == b"II" else ">", b"+" in found[0]
        if number >= SEGMENTS // 64:
            raise Unusable("image takes too much decoding")
        _, asked, _ = _directory(view[found.start():], order, wide)
        if asked > len(data):
            raise Unusable("image takes too much decoding")
    return Picture("AVIF", data)


def _tiff(data: bytes) -> Picture:
    """Keeps the first directory's entries about layout and colours; Pillow turns the picture itself."""
    order, wide = TIFF_ORDERS[data[:4]], b"+" in data[:4]
    start, _, entries = _directory(data, order, wide)
    step = 20 if wide else 12
    tags = {at: struct.unpack_from(order + "H", data, at)[0] for at in entries}
    kept = b"".join(data[at:at + step] for at in entries if tags[at] in PICTURE_TAGS)
    asked = sum(_asked(data, at, order, wide) for at in entries if tags[at] in PICTURE_TAGS)
    if not kept:
        raise Unusable("image is broken")
    if asked > len(data):
        raise Unusable("image takes too much decoding")
    table = struct.pack(order + ("Q" if wide else "H"), len(kept) // step) + kept + bytes(8 if wide else 4)  # no further directory
    return Picture("TIFF", b"".join((data[:start], table, data[start + len(table):])))


def _directory(data: bytes | memoryview, order: str, wide: bool) -> tuple[int, int, range]:
    """Where the first directory of a TIFF begins, how many bytes its entries ask for, and where they lie; empty where it is broken."""
    try:
        start: int = struct.unpack_from(order + ("Q" if wide else "I"), data, 8 if wide else 4)[0]
        count: int = struct.unpack_from(order + ("Q" if wide else "H"), data, start)[0]
    except (struct.error, OverflowError):
        return 0, 0, range(0)
    begin, step = (start + 8, 20) if wide else (start + 2, 12)
    entries = range(begin, begin + step * min(count, max(0, len(data) - begin) // step), step)
    if count > SEGMENTS:
        raise Unusable("image takes too much decoding")
    return start, sum(_asked(data, at, order, wide) for at in entries), entries


def _asked(data: bytes | memoryview, at: int, order: str, wide: bool) -> int:
    _, kind, count = struct.unpack_from(order + ("HHQ" if wide else "HHI"), data, at)
    return count * (TIFF_SIZES[kind] if kind < len(TIFF_SIZES) else 0)
