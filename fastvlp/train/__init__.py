"""Training: ``fastvlp.train.train(recipe)`` and what it is made of."""

from fastvlp.train.grad_cache import GradCache as GradCache
from fastvlp.train.gradients import gradients as gradients
from fastvlp.train.interrupt import Interrupted as Interrupted
from fastvlp.train.loop import train as train
from fastvlp.train.parallel import parallelize as parallelize
from fastvlp.train.step import Trainer as Trainer
from fastvlp.train.step import TrainingError as TrainingError
