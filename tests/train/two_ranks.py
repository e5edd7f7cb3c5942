"""What each of two processes does in ``test_two_processes_give_the_curve_of_one``: a run, then decisions that only one has a reason for."""

import gc
import math
import signal
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from fastvlp import cli, config
from fastvlp.data import Stage, Stream
from fastvlp.train.distributed import join
from fastvlp.train.loop import build_trainer


def decide_together() -> None:
    made = config.load(sys.argv[1], ["data.batch_size=12"])
    with join("cpu") as world:
        trainer = build_trainer(made, world)
        model = made.model
        pairs = iter(Stream(made.data.train, trainer.model.tokenizer, 12, model.image.patch_size, model.text.context_length, seed=0,
                            stage_at=Stage(24), rank=world.rank, world_size=world.size))
        whole = trainer.criterion.forward
        trainer.criterion.forward = lambda *a, **k: whole(*a, **k) * (math.nan if world.rank == 1 and trainer.counters.step == 1 else 1.0)
        trainer.step(next(pairs))
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.step(next(pairs))
        assert trainer.counters.nonfinite == 1
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        assert trainer.step(next(pairs), stop=signal.SIGTERM if world.rank == 1 else 0)["stop"] == signal.SIGTERM
        assert trainer.step(next(pairs), stop=signal.SIGINT)["stop"] == signal.SIGINT
        assert trainer.step(next(pairs))["stop"] == 0
        mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        others = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(others, mine)
        assert torch.equal(*others)
    print(f"rank {world.rank}: decided together", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    assert cli.main(["train", *sys.argv[1:]]) == 0
    decide_together()
    gc.collect()  # DDP's cycles hold the group
    dist.destroy_process_group()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), f"something keeps the destroyed group alive: {threads}"
