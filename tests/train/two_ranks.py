"""What each of two processes does in ``test_two_processes_give_the_curve_of_one``: a run, then decisions that only one has a reason for."""

import gc
import math
import signal
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from fastvlp import cli, config
from fastvlp.systems.clip import Clip
from fastvlp.train import Trainer, loop
from fastvlp.train.parallel import join, whole_tensor


def decide_together() -> None:
    recipe = config.load(sys.argv[1], ["data.batch_size=12", *sys.argv[3:], "train.max_nonfinite=9"])
    with join("cpu") as world:
        system, stream = loop.prepare(recipe, world)

        def objective(out, batch):
            bad = world.rank == 1 and batch.index == 1
            return {name: value * (math.nan if bad else 1.0) for name, value in Clip.objective(system, out, batch).items()}

        system.objective = objective
        trainer, batches = Trainer(recipe, system, world), iter(stream)
        trainer.settle(trainer.step(next(batches)))
        before = [whole_tensor(p.detach()).clone() for p in trainer.system.parameters()]
        trainer.settle(trainer.step(next(batches)))
        assert trainer.counters.nonfinite == 1
        assert all(torch.equal(a, whole_tensor(b)) for a, b in zip(before, trainer.system.parameters(), strict=True))
        assert trainer.step(next(batches), stop=signal.SIGTERM if world.rank == 1 else 0).stop == signal.SIGTERM
        assert trainer.step(next(batches), stop=signal.SIGINT).stop == signal.SIGINT
        assert trainer.step(next(batches)).stop == 0
        mine = torch.cat([whole_tensor(p.detach()).flatten() for p in trainer.system.parameters()])
        others = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(others, mine)
        assert torch.equal(*others)
    print(f"rank {world.rank}: decided together", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    assert cli.main(["train", *sys.argv[1:]]) == 0
    decide_together()
    gc.collect()  # FSDP's cycles hold the group
    dist.destroy_process_group()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), f"something keeps the destroyed group alive: {threads}"
