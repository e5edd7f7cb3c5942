"""fastvlp inside other libraries, and under their names.

Models of timm, open_clip and transformers (``accelerate``), open_clip's trainer (``integrations.open_clip``), and the signatures of ToMe
(``integrations.tome``), flash-attn, torch and xformers (``integrations.attention``) and vit-pytorch (``integrations.vit_pytorch``).
"""

from .accelerate import accelerate as accelerate
from .report import Replacement as Replacement
from .report import Report as Report
from .report import Saving as Saving
from .report import restore as restore
