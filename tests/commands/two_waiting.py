"""What each of two processes does in ``test_a_process_waits_for_another``: the loop, in which the second is once late by 0.6 s."""

import sys
import time
from pathlib import Path

from torch import distributed as dist

from fastvlp import cli
from fastvlp.train.step import Trainer

FLAG, LATE = Path(sys.argv[2]), 6


def main() -> int:
    wait, agree, steps = dist.Work.wait, Trainer._agree, [0]

    def waits(work, *arguments):
        if dist.get_rank() == 0 and steps[0] == LATE + 1:
            FLAG.touch()
        return wait(work, *arguments)

    def agrees(trainer, *arguments):
        steps[0] += 1
        if dist.get_rank() == 1 and steps[0] == LATE + 1:
            while not FLAG.exists():
                time.sleep(0.01)
            time.sleep(0.6)
        return agree(trainer, *arguments)

    dist.Work.wait, Trainer._agree = waits, agrees
    return cli.main(["profile", sys.argv[1], "train.shard=2", "data.workers=1", "--steps", "3"])


if __name__ == "__main__":
    sys.exit(main())
