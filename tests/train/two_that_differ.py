"""One of two processes has a setting of its own: both are told, before the first step."""

import sys

from fastvlp import config
from fastvlp.config import ConfigError
from fastvlp.train import train
from fastvlp.train.parallel import join

if __name__ == "__main__":
    with join("cpu") as world:
        try:
            train(config.load(sys.argv[1], [f"{sys.argv[2]}={0.001 * (1 + world.rank)}"]))
        except ConfigError as error:
            print(f"told: {error}", flush=True)
