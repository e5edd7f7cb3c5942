"""CoCa (Yu et al. 2022, arXiv:2205.01917): CLIP, and a decoder of the caption that looks at the image."""

from __future__ import annotations

from dataclasses import replace

import fiddle as fdl
from torch import nn

from fastvlp.data.batch import Batch
from fastvlp.losses import next_token_nll
from fastvlp.recipe import Optim, Recipe, Schedule, Train
from fastvlp.systems import clip, shipped
from fastvlp.systems.captioner import Captioner
from fastvlp.systems.clip import Clip
from fastvlp.systems.system import Losses, Outputs, Part
from fastvlp.towers import Decoder
from fastvlp_kernels.packed import Packed


class CoCa(Clip, Captioner):
    """The contrastive loss plus ``caption`` times the mean over words of -log p(word | words before it, image).

    The text tower is causal and sees words alone; the decoder goes on from its tokens with cross attention to the image's, so that one pass
    serves both losses. The caption's feature is its last token, where the paper has a class token after the words.
    """

    def __init__(self, image: Part, text: Part, decoder: Part, embed_dim: int = 256, caption: float = 2.0,
                 pool_image: str = "attention") -> None:
        super().__init__(image, text, embed_dim, None, pool_image, "last")
        self.decoder, self.words, self.caption = decoder, nn.Linear(decoder.width, text.vocab_size, bias=False), caption
        # Logits of size 1 from normalised states, so that the first loss is that of a uniform guess.
        nn.init.normal_(self.words.weight, std=decoder.width**-0.5)

    def encode(self, batch: Batch) -> Outputs:
        image, text = self.image(batch.image), self.text(batch.text)
        # One pass of the text tower serves both losses.
        nll = next_token_nll(self.decoder(text, image), self.words, batch.text)
        return {"image": self.image_head(image), "text": self.text_head(text),
                "caption_loss": self.caption * batch.per_token(nll, "words")}

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        return {**super().objective(out, batch), **self.means(out, batch)}

    def states(self, images: Packed, texts: Packed) -> Packed:
        return self.decoder(self.text(texts), self.image(images))


def recipe() -> Recipe:
    """Contrast and captions on the shipped data."""
    made = clip.recipe()
    model = fdl.Config(CoCa, shipped.image(), shipped.text(depth=3, causal=True, vocab_size=shipped.CAPTIONER),
                       fdl.Config(Decoder, width=192, depth=3, heads=3, vocab_size=None, source=192))
    return replace(made, model=model, data=shipped.captions(), eval=replace(made.eval, captions=("mini:val-openclipart",)))


def paper() -> Recipe:
    """CoCa-Base of table 1: ViT-B/18 at 288 pixels, 12 + 12 text layers, batch 65,536, 500,000 steps."""
    made = clip.paper()
    model = fdl.Config(CoCa, clip.vit_b(18, image_size=288, grid=16), clip.text_b(width=768, heads=12, vocab_size=64000, context_length=64),
                       fdl.Config(Decoder, width=768, depth=12, heads=12, vocab_size=None, source=768), embed_dim=768)
    return replace(made, model=model, data=replace(made.data, batch_size=65536), schedule=Schedule(steps=500_000, warmup=10_000),
                   optim=Optim(lr=8e-4, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=1.0), train=Train(amp="bf16"))
