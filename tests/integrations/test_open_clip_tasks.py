"""Our losses and accelerate inside open_clip 4's training tasks: where it is installed in them, else by the calls that they make."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastvlp
from fastvlp import losses
from fastvlp.integrations.open_clip import create_loss, create_task, main
from tests.integrations import models

TASKS = ("CLIPTask", "SigLIPTask", "CoCaTask", "DistillCLIPTask")


class Calls(nn.Module):
    """What the tasks of open_clip 4 do with a model and a loss: a dict batch in, the loss called by keywords, every *_loss summed."""

    def __init__(self, name, model, teacher, loss):
        super().__init__()
        self.name, self.trainable_module, self.teacher, self.loss = name, model, teacher, loss

    def forward(self, batch):
        out = self.trainable_module(**batch)
        report = {name: out[name] for name in ("logit_scale", "logit_bias") if name in out}
        if self.name == "CoCaTask":
            # Version 3 gives the captions with the logits, a token less of both.
            shifted = {"logits": out["logits"], "labels": out["labels"]} if "labels" in out else {
                "logits": out["logits"][:, :-1], "labels": batch["text"][:, 1:]
            }  # fmt: skip
            out = {name: out[name] for name in ("image_features", "text_features", "logit_scale")} | shifted
        if self.teacher is not None:
            with torch.no_grad():
                out.update({f"dist_{name}": value for name, value in self.teacher(**batch).items()})
        terms = self.loss(**out, output_dict=True)
        terms["loss"] = sum(value for name, value in terms.items() if name.endswith("_loss"))
        return terms, report


def theirs(name, model, teacher, loss):
    task = getattr(importlib.import_module("open_clip.task"), name)
    made = task(model, teacher, loss=loss) if teacher is not None else task(model, loss=loss)
    return made.train()


@pytest.fixture(scope="module", autouse=True)
def installed():
    models.libraries()


@pytest.fixture(params=["the calls", "open_clip 4"])
def build(request):
    if request.param == "open_clip 4" and importlib.util.find_spec("open_clip.task") is None:
        pytest.skip("the installed open_clip has no training tasks (4 has)")
    return theirs if request.param == "open_clip 4" else Calls


def clip(kind="CLIP", **more):
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    if kind == "CoCa":
        coca = importlib.import_module("open_clip.coca_model")
        vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
        many = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
        model = coca.CoCa(32, many, text | {"embed_cls": True, "output_tokens": True}, vision)
        nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it as it was allocated
        return model
    return importlib.import_module("open_clip.model").CLIP(16, vision, text, output_dict=True, **more)


def parts(name, ours):
    """The model, its teacher and the loss of a task."""
    stock = importlib.import_module("open_clip.loss")
    if name == "CoCaTask":
        return clip("CoCa"), None, (losses if ours else stock).CoCaLoss(2.0, 1.0)
    if name == "SigLIPTask":
        return clip(init_logit_bias=-10.0), None, (losses if ours else stock).SigLipLoss()
    if name == "DistillCLIPTask":
        return clip(), clip(), (losses if ours else stock).DistillClipLoss()
    return clip(), None, (losses if ours else stock).ClipLoss()


def step(task, batch):
    terms, report = task(batch)
    terms["loss"].backward()
    gradients = {name: p.grad for name, p in task.trainable_module.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in terms.items()}, gradients, report


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("sharded", [False, True], ids=["", "scales as FSDP2 has them"])
def test_a_step_is_open_clips(build, name, sharded):
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(6, 3, 32, 32, generator=generator), "text": torch.randint(1, 64, (6, 8), generator=generator)}
    found = []
    for ours in (False, True):
        model, teacher, loss = parts(name, ours)
        if teacher is not None:
            with torch.no_grad():
                for parameter in teacher.parameters():
                    parameter.add_(0.1)
        if sharded:
            for scale in ("logit_scale", "logit_bias"):
                if isinstance(value := getattr(model, scale, None), nn.Parameter):
                    setattr(model, scale, nn.Parameter(value.detach().reshape(1)))
        if ours:
            fastvlp.accelerate(model, attention="packed")
        found.append(step(build(name, model, teacher, loss), batch))
    (terms, gradients, report), (own_terms, own_gradients, own_report) = found
    assert own_terms.keys() == terms.keys() and own_report.keys() == report.keys() and own_gradients.keys() == gradients.keys()
    for key, value in terms.items():
        torch.testing.assert_close(own_terms[key].reshape(()), value.reshape(()), rtol=1e-4, atol=1e-5, msg=key)
    for key, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_the_trainer_of_version_4_gets_our_loss(monkeypatch):
    """Its main calls create_task, and then whatever that task has as its loss."""
    args = SimpleNamespace(distill=False, siglip=True, model="ViT-B-32", loss_dist_impl=None, rank=0, world_size=1)
    open_clip, trainer = importlib.import_module("open_clip"), pytest.importorskip("open_clip_train.main", reason="no trainer is installed")
    task, other = (type(name, (nn.Module,), {})() for name in ("SigLIPTask", "CLAPTask"))
    other.loss = nn.Identity()
    monkeypatch.setattr(open_clip, "create_task", lambda args, model, dist_model=None: task if model == "image" else other, raising=False)
    assert create_task(args, "image", dist_model=None) is task and type(task.loss) is losses.SigLipLoss
    assert type(create_task(args, "audio").loss) is nn.Identity and type(create_loss(args)) is losses.SigLipLoss

    def version_4(rest):
        return rest, create_task(parsed, "image").loss.strategy  # noqa: F821  (a global of the trainer)

    monkeypatch.setattr(trainer, "parsed", args, raising=False)
    monkeypatch.setattr(trainer, "main", version_4)
    assert main(["--model", "ViT-B-32", "--fastvlp-strategy", "ring"]) == (["--model", "ViT-B-32"], "ring")
    monkeypatch.setattr(trainer, "main", lambda rest: rest)
    with pytest.raises(RuntimeError, match="calls neither create_loss nor create_task"):
        main([])
