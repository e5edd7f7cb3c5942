"""What each of two processes does in ``test_two_processes_score_as_one``."""

import sys

import pytest
import torch

import fastvlp.losses  # noqa: F401  # before the group: see docs/distributed.md
from fastvlp import evaluate
from fastvlp.recipe import Eval
from fastvlp.train.parallel import World, join, parallelize
from tests.evaluate.test_measure import system_of


def main(shard: str, dead: str, classes: str) -> None:
    torch.set_num_threads(1)
    asked = {"coca": Eval((shard,), classes, retrieval=(shard, dead), captions=(dead,), knn=(dead,), probe_train=(shard,), batch_size=3),
             "albef": Eval(pairs=(dead,), retrieval=(dead,), batch_size=3)}
    with join("cpu") as world:
        for name, config in asked.items():
            score(name, config, shard, world)
    print(f"rank {world.rank}: as alone", flush=True)


def score(name: str, config: Eval, shard: str, world: World) -> None:
    alone = evaluate.measure(system_of(name), config), evaluate.encode_all(system_of(name), shard, 8)
    for split in (1, 2):
        system = parallelize(system_of(name), split, world=world).eval()
        with torch.no_grad():
            scores = evaluate.measure(system, config, world)
        assert scores.keys() == alone[0].keys()
        for measured, values in alone[0].items():
            assert scores[measured] == pytest.approx(values, rel=1e-4, abs=1e-5), measured
        found = evaluate.encode_all(system, shard, 8, world)
        for key, value in alone[1].items():
            one, other = (side.x if hasattr(side, "x") else side for side in (value, found[key]))
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
