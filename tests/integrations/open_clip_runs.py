"""Series of runs of open_clip's trainer: ``python open_clip_runs.py plan.json`` imports it once and forks two ranks.

Each rank runs what the plan gives to it alone, then both the runs of two processes: each first by ``open_clip_train.main`` and then by
``fastvlp.integrations.open_clip``.
"""

import json
import logging
import os
import sys

from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn import parallel

from benchmarks.rivals import import_open_clip

import_open_clip()
from open_clip import coca_model  # noqa: E402
from open_clip_train.main import main as theirs  # noqa: E402

from fastvlp.integrations.open_clip import main as ours  # noqa: E402

SIDES = {"open_clip": theirs, "fastvlp": ours}


class OnTheCpu(parallel.DistributedDataParallel):
    """open_clip names the device of a module also where it is the CPU, which DDP refuses."""

    def __init__(self, module, device_ids, **options):
        super().__init__(module, **options)


class Initialised(coca_model.MultimodalTransformer):
    """open_clip 3.3 leaves this projection as ``torch.empty`` made it, so that a run depends on what the memory held before."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)


def run_series(rank, plan):
    coca_model.MultimodalTransformer = Initialised

    def run(side, name, arguments):
        logging.root.handlers.clear()
        SIDES[side]([*plan["common"], "--logs", plan["logs"], "--name", f"{side}-{name}", *arguments])

    for name, arguments in plan["alone"][rank].items():
        for side in SIDES:
            run(side, name, arguments)
    parallel.DistributedDataParallel = OnTheCpu
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ports = iter(plan["ports"])
    for name, arguments in plan["together"].items():
        for side in SIDES:
            os.environ["MASTER_PORT"] = str(next(ports))
            run(side, name, arguments)
            dist.destroy_process_group()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        multiprocessing.start_processes(run_series, (json.load(file),), nprocs=2, start_method="fork")
