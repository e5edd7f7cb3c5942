"""Files of strangers by seed: shards, pictures, captions, checkpoints and models, sound ones with damage that means something to a parser.

Each is read in a process of its own, with bounds on its memory and its processor. It is used, or refused in the words of the library.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import os
import random
import resource
import shutil
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import forkserver

ROUNDS = 8  # files of each kind in a case
MEMORY, SECONDS = 1 << 30, 60  # bytes of addresses beyond what the process has when it starts to read; of its processor
PATIENCE = 600.0  # seconds, on a busy machine
NUMBERS = tuple(number.to_bytes(size, order) for size in (1, 2, 4, 8) for order in ("big", "little")
                for number in (0, 1, 2**(8 * size - 1) - 1, 2**(8 * size - 1), 2**(8 * size) - 1))
WORDS = (b"null", b"-1", b"1e999", b"NaN", b"[" * 200, b'{"a":' * 50, b"9" * 400, b'"\\ud800"', b"\0", b"..", b"/", b"\x1b]0;x\x07",
         b"77777777777")


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, numbers at their bounds, words, parts that are cut out, repeated or put elsewhere, an early end."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(out) + 1), draw.choice((1, 4, 64, 512, 4096))
        kind = draw.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            number = draw.choice(NUMBERS)
            out[at:at + len(number)] = number
        elif kind == 2:
            word = draw.choice(WORDS)
            out[at:at + draw.choice((0, len(word)))] = word
        elif kind == 3:
            del out[at:at + size]
        elif kind == 4:
            out[at:at] = out[at:at + size] * draw.choice((2, 100))
        elif kind == 5:
            to = draw.randrange(len(out) + 1)
            out[to:to] = out[at:at + size]
        else:
            del out[draw.randrange(len(out) + 1):]
    return bytes(out)


@functools.cache
def pictures() -> list[bytes]:
    """A sound file in each format and kind that is read."""
    from PIL import Image

    image = Image.radial_gradient("L").resize((48, 32)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {"exif": exif}), ("JPEG", {"progressive": True}), ("PNG", {}), ("PNG", {"exif": exif, "save_all": True,
         "append_images": [image] * 2}), ("WEBP", {"lossless": True}), ("WEBP", {"save_all": True, "append_images": [image] * 2}),
        ("GIF", {"save_all": True, "append_images": [image.rotate(90)]}), ("AVIF", {}), ("BMP", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"})]  # fmt: skip
    found = []
    for form, options in kinds:
        out = io.BytesIO()
        image.save(out, form, **options)
        found.append(out.getvalue())
    return found


def a_picture(seed: int, folder: Path, base: Path) -> None:
    """As a picture, and as an animation."""
    from fastvlp.data.frames import frames
    from fastvlp.data.images import Unusable, decode, fit

    draw = random.Random(seed)
    data = damaged(draw.choice(pictures()), draw)
    for read in (lambda: fit(decode(data, wanted=64), 64, 16), lambda: frames(data, 64, 16)):
        try:
            read()
        except Unusable:
            continue


def a_caption(seed: int, folder: Path, base: Path) -> None:
    """The text and the JSON of a sample."""
    from fastvlp.data.images import Unusable
    from fastvlp.data.labels import parse

    draw = random.Random(seed)
    fields = {"captions": ["ein Hund", "a dog"], "class": "dog", "caption": "a dog", "width": 640, "exif": {"a": [1, 2.5, None]}}
    text, metadata = ("a dog — ein Hund".encode(), json.dumps(fields).encode())
    try:
        labels = parse(*((damaged(text, draw), metadata) if draw.random() < 0.3 else (None, damaged(metadata, draw))))
        assert all(caption.strip() and "\0" not in caption for caption in labels.captions) and labels.id >= 0
    except Unusable:
        return


def a_shard(seed: int, folder: Path, base: Path) -> None:
    """The tar, plain or packed: every sample of it is used or named."""
    from fastvlp.data.samples import samples

    draw, out = random.Random(seed), io.BytesIO()
    form = draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number in range(draw.randint(1, 6)):
            stem = draw.choice(("a", "a/b", "é", "x" * (90 if form == tarfile.USTAR_FORMAT else 200))) + str(number)
            for extension, data in (("png", pictures()[2]), ("json", b'{"captions": ["a dog"]}'), ("p.npy", bytes(200))):
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size, info.mtime = len(data), 0
                tar.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    packed = draw.random() < 0.3
    data = damaged(gzip.compress(data, mtime=0), draw) if packed else damaged(data, draw)
    (folder / "x.tar").write_bytes(data)
    named: list[tuple[str, str]] = []
    read = list(samples(str(folder / "x.tar"), 1 << 22, lambda *skip: named.append(skip)))
    assert read or named, "a shard of nothing, and nobody was told"
    assert all(text.isprintable() for _, text in named), f"a name that is not fit to be shown: {named}"


def a_checkpoint(seed: int, folder: Path, base: Path) -> None:
    """A file of a checkpoint or of a model; sums that fit, as a stranger would write them, or those that were there."""
    import hashlib

    import torch.distributed.checkpoint as dcp

    import fastvlp
    from fastvlp.systems.state_folder import read_state
    from fastvlp.train import checkpoint

    draw = random.Random(seed)
    shutil.copytree(base, folder / "run")
    model, saved = folder / "run" / "model", next((folder / "run" / "checkpoints").iterdir())
    file = draw.choice(sorted(path for path in (folder / "run").rglob("*") if path.is_file() and path.name != "log.jsonl"))
    file.write_bytes(damaged(file.read_bytes(), draw))
    if draw.random() < 0.7 and file.name != checkpoint.MANIFEST:
        manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
        for name in manifest["files"]:
            data = (saved / name).read_bytes()
            manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
        (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    try:
        checkpoint.verify(saved)
        checkpoint.random_states(saved)
        read_state({"model": {"weight": torch.zeros(300)}, "optim": {"lr": 0.0}}, saved / checkpoint.STATE, alone=True)
    except (checkpoint.CheckpointError, dcp.CheckpointException):
        pass
    try:
        fastvlp.load(model)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error), error


KINDS: tuple[Callable[[int, Path, Path], None], ...] = (a_picture, a_caption, a_shard, a_checkpoint)


@functools.cache
def sound_run() -> Path:
    """The folder of a run with a small model and a checkpoint, made once."""
    import torch.distributed.checkpoint as dcp

    from fastvlp.config import load
    from fastvlp.systems import files
    from fastvlp.systems.files import build_system
    from fastvlp.train import checkpoint

    folder = Path(_temporary().name)
    recipe = load("clip", ["model.embed_dim=8", "model.image={width: 16, depth: 1, heads: 1, patch_size: 16, image_size: 32}",
                           "model.text={width: 16, depth: 1, heads: 1, context_length: 8}"])  # fmt: skip
    files.save(folder / "model", build_system(recipe), recipe)
    partial = checkpoint.begin(folder / "checkpoints", 3)
    state = {"model": {"weight": torch.arange(300.0)}, "optim": {"lr": 0.5}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no process group
        dcp.save(state, checkpoint_id=str(partial / checkpoint.STATE), no_dist=True)
    checkpoint.finish(partial, {"recipe": {}, "counters": {"step": 3, "samples": 9}}, [{"torch": torch.get_rng_state()}], 1)
    return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fastvlp-soak-")  # removed when Python ends


def read(kinds: tuple[Callable[[int, Path, Path], None], ...], seed: int, folder: str, base: str, memory: int, seconds: int) -> None:
    """Make and read files of each kind within the bounds; what goes wrong is written to a file, since the process may not survive."""
    torch.set_num_threads(1)
    os.environ["FASTVLP_CACHE"] = str(Path(folder, "cache"))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(nowhere, standard)  # torch tells of each checkpoint that it refuses
    pictures()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    for kind, number in itertools.product(kinds, range(ROUNDS)):
        place = Path(folder, f"{kind.__name__}-{number}")
        place.mkdir()
        Path(folder, "reading").write_text(f"{kind.__name__} of seed {seed}, number {number}")
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind(seed * ROUNDS + number, place, Path(base))
        except BaseException:
            Path(folder, "error").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
            os._exit(1)


def case(seed: int, folder: Path, device: torch.device) -> int:
    """Files of each kind; returns how many.

    Raises:
        AssertionError: one ended its process, took more than it may, or raised what is no refusal.
    """
    process = forkserver().Process(target=read, args=(KINDS, seed, str(folder), str(sound_run()), MEMORY, SECONDS), daemon=True)
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode:
        reading, error = folder / "reading", folder / "error"
        what = reading.read_text() if reading.exists() else "starting"
        raise AssertionError(f"{what}: exit code {process.exitcode}\n{error.read_text(encoding='utf-8')[-3000:] if error.exists() else ''}")
    return len(KINDS) * ROUNDS
