"""Every system at a size that runs in milliseconds, in float64, and one whole batch for all of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastvlp.data.batch import Batch
from fastvlp.layers import QFormer
from fastvlp.systems.adem_vl import AdemVl
from fastvlp.systems.aim import Aim
from fastvlp.systems.albef import Albef
from fastvlp.systems.align import Align
from fastvlp.systems.bert import Bert
from fastvlp.systems.blip2 import Blip2
from fastvlp.systems.brivl import BriVl
from fastvlp.systems.clip import Clip
from fastvlp.systems.coca import CoCa
from fastvlp.systems.dcd import Dcd
from fastvlp.systems.distilbert import DistilBert
from fastvlp.systems.dlip import Dlip
from fastvlp.systems.ep_alm import EpAlm
from fastvlp.systems.fiber import Fiber
from fastvlp.systems.filip import Filip
from fastvlp.systems.flame import Flame
from fastvlp.systems.jina_clip import JinaClip
from fastvlp.systems.lexlip import LexLip
from fastvlp.systems.lit import Lit
from fastvlp.systems.llama_fusion import LlamaFusion
from fastvlp.systems.m2_encoder import M2Encoder
from fastvlp.systems.mae import Mae
from fastvlp.systems.navit import NaVit
from fastvlp.systems.pix2struct import Pix2Struct
from fastvlp.systems.proto_clip import ProtoClip
from fastvlp.systems.pyramid_drop import PyramidDrop
from fastvlp.systems.rwkv_clip import RwkvClip
from fastvlp.systems.siglip import SigLip
from fastvlp.systems.simvlm import SimVlm
from fastvlp.systems.slip import Slip
from fastvlp.systems.solo import Solo
from fastvlp.systems.system import System
from fastvlp.systems.unified_vlp import UnifiedVlp
from fastvlp.systems.vilt import Vilt
from fastvlp.towers import Decoder, Joint, RwkvImage, RwkvText, Text, Vit
from fastvlp_kernels.packed import Packed

SAMPLES, WORDS, PATCH = 8, 64, 4


def vit(**changes) -> Vit:
    return Vit(**{"width": 32, "depth": 2, "heads": 2, "patch_size": PATCH, "image_size": 32, "grid": 8, "activation": "gelu", **changes})


def text(**changes) -> Text:
    return Text(**{"width": 32, "depth": 2, "heads": 2, "vocab_size": WORDS + 1, "context_length": 16, "activation": "gelu", **changes})


def joint() -> Joint:
    return Joint(32, 2, 2, activation="gelu")


def _brivl() -> System:
    system = BriVl(vit(), text(), 16, queue=40, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for queue in system.queues.values():
        queue.enqueue(F.normalize(torch.randn(20, 16, generator=generator, dtype=torch.float64), dim=1))
    return system


def _proto_clip() -> System:
    system = ProtoClip(vit(), text(), 16, clusters=5, hidden=32, projection=8, target_temperature=0.5)
    for seed in (5, 6):
        generator = torch.Generator().manual_seed(seed)
        system.before_episode({name: F.normalize(torch.randn(30, 8, generator=generator), dim=1)
                               for name in ("projected_image", "projected_text")})
    return system


def _fiber() -> System:
    system = Fiber(vit(), text(), 1, 16)
    for module in system.fusion.modules():  # the gates start closed
        if hasattr(module, "gate") and module.gate is not None:
            torch.nn.init.constant_(module.gate, 0.7)
    return system


MAKERS = {
    "clip": lambda: Clip(vit(), text(), 16),
    "siglip": lambda: SigLip(vit(), text(), 16),
    "lit": lambda: Lit(vit(), text(), 16),
    "jina_clip": lambda: JinaClip(vit(), text(), 16, prefixes=(4, 8, 16)),
    "filip": lambda: Filip(vit(), text(), 16),
    "slip": lambda: Slip(vit(), text(), 16, hidden=32, projection=16),
    "brivl": _brivl,
    "proto_clip": _proto_clip,
    "dlip": lambda: Dlip(vit(), text(), Clip(vit(width=48, heads=3), text(), 24), 16),
    "dcd": lambda: Dcd(vit(), text(), Vilt(vit(), text(), joint()), 16, drawn=5, hard=3),
    "rwkv_clip": lambda: RwkvClip(RwkvImage(32, 2, 2, PATCH, 32, 8), RwkvText(32, 2, 2, vocab_size=WORDS + 1, context_length=16), 16),
    "align": lambda: Align(vit(), text(), 16),
    "m2_encoder": lambda: M2Encoder(vit(), text(), 16, node_size=1),
    "navit": lambda: NaVit(vit(heads=8), text(), 16),
    "bert": lambda: Bert(text()),
    "distilbert": lambda: DistilBert(text(depth=1), Bert(text())),
    "coca": lambda: CoCa(vit(), text(causal=True), Decoder(32, 2, 2, None, activation="gelu"), 16),
    "simvlm": lambda: SimVlm(vit(), text(), joint(), prefix=0.4),
    "vilt": lambda: Vilt(vit(), text(), joint()),
    "mae": lambda: Mae(vit(), Joint(16, 1, 2)),
    "lexlip": lambda: LexLip(vit(), text()),
    "blip2": lambda: Blip2(vit(), QFormer(32, 32, 2, 2, 64, dropout=0.0), SimVlm(vit(), text(), joint()), queries=4),
    "albef": lambda: Albef(vit(), text(), joint(), 16),
    "unified_vlp": lambda: UnifiedVlp(vit(), text(), joint(), WORDS, seq2seq=0.5),
    "aim": lambda: Aim(vit(), head=1, head_width=16),
    "fiber": _fiber,
    "pyramid_drop": lambda: PyramidDrop(vit(), text(), Joint(32, 3, 2), (1, 2)),
    "ep_alm": lambda: EpAlm(vit(), SimVlm(vit(), text(), Joint(32, 3, 2)), layers=2, first=1, last=3),
    "adem_vl": lambda: AdemVl(vit(), SimVlm(vit(), text(), joint()), grids=(2, 1), hidden=8, alpha=0.5, beta=0.5, drop=0.3),
    "pix2struct": lambda: Pix2Struct(vit(), Decoder(32, 2, 2, WORDS + 1, 16, activation="gelu")),
    "flame": lambda: Flame(vit(), SimVlm(vit(), text(), joint()), [[5, 6], [7], [8, 9, 10]], hidden=48),
    "flame of features": lambda: Flame(vit(), width=6, hidden=48),
    "llama_fusion": lambda: LlamaFusion(vit(), SimVlm(vit(), text(), joint())),
    "solo": lambda: Solo(vit(), text(), joint()),
}


def make(name: str) -> System:
    """A system with the same weights every time."""
    torch.manual_seed(0)
    return MAKERS[name]().double()


def whole() -> Batch:
    """Eight samples: ragged pictures (all patches, half of them, two views) and captions (whole, masked, of another sample)."""
    generator = torch.Generator().manual_seed(3)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def images(each: int = 1) -> Packed:
        grids = [(number(2, 5), number(2, 5)) for _ in range(SAMPLES * each)]
        places = [torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(r), torch.arange(c)).int() for r, c in grids]
        return Packed.from_list([torch.rand(r * c, 3 * PATCH**2, generator=generator, dtype=torch.float64) * 255 for r, c in grids], places)

    def captions(rows: list[torch.Tensor]) -> Packed:
        places = [torch.stack([torch.arange(len(row)), *[torch.full((len(row),), -1)] * 2], 1).int() for row in rows]
        return Packed.from_list(rows, places)

    image, rows = images(), [torch.randint(1, WORDS, (number(3, 9),), generator=generator) for _ in range(SAMPLES)]
    kept = Packed.from_list([x[::2] for x in image.segments()], [p[::2] for p in image.pos.split(image.lengths.tolist())])
    masked = [torch.where(torch.arange(len(row)) % 3 == 1, WORDS, row) for row in rows]
    streams = {"image": image, "kept": kept, "views": images(2), "text": captions(rows), "masked": captions(masked),
               "other": captions(rows[1:] + rows[:1]), "draw": torch.rand(SAMPLES, generator=generator, dtype=torch.float64),
               "facets": torch.randn(SAMPLES, 18, generator=generator, dtype=torch.float64)}
    return Batch(streams, torch.arange(SAMPLES))
