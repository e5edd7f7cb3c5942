"""DCD (Rao et al. 2022, arXiv:2207.01426): two towers learn from a cross-encoder, which chooses their hard samples and weighs them."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch

from fastvlp import losses
from fastvlp.data.batch import Batch
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped, vilt
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part, Scale, freeze


class Dcd(Clip):
    """Each picture is scored by the frozen teacher with its own caption and with those of the next ``drawn`` samples of the batch; the two
    towers learn the scores of its own and of the ``hard`` highest others (``fastvlp.losses.dcd_loss``).

    Choice, weights and sizes as in the authors' code (raojay7/DCD), whose false captions come from the whole set, and whose candidates are
    sorted for the teacher where the student has the pair first.

    Args:
        teacher: its ``score`` is the logarithm of a probability, as that of ``Vilt`` and ``Albef``; a logit is made of it.
        distill: share of the teacher's scores in the loss; the rest is for the labels.
    """

    def __init__(self, image: Part, text: Part, teacher: Part, embed_dim: int = 256, drawn: int = 63, hard: int = 7,
                 distill: float = 0.2) -> None:
        super().__init__(image, text, embed_dim, Scale(10.0, bias=-5.0))
        if not 1 <= hard <= drawn:
            raise ValueError(f"Dcd: hard is {hard} and drawn is {drawn}; at least one hard caption is chosen among those that are drawn")
        self.teacher, self.drawn, self.hard, self.distill = freeze(teacher), drawn, hard, distill

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        image, text, texts = losses.gather_batch(out["image"], out["text"], batch.text)
        # The next samples in the batch, round its end: with a shuffled batch as random as any, and the same on every process.
        drawn = min(self.drawn, len(texts) - 1)  # of a batch that is smaller, all others
        if drawn < 1:
            raise ValueError("Dcd: the batch has one sample, and no other caption to compare its picture with; raise data.batch_size")
        places = (torch.arange(batch.first, batch.first + len(batch))[:, None] + torch.arange(drawn + 1)) % len(texts)
        # Here and not in ``encode``, since the teacher scores captions of the whole batch.
        with torch.no_grad():
            matched = torch.stack([self.teacher.score(batch.image, texts.take(column)) for column in places.unbind(1)], 1)
            # log p -> log(p / (1 - p)): the teacher's scores are log-probabilities of a match, the students' are logits.
            logits = matched - (-matched.expm1()).log().clamp_min(-50.0)
            scores, chosen = logits[:, 1:].topk(min(self.hard, drawn), 1)
            chosen = places.to(chosen.device)[:, 1:].gather(1, chosen)
            candidates, scores = losses.gather_batch(chosen, torch.cat([logits[:, :1], scores], 1))
        return {"distilled": losses.dcd_loss(image, text, candidates, scores, *self.scale(), distill=self.distill)}


def recipe() -> Recipe:
    """Two towers from ViLT of the default size (``run.start=runs/vilt`` fills it)."""
    made = clip.recipe()
    teacher = vilt.recipe().model
    return replace(made, model=fdl.Config(Dcd, shipped.image(), shipped.text(), teacher, drawn=15))


def paper() -> Recipe:
    """Flickr30K in the authors' public settings: 63 false captions, 7 of them hard, 10 epochs in batches of 512; ViLT stands for METER."""
    made, taught = clip.paper(), vilt.paper()
    image, text = clip.vit_b(16, image_size=384, grid=24), clip.text_b(width=768, heads=12, vocab_size=30523, context_length=40,
                                                                             causal=False)
    taught.model.image = shipped.embedding(clip.vit_b(16, image_size=384, grid=24))
    return replace(made, model=fdl.Config(Dcd, image, text, taught.model, embed_dim=768),
                   data=replace(taught.data, fields=made.data.fields, batch_size=512),
                   schedule=Schedule(samples=10 * 145_000, warmup=283), optim=Optim(lr=5e-6, betas=(0.9, 0.98), weight_decay=0.01))
