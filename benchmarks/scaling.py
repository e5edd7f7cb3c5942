"""How cost grows: the loss with the batch, the packed image tower with the size of the pictures, the loss step with processes.

Each point is measured against its rival, interleaved; memory in a process of its own (CPU). A point that would not fit is named, not
tried: one sweep's memory grows at most by the square of the factor from one point to the next. Beyond the processes of one machine there
is what ``fastvlp plan`` predicts, for its default links and rates.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

from benchmarks import open_clip_baseline as rival
from benchmarks.machine import describe, load
from benchmarks.measure import FULL, QUICK, Budget, Clock, paired_ratio, percentile, sample
from benchmarks.peak import elsewhere, growth
from benchmarks.processes import forkserver
from benchmarks.rivals import clip_loss, import_open_clip
from benchmarks.run import write
from fastvlp.commands.strategies import Cluster, predict

COLUMNS = ("sweep", "provider", "kind", "x", "p20_ms", "p50_ms", "p80_ms", "samples", "ratio_rival", "extra_mb", "note",
           "device", "threads", "torch", "commit", "timestamp")  # fmt: skip
WIDTH, PATCH, PICTURES = 512, 16, 8
BATCHES, SIZES, WORLDS, SHARED = (256, 1024, 4096, 16384, 65536), (64, 128, 256, 512), (1, 2, 3, 4), 2048
QUICK_BATCHES, QUICK_SIZES, QUICK_WORLDS, QUICK_SHARED = (64, 128), (64, 128), (1, 2), 96
HEADROOM = 0.8  # of the free memory
SLOW = 10.0  # seconds of a call from which on it is made once, for time and memory together
PREDICTED = "devices (predicted)"
DEVICES, EACH = (8, 64, 256, 1024), 1024  # pairs of every device
SWEEPS = ("batch", "image size", "processes", PREDICTED)

Call = Callable[[], object]


def _loss(provider: str, batch: int, device: torch.device) -> Call:
    """Forward and backward of CLIP's loss on random features [batch, 512]."""
    generator = torch.Generator(device=device).manual_seed(batch)
    image, text = (F.normalize(torch.randn(batch, WIDTH, device=device, generator=generator), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    loss = clip_loss(fused=provider == "fastvlp")
    return lambda: torch.autograd.grad(loss(image, text, scale), (image, text, scale))


def _tower(provider: str, side: int, device: torch.device) -> Call:
    """Forward and backward of an image tower of the default size on pictures of aspect ratios from 1:2 to 2:1."""
    from fastvlp.data import pack_images
    from fastvlp.layers import Pool
    from fastvlp.towers import Vit

    generator = torch.Generator().manual_seed(side)
    shares = (0.5 + 0.5 * torch.rand(PICTURES, generator=generator)).tolist()
    shorter = [max(PATCH, round(side * share / PATCH) * PATCH) for share in shares]
    if provider == "packed":
        vit = Vit(image_size=side)
        tower: Any = torch.nn.Sequential(vit, Pool(vit.width, 256)).to(device)
        sizes = [(side, short, 3) if k % 2 else (short, side, 3) for k, short in enumerate(shorter)]
        packed = pack_images([torch.randint(256, size, dtype=torch.uint8) for size in sizes], PATCH).to(device)
        return _gradients(tower, lambda: tower(packed))
    import_open_clip()
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(image_size=side, patch_size=PATCH, width=rival.WIDTH, layers=rival.IMAGE_LAYERS,
                              heads=rival.WIDTH // rival.HEAD, mlp_ratio=4.0, output_dim=256, pool_type="avg").to(device)  # fmt: skip
    square = torch.randint(256, (PICTURES, 3, side, side), dtype=torch.uint8, device=device)
    return _gradients(tower, lambda: tower(rival.normalise(square)))


def _gradients(tower: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Call:
    parameters = list(tower.parameters())
    return lambda: torch.autograd.grad(forward().sum(), parameters, allow_unused=True)


# Per sweep: what makes the function to be measured, and who is compared, ours first.
MAKERS: dict[str, tuple[Callable[[str, int, torch.device], Call], tuple[str, str]]] = {
    "batch": (_loss, ("fastvlp", "open_clip")),
    "image size": (_tower, ("packed", "open_clip")),
}


def task(sweep: str, provider: str, x: str) -> Call:
    """What ``benchmarks.peak`` runs."""
    return MAKERS[sweep][0](provider, int(x), torch.device("cpu"))


def free_memory(device: torch.device) -> int:
    """Bytes that one more process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def sweep(name: str, points: tuple[int, ...], device: torch.device, budget: Budget, memory: bool) -> Iterator[dict[str, Any]]:
    """The rows of one sweep over sizes, in one process."""
    make, providers = MAKERS[name]
    known: dict[str, tuple[int, int]] = {}  # provider -> (x, bytes) of its last point
    last, longest = 0, 0.0  # the last point and its longest call
    for x in points:
        refused = {}
        for provider, (before, extra) in known.items():
            needed, free = int(extra * (x / before) ** 2), free_memory(device)
            if needed > HEADROOM * free:
                refused[provider] = f"would need up to {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free"
        runs = [provider for provider in providers if provider not in refused]
        calls = {provider: make(provider, x, device) for provider in runs}
        peaks: dict[str, int | None] = {}
        taken: dict[str, list[float]] = {}
        if last and longest * (x / last) ** 2 > SLOW:
            for provider, call in calls.items():
                seconds, peaks[provider] = _once(call, device)
                taken[provider] = [seconds]
        elif calls:
            taken = sample(calls, Clock(device), budget)
        if taken:
            last, longest = x, max(map(max, taken.values()))
        for provider in providers:
            row: dict[str, Any] = {"sweep": name, "provider": provider, "kind": "ours" if provider == providers[0] else "rival", "x": x}
            if provider in refused:
                yield row | {"note": refused[provider]}
                continue
            extra_bytes = peaks.get(provider)
            if memory and provider not in peaks:
                command = ("benchmarks.peak", "benchmarks.scaling", name, provider, str(x))
                extra_bytes = growth(calls[provider], device) if device.type == "cuda" else elsewhere(*command)
            if extra_bytes is not None:
                known[provider] = (x, extra_bytes)
            yield row | _times(taken, provider, providers[1]) | {"extra_mb": None if extra_bytes is None else extra_bytes / 1e6}


def _once(call: Call, device: torch.device) -> tuple[float, int | None]:
    """Seconds of one call, and the bytes by which memory grew."""
    clock, seconds = Clock(device), []
    extra = growth(lambda: seconds.append(clock.seconds(call)), device)
    return seconds[0], extra


def _times(taken: dict[str, list[float]], provider: str, other: str) -> dict[str, Any]:
    seconds = taken[provider]
    percentiles = {f"p{q}_ms": 1e3 * percentile(seconds, q) for q in (20, 50, 80)}
    return percentiles | {"samples": len(seconds), "ratio_rival": paired_ratio(taken[other], seconds) if other in taken else None}


def processes(sizes: tuple[int, ...], batch: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """One batch of CLIP's loss over 1 to 4 processes with gloo, one thread each: the slowest process's time, ours by strategy."""
    from fastvlp.losses import ClipLoss

    providers = [*(f"fastvlp {strategy}" for strategy in ClipLoss.strategies), "open_clip"]
    for size in sizes:
        taken = _together(size, batch, providers, budget)
        for provider in providers:
            kind = "rival" if provider == "open_clip" else "ours"
            yield {"sweep": "processes", "provider": provider, "kind": kind, "x": size} | _times(taken, provider, "open_clip")


def predicted(devices: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The planner's lower bounds for CLIP's loss, :data:`EACH` pairs of bfloat16 on every device."""
    for size in devices:
        for found in predict("clip", EACH * size, WIDTH, Cluster(size)):
            yield {"sweep": PREDICTED, "provider": f"fastvlp {found.strategy}", "kind": "ours", "x": size, "p50_ms": 1e3 * found.seconds,
                   "samples": 0, "ratio_rival": None, "extra_mb": found.memory_bytes / 1e6}  # fmt: skip


def _together(size: int, batch: int, providers: list[str], budget: Budget) -> dict[str, list[float]]:
    """Seconds of every round and provider, of the slowest process."""
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:
        pipes, group = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, folder, batch, providers, budget), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            group.append(process)
        try:
            answers = [pipe.recv() for pipe in pipes]
        except EOFError as error:
            raise RuntimeError(f"one of {size} processes ended without an answer; what it said is above") from error
        finally:
            for process in group:
                process.join(10)
                process.kill()
    return {provider: [max(times) for times in zip(*(answer[provider] for answer in answers), strict=True)] for provider in providers}


def _serve(pipe: Connection, rank: int, size: int, folder: str, batch: int, providers: list[str], budget: Budget) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    hours = datetime.timedelta(hours=1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=hours)
    calls = {provider: _distributed(provider, rank, size, batch) for provider in providers}
    taken: dict[str, list[float]] = {provider: [] for provider in providers}
    for call in calls.values():
        call()
    start = time.perf_counter()
    for number in range(budget.max_rounds):
        late = torch.tensor([float(number >= budget.min_rounds and time.perf_counter() - start > budget.seconds)])
        dist.all_reduce(late)  # all stop together
        if late.item():
            break
        for provider, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            taken[provider].append(time.perf_counter() - begin)
    pipe.send(taken)
    dist.barrier()
    dist.destroy_process_group()


def _distributed(provider: str, rank: int, size: int, batch: int) -> Call:
    """This process's share of the batch, forward and backward; open_clip's with gradients through the gathered features."""
    share = batch // size + (rank < batch % size) if provider != "open_clip" else batch // size
    generator = torch.Generator().manual_seed(rank)
    image, text = (F.normalize(torch.randn(share, WIDTH, generator=generator), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    leaves = (image, text, scale)
    if provider == "open_clip":
        theirs = clip_loss(fused=False, local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
        return lambda: torch.autograd.grad(theirs(*leaves), leaves)
    ours = clip_loss(fused=True, rank=rank, world_size=size, strategy=provider.removeprefix("fastvlp "))
    sizes = [batch // size + (k < batch % size) for k in range(size)]
    return lambda: torch.autograd.grad(ours(*leaves, local_sizes=sizes), leaves)


def run(arguments: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Measure all sweeps; returns the content of the result file, which goes to <out>/<device>/scaling.json and .csv after each row."""
    device, quick = torch.device(arguments.device), arguments.quick
    budget = QUICK if quick else replace(FULL, min_rounds=2)
    if arguments.seconds is not None:
        budget = replace(budget, seconds=arguments.seconds)
    about = describe(device)
    content: dict[str, Any] = {"op": "scaling", "about": "how cost grows", "machine": about, "load_before": load(), "rows": []}
    for rows in (
        sweep("batch", QUICK_BATCHES if quick else BATCHES, device, budget, not quick),
        sweep("image size", QUICK_SIZES if quick else SIZES, device, budget, not quick),
        processes(QUICK_WORLDS if quick else WORLDS, QUICK_SHARED if quick else SHARED, budget),
        predicted(DEVICES),
    ):
        for row in rows:
            content["rows"].append(row | about)
            print(line(row), flush=True)
            if out is not None:
                written = write(content, out, COLUMNS)
    if out is not None:
        print(f"wrote {written}")
    return content


def line(row: dict[str, Any]) -> str:
    """A point for people."""
    head = f"{row['sweep']:<19} {row['x']:>6} {row['provider']:<16}"
    if "note" in row:
        return f"{head} {row['note']}"
    extra = "" if row.get("extra_mb") is None else f"{row['extra_mb']:9.1f} MB"
    ratio = "" if row["ratio_rival"] is None else f"{row['ratio_rival']:5.2f}x of open_clip"
    return f"{head} {row['p50_ms']:10.3f} ms  {ratio} {extra}"
