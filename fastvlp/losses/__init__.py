"""Contrastive losses: drop-in for open_clip's, exact across processes, and without the batch x batch matrix."""

from .clip import ClipLoss as ClipLoss
from .coca import CoCaLoss as CoCaLoss
from .distill import DistillClipLoss as DistillClipLoss
from .siglip import SigLipLoss as SigLipLoss
