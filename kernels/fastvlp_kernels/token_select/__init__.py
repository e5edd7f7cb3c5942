from .op import TokenSelection as TokenSelection
from .op import token_select as token_select
