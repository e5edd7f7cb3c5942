"""Filling token budgets: which images or captions go into one micro-batch."""

from .balance import costs as costs
from .balance import parts as parts
from .balance import split as split
from .best_fit import Packer as Packer
from .best_fit import microbatches as microbatches
from .best_fit import pack as pack
