"""Contrastive losses: drop-in for open_clip's, exact across processes, and without the batch x batch matrix."""

from .clip import ClipLoss as ClipLoss
from .coca import CoCaLoss as CoCaLoss
from .distill import DistillClipLoss as DistillClipLoss
from .momentum import MomentumEncoder as MomentumEncoder
from .momentum import queue_contrastive_loss as queue_contrastive_loss
from .objective import contrastive_loss as contrastive_loss
from .queue import NegativeQueue as NegativeQueue
from .siglip import SigLipLoss as SigLipLoss
