"""Contrastive losses: drop-in for open_clip's, exact across processes, and without the batch x batch matrix."""

from .clip import ClipLoss as ClipLoss
from .cluster_distill import cluster_instance_loss as cluster_instance_loss
from .coca import CoCaLoss as CoCaLoss
from .distill import DistillClipLoss as DistillClipLoss
from .dynamic_distill import dcd_loss as dcd_loss
from .dynamic_distill import hard_candidates as hard_candidates
from .everyone import gather_batch as gather_batch
from .filip import filip_loss as filip_loss
from .focal import focal_sigmoid_loss as focal_sigmoid_loss
from .grouping import group_patches as group_patches
from .grouping import grouping_loss as grouping_loss
from .light import light_clip_loss as light_clip_loss
from .light import softness as softness
from .llip import llip_loss as llip_loss
from .momentum import MomentumEncoder as MomentumEncoder
from .momentum import queue_contrastive_loss as queue_contrastive_loss
from .objective import contrastive_loss as contrastive_loss
from .prolip import gaussian_kl as gaussian_kl
from .prolip import inclusion_loss as inclusion_loss
from .prolip import log_inclusion as log_inclusion
from .prolip import prolip_loss as prolip_loss
from .proto import back_translate as back_translate
from .proto import proto_clip_loss as proto_clip_loss
from .queue import NegativeQueue as NegativeQueue
from .rank import rank_clip_loss as rank_clip_loss
from .siglip import SigLipLoss as SigLipLoss
