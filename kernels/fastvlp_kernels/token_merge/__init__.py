from .op import merge_plan as merge_plan
from .plan import MergePlan as MergePlan
