"""Towers at the sizes that papers of the field share."""

from __future__ import annotations

from typing import Any

import fiddle as fdl

from fastvlp.towers import Joint, Text, Vit


def vit_b(patch: int, **changes: Any) -> fdl.Config:
    """ViT-B at 224 pixels."""
    return fdl.Config(Vit, **{"width": 768, "depth": 12, "heads": 12, "patch_size": patch, "image_size": 224, "grid": 224 // patch,
                              "activation": "gelu", **changes})


def text_b(**changes: Any) -> fdl.Config:
    """CLIP's text tower: 12 causal blocks of width 512 over 77 of 49,408 tokens."""
    return fdl.Config(Text, **{"width": 512, "depth": 12, "heads": 8, "vocab_size": 49408, "context_length": 77, "causal": True,
                               "activation": "gelu", **changes})


def joint_b(**changes: Any) -> fdl.Config:
    """A transformer over patches and words of BERT-base's size."""
    return fdl.Config(Joint, **{"width": 768, "depth": 12, "heads": 12, "activation": "gelu", **changes})
