"""Unified VLP (Zhou et al. 2019, arXiv:1909.11059): one transformer, whose hidden words see all others or only those before them."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
import torch
from torch import Tensor, nn

from fastvlp.data.batch import Batch
from fastvlp.data.fields import Caption, Image, Uniform
from fastvlp.losses import hidden_words, masked_word_nll
from fastvlp.recipe import Eval, Optim, Recipe, Schedule
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import MaskedCaptioner
from fastvlp.systems.system import Outputs, Part
from fastvlp_kernels.packed import Packed


class UnifiedVlp(MaskedCaptioner):
    """-log p(hidden word | picture, words it sees), the mean over hidden words; each sample draws which words these are.

    Streams: ``image``; ``text``; ``masked``, the same caption with words hidden; ``draw``, a number in 0..1: below ``seq2seq`` the words
    see the picture and those before them (mask of S2S), else everything (BERT's). A caption's end is always hidden in S2S, where nobody
    sees it, so that writing learns to stop. Mask, draw by sample and segment ids of both tasks are those of github.com/LuoweiZhou/VLP; that
    also replaces a fifth of the hidden words by random or their own ids, and takes region features for the picture.

    Args:
        image, text: towers of which the embeddings are used. mask_id: as in ``Caption``. seq2seq: share of the samples.
    """

    def __init__(self, image: Part, text: Part, joint: Part, mask_id: int, seq2seq: float = 0.75) -> None:
        super().__init__()
        self.image, self.text, self.joint, self.mask_id, self.seq2seq = image, text, joint, mask_id, seq2seq
        self.kinds = nn.Parameter(torch.randn(2, 2, joint.width) * 0.02)
        self.words = nn.Linear(joint.width, text.vocab_size)

    def encode(self, batch: Batch) -> Outputs:
        one_way = batch.draw < self.seq2seq
        masked = self.hide_ends(batch.masked, one_way)
        nll = masked_word_nll(self._states(batch.image, masked, one_way), self.words, batch.text, masked)
        return {"words_loss": batch.per_token(nll, "hidden")}

    def counts(self, batch: Batch) -> dict[str, int]:
        # Hidden as in ``encode``, or the mean would divide by another number of words.
        return {"hidden": int(hidden_words(batch.text, self.hide_ends(batch.masked, batch.draw < self.seq2seq)).sum())}

    def _states(self, images: Packed, texts: Packed, one_way: Tensor) -> Packed:
        # Segment embeddings tell pictures from words, and say which task it is.
        parts = []
        for side, part in enumerate((self.image.embed(images), self.text.embed(texts))):
            kind = self.kinds[one_way.long(), side].repeat_interleave(part.cu_seqlens.diff(), 0, output_size=part.total)
            parts.append(part.replace(x=part.x + kind, pos=None))
        joined = parts[0].join(parts[1])
        seen = torch.where(one_way, images.cu_seqlens.diff(), joined.cu_seqlens.diff())  # a prefix of everything is BERT's mask
        return self.joint(joined, prefix=seen).last(texts)

    def states(self, images: Packed, texts: Packed) -> Packed:
        return self._states(images, texts, torch.ones(len(texts), dtype=torch.bool, device=texts.x.device))


def recipe() -> Recipe:
    """Three of four samples one way, the others both ways."""
    fields = {"image": Image(), **shipped.masked(Caption(max_captions=2, ends=shipped.ENDS)), "draw": Uniform()}
    return replace(clip.recipe(), model=fdl.Config(UnifiedVlp, shipped.patches(), shipped.words(), shipped.joint(), shipped.MASK),
                   data=replace(shipped.PAIRS, fields=fields), eval=Eval(captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """BERT-base on Conceptual Captions, 30 epochs of 8 x 64 (the README's table); 10 x 10 patches stand for its 100 regions."""
    made = clip.paper()
    fields = {"image": Image(), **shipped.masked(Caption(length=20), 30522), "draw": Uniform()}
    image, text = clip.vit_b(32, image_size=320, grid=10), clip.text_b(width=768, vocab_size=30523, context_length=20)
    model = fdl.Config(UnifiedVlp, shipped.embedding(image), shipped.embedding(text), clip.joint_b(), 30522)
    return replace(made, model=model, data=replace(made.data, batch_size=512, fields=fields, tokenizer="bert-base-uncased/tokenizer.json"),
                   schedule=Schedule(samples=30 * 3_000_000, warmup=17_500),
                   optim=Optim(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01))
