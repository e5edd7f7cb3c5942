"""One file per paper: the system, its recipe on the shipped data, and the published setting."""

from fastvlp.systems.system import Losses as Losses
from fastvlp.systems.system import Momentum as Momentum
from fastvlp.systems.system import Outputs as Outputs
from fastvlp.systems.system import Scale as Scale
from fastvlp.systems.system import System as System
from fastvlp.systems.system import freeze as freeze
