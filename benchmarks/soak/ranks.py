"""Processes that compute a loss together: one is killed or stopped at a random moment, and the others must fail in time, not hang."""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

from benchmarks.processes import forkserver

TIMEOUT = 5.0  # seconds of the process group
GRACE = 25.0  # beyond it, on a busy machine
START = 60.0  # seconds in which the processes have to find each other
FAILED_AS_IT_SHOULD = 7


def strategies() -> list[tuple[str, str]]:
    """(loss, strategy) of every loss that crosses processes."""
    from fastvlp.losses import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

    several = [(loss.__name__, strategy) for loss in (ClipLoss, SigLipLoss, CoCaLoss, DistillClipLoss) for strategy in loss.strategies]
    return [*several, ("contrastive_loss", "group")]


def work(rank: int, size: int, node_size: int, folder: str, loss_name: str, strategy: str, seed: int) -> None:
    """Compute losses and gradients until something fails; exits with FAILED_AS_IT_SHOULD for the error of a lost process."""
    try:
        _compute(rank, size, node_size, folder, loss_name, strategy, seed)
    except BaseException as error:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(FAILED_AS_IT_SHOULD if isinstance(error, RuntimeError) else 1)  # without the goodbyes that wait for the lost process


def _compute(rank: int, size: int, node_size: int, folder: str, loss_name: str, strategy: str, seed: int) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(node_size)
    from fastvlp import losses

    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=TIMEOUT))
    loss: Any
    if loss_name == "contrastive_loss":
        loss = functools.partial(losses.contrastive_loss, group=dist.group.WORLD)
    else:
        weights = {"caption_loss_weight": 1.0, "clip_loss_weight": 1.0} if loss_name == "CoCaLoss" else {}
        loss = getattr(losses, loss_name)(**weights, rank=rank, world_size=size, strategy=strategy)
    generator = torch.Generator().manual_seed(seed + rank)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    for step in itertools.count():
        image, text, *teacher = (F.normalize(torch.randn(32, 16, generator=generator), dim=1).requires_grad_() for _ in range(4))
        if loss_name == "CoCaLoss":
            logits, labels = torch.randn(32, 4, 9, generator=generator), torch.randint(9, (32, 4), generator=generator)
            found = sum(loss(image, text, logits, labels, scale))
        elif loss_name == "DistillClipLoss":
            found = sum(loss(image, text, scale, *teacher, 20.0))
        else:
            found = loss(image, text, scale, *([bias] if loss_name == "SigLipLoss" else []))
        found.backward()
        if step == 1:
            Path(folder, f"ready-{rank}").touch()


def case(seed: int, folder: Path, device: torch.device) -> int:
    """A group of 2 to 4 processes of one loss and strategy, one of which dies or stalls; 1.

    Raises:
        AssertionError: another process hung, ended without an error, or died.
    """
    draw = random.Random(seed)
    allowed = strategies()
    loss, strategy = allowed[seed % len(allowed)]
    size, how = draw.randint(2, 4), draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    node_size = draw.choice([n for n in range(1, size + 1) if size % n == 0])
    victim, moment = draw.randrange(size), draw.random()
    context = forkserver()
    given = (size, node_size, str(folder), loss, strategy, seed)
    group: list[Any] = [context.Process(target=work, args=(rank, *given), daemon=True) for rank in range(size)]
    for process in group:
        process.start()
    what = f"{loss}, strategy={strategy!r}, rank {victim} of {size} ({node_size} a machine) got {how.name}"
    try:
        ready = _within(START, lambda: all((folder / f"ready-{rank}").exists() for rank in range(size)),
                        lambda: not all(process.is_alive() for process in group))  # fmt: skip
        assert ready, f"{what}: the group did not start{_errors(folder)}"
        time.sleep(moment)
        os.kill(group[victim].pid, how)
        others = [rank for rank in range(size) if rank != victim]
        ended = _within(TIMEOUT + GRACE, lambda: not any(group[rank].is_alive() for rank in others))
        assert ended, f"{what}: another process hung for more than {TIMEOUT + GRACE:.0f} s"
        codes = {rank: group[rank].exitcode for rank in others}
        assert set(codes.values()) == {FAILED_AS_IT_SHOULD}, f"{what}: the others ended with exit codes {codes}{_errors(folder)}"
    finally:
        for process in group:
            process.kill()
            process.join()
    return 1


def _within(seconds: float, done: Callable[[], bool], hopeless: Callable[[], bool] = lambda: False) -> bool:
    """Whether it is done before that many seconds have passed; asked no longer where it is hopeless."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline or hopeless():
            return False
        time.sleep(0.02)
    return True


def _errors(folder: Path) -> str:
    return "".join(f"\n{path.name}: {path.read_text(encoding='utf-8')}" for path in sorted(folder.glob("error-*")))
