"""One process of a series of runs of open_clip's trainer: ``python open_clip_runs.py plan.json SIDE RANK``.

SIDE is "open_clip", which starts ``open_clip_train.main``, or "fastvlp", which starts ``fastvlp.integrations.open_clip``. First the runs
that the plan gives to this rank alone, then those of two processes.
"""

import json
import logging
import os
import sys

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rivals import import_open_clip


class OnTheCpu(DistributedDataParallel):
    """open_clip names the device of a module also where it is the CPU, which DDP refuses."""

    def __init__(self, module, device_ids, **options):
        super().__init__(module, **options)


def main(path, side, rank):
    import_open_clip()
    from open_clip_train.main import main as theirs

    from fastvlp.integrations.open_clip import main as ours

    train = ours if side == "fastvlp" else theirs
    with open(path) as file:
        plan = json.load(file)
    common = [*plan["common"], "--logs", plan["logs"]]

    def run(name, arguments):
        logging.root.handlers.clear()
        train([*common, "--name", f"{side}-{name}", *arguments])

    for name, arguments in plan["alone"][int(rank)].items():
        run(name, arguments)
    torch.nn.parallel.DistributedDataParallel = OnTheCpu
    for place, (name, arguments) in enumerate(plan["together"].items()):
        port = plan["ports"][side] + place
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run(name, arguments)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
