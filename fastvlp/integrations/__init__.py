"""fastvlp inside other libraries: open_clip's trainer (``fastvlp.integrations.open_clip``) and models of transformers."""

from .accelerate import Replacement as Replacement
from .accelerate import Report as Report
from .accelerate import accelerate as accelerate
