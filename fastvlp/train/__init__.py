"""Training: ``fastvlp.train.train(config)`` and what it is made of."""

from fastvlp.train.grad_cache import GradCache as GradCache
from fastvlp.train.interrupt import Interrupted as Interrupted
from fastvlp.train.loop import train as train
from fastvlp.train.trainer import Trainer as Trainer
from fastvlp.train.trainer import TrainingError as TrainingError
