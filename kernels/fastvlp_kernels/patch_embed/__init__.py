from .op import patch_embed as patch_embed
