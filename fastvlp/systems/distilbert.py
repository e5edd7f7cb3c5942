"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): half the layers of a masked language model learn its words and its states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fiddle as fdl
from torch.nn import functional as F

from fastvlp.data.batch import Batch
from fastvlp.losses import masked_word_nll, segment_sum, word_kl
from fastvlp.recipe import Optim, Recipe, Schedule
from fastvlp.systems import bert, clip, shipped
from fastvlp.systems.bert import Bert
from fastvlp.systems.system import Outputs, Part, freeze
from fastvlp.towers.take_layers import take_layers


class DistilBert(Bert):
    """Three losses: 5 times the divergence from the teacher's words at every token, at a temperature of 2; twice that of hidden words; and
    one minus the cosine of both last states. The student starts from every other layer of the teacher, also when that is loaded later.

    Checked against the authors' code (transformers' research projects), which takes the layers 0, 2, 4, 7, 9 and 11 of 12.
    """

    def __init__(self, text: Part, teacher: Part, weights: tuple[float, float, float] = (5.0, 2.0, 1.0), temperature: float = 2.0) -> None:
        super().__init__(text)
        self.teacher, self.weights, self.temperature = freeze(teacher), weights, temperature
        self.start()
        # run.start fills the teacher after construction: the student then starts from what was loaded, unless it was loaded itself.
        self.register_load_state_dict_post_hook(_start_from_loaded_teacher)

    def start(self) -> None:
        """Take over the teacher's words and every other of its layers."""
        take_layers(self.text, self.teacher.text)
        self.words.load_state_dict(self.teacher.words.state_dict())

    def counts(self, batch: Batch) -> dict[str, int]:
        return {**super().counts(batch), "tokens": batch.text.total}

    def encode(self, batch: Batch) -> Outputs:
        states, taught = self.text(batch.masked), self.teacher.text(batch.masked)
        kl = word_kl(states, self.words, taught, self.teacher.words, self.temperature)
        apart = segment_sum(1 - F.cosine_similarity(states.x, taught.x), states)
        of_words, of_truth, of_states = self.weights
        nll = masked_word_nll(states, self.words, batch.text, batch.masked)
        return {"teacher_loss": of_words * batch.per_token(kl, "tokens"), "words_loss": of_truth * batch.per_token(nll, "hidden"),
                "states_loss": of_states * batch.per_token(apart, "tokens")}


def _start_from_loaded_teacher(system: Any, keys: Any) -> None:
    missing = {name.partition(".")[0] for name in keys.missing_keys}
    if "text" in missing and "teacher" not in missing:
        system.start()


def recipe() -> Recipe:
    """Four layers from the eight of ``bert`` (``run.start=runs/bert`` fills the teacher)."""
    made = bert.recipe()
    return replace(made, model=fdl.Config(DistilBert, shipped.text(vocab_size=shipped.MASK + 1), made.model))


def paper() -> Recipe:
    """DistilBERT-base from BERT-base in batches of about 4,000; the number of steps, which the paper does not say, is ours."""
    made = bert.paper()
    text = clip.text_b(width=768, depth=6, heads=12, vocab_size=30523, context_length=512, causal=False)
    return replace(made, model=fdl.Config(DistilBert, text, made.model), data=replace(made.data, batch_size=4000),
                   schedule=Schedule(steps=20_000, warmup=1000), optim=Optim(lr=5e-4, eps=1e-6, weight_decay=0.0))
