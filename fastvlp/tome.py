"""The old place of :mod:`fastvlp.integrations.tome`."""

from fastvlp.integrations.tome import Merge as Merge
from fastvlp.integrations.tome import Unmerge as Unmerge
from fastvlp.integrations.tome import bipartite_soft_matching as bipartite_soft_matching
from fastvlp.integrations.tome import merge_source as merge_source
from fastvlp.integrations.tome import merge_wavg as merge_wavg
from fastvlp.integrations.tome import parse_r as parse_r
