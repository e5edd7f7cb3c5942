"""Low-rank adapters on any part of a system, through peft."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def lora(part: nn.Module, rank: int = 8, alpha: int = 16, dropout: float = 0.0,
         targets: Sequence[str] = ("qkv", "proj", "up", "down")) -> nn.Module:
    """A part whose weights are frozen and whose linear layers learn a product of two thin matrices each (LoRA, arXiv:2106.09685).

        model.image = fdl.Config(lora, fdl.Config(Vit, ...), rank=8)

    The adapters start as nothing: the part gives what it gave. ``run.start`` fills the frozen weights from a run without adapters.

    Args:
        rank: of the products. alpha: they are multiplied by alpha / rank.
        targets: ends of the names of the layers that get one; of a timm ViT ("qkv", "proj", "fc1", "fc2"), of CLIP in transformers
            ("q_proj", "k_proj", "v_proj", "out_proj").

    Raises:
        ImportError: peft is not installed. ValueError: no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"lora needs peft, which does not import ({error}): pip install 'fastvlp[adapters]'") from error
    names = [name.rpartition(".")[2] for name, module in part.named_modules() if isinstance(module, nn.Linear)]
    if not set(targets) & set(names):
        raise ValueError(f"lora: no linear layer of {type(part).__name__} is called {' or '.join(targets)}; there are "
                         f"{', '.join(sorted(set(names))) or 'none'}")
    # Frozen before the adapters are put in, which have to learn.
    part.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    found: nn.Module = inject_adapter_in_model(config, part)
    return found


lora.makes_module = True  # type: ignore[attr-defined]  # a recipe may name it (fastvlp.config.spec)
