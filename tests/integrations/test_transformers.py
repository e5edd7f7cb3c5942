"""``fastvlp.accelerate`` on models of transformers: the same numbers, no logits, nothing else changed, and all of it restored."""

import copy
import importlib
import inspect
import io
import json
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastvlp
from benchmarks.rivals import import_open_clip
from fastvlp.losses import ALONE
from fastvlp_kernels._testing import forbid_large_tensors
from tests.kernels.interpreter import in_a_process

WIDTH, PAIRS = 32, 13
TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99,
        "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8, "num_patches": 4}  # fmt: skip
NAMES = ("CLIP", "Siglip", "Siglip2")


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    try:
        import_open_clip()  # makes torchvision importable, which transformers imports where it is installed
    except ModuleNotFoundError:
        pass
    return importlib.import_module("transformers")


def build(transformers, name):
    torch.manual_seed(0)
    own = {"projection_dim": 24} if name == "CLIP" else {}
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=VISION, **own))


def inputs(name, pairs=PAIRS, **more):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (pairs, 10), generator=generator)
    if name != "Siglip2":
        return {"input_ids": ids, "pixel_values": torch.randn(pairs, 3, 16, 16, generator=generator), **more}
    patches = torch.randn(pairs, 4, 8 * 8 * 3, generator=generator)
    return {"input_ids": ids, "pixel_values": patches, "pixel_attention_mask": torch.ones(pairs, 4, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[2, 2]] * pairs), **more}  # fmt: skip


def differentiated(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers_until_restored(transformers, name):
    model, batch = build(transformers, name), inputs(name, return_loss=True)
    kind, keys, signature = type(model), list(model.state_dict()), inspect.signature(model.forward)
    stock, expected = differentiated(model, batch)
    report = fastvlp.accelerate(model)
    assert isinstance(model, kind) and type(model) is not kind and list(model.state_dict()) == keys
    assert type(model).__name__ == kind.__name__ and inspect.signature(model.forward) == signature
    assert [part.path for part in report.replaced] == [""] and f"{name}Model" in str(report)
    assert not isinstance(build(transformers, name), type(model)), "another model of the class was changed too"
    output, found = differentiated(model, batch)
    assert isinstance(output, type(stock)) and output.loss.dtype == torch.float32
    same(output.loss, stock.loss)
    assert set(found) == set(expected)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
    report.restore()
    report.restore()
    assert type(model) is kind and "forward" not in vars(model)
    assert torch.equal(model(**batch).loss, stock.loss)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_made_when_they_are_read(transformers, name):
    model, batch = build(transformers, name), inputs(name, return_loss=True)
    stock = model(**batch)
    stock.logits_per_text.tanh().sum().backward()
    expected = model.logit_scale.grad.clone()
    model.zero_grad()
    fastvlp.accelerate(model)
    output = model(**batch)
    assert not {"logits_per_image", "logits_per_text"} & set(output.keys())
    same(output[0], stock.loss)
    assert "logits_per_image" not in output.keys(), "reading the loss by position made the logits"
    same(output["logits_per_image"], stock.logits_per_image)
    same(output.logits_per_text, stock.logits_per_text)
    assert output.logits_per_text is output["logits_per_text"], "they are made once"
    output.logits_per_text.tanh().sum().backward()
    torch.testing.assert_close(model.logit_scale.grad, expected, rtol=1e-4, atol=1e-5)
    same(model(**batch).to_tuple(), stock.to_tuple())
    same(model(**batch)[1:3], (stock.logits_per_image, stock.logits_per_text))
    same(model(**batch, return_dict=False), stock.to_tuple())


@pytest.mark.parametrize("name", NAMES)
def test_other_calls_are_the_models_own(transformers, name):
    model = build(transformers, name).eval()
    plain, told = inputs(name), inputs(name, return_loss=True)
    stock, stock_told = model(**plain), model(**told)
    fastvlp.accelerate(model)
    output = model(**plain)
    assert type(output) is type(stock) and torch.equal(output.logits_per_image, stock.logits_per_image)
    rectangular = plain | {"input_ids": plain["input_ids"][:5]}
    assert model(**rectangular).logits_per_image.shape == (PAIRS, 5)
    with torch.no_grad():
        evaluated = model(**told)
    assert type(evaluated) is type(stock_told) and list(evaluated) == list(stock_told)
    same(evaluated.to_tuple(), stock_told.to_tuple())
    with pytest.raises(ValueError, match="row i of both"):
        model(**rectangular, return_loss=True)


@pytest.mark.parametrize("logits", [False, True])
def test_logits_can_be_asked_for_or_never_made(transformers, logits):
    model = build(transformers, "CLIP")
    fastvlp.accelerate(model, logits=logits)
    with torch.no_grad():
        assert ("logits_per_image" in model(**inputs("CLIP"), return_loss=True).keys()) == logits
    assert ("logits_per_image" in model(**inputs("CLIP"), return_loss=True).keys()) == logits


@pytest.mark.parametrize("name", NAMES)
def test_no_batch_x_batch_tensor(transformers, name):
    """Forward and backward, with a batch so large that nothing but the logits has so many elements."""
    pairs = 6000
    model = build(transformers, name)
    fastvlp.accelerate(model)
    features = torch.randn(2, pairs, WIDTH)
    model.get_image_features, model.get_text_features = (lambda rows=rows, **_: Pooled(rows) for rows in features)
    model.train()
    with forbid_large_tensors(pairs * pairs // 8):
        model(return_loss=True).loss.backward()


class Pooled:
    def __init__(self, rows):
        self.pooler_output = rows


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_checkpoints(transformers, name, tmp_path):
    model, batch = build(transformers, name), inputs(name, return_loss=True)
    report = fastvlp.accelerate(model)
    loss = model(**batch).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other) is type(model) and torch.equal(other(**batch).loss, loss)
        next(other.parameters()).data.zero_()
        assert torch.equal(model(**batch).loss, loss), "the copy computes with its own parameters"
    model.save_pretrained(tmp_path)
    report.restore()
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.architectures == [f"{name}Model"]
    torch.testing.assert_close(loaded(**batch).loss, loss)


def test_models_inside_a_module(transformers):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = build(transformers, "CLIP"), build(transformers, "Siglip")

    both = Both()
    keys = list(both.state_dict())
    report = fastvlp.accelerate(both)
    assert [part.path for part in report.replaced][:2] == ["teacher", "student"] and list(both.state_dict()) == keys
    with pytest.raises(RuntimeError, match="accelerated already"):
        fastvlp.accelerate(both.student)
    report.restore()
    fastvlp.accelerate(both.student)


def test_subclasses(transformers):
    class Own(transformers.CLIPModel):
        pass

    class Other(transformers.CLIPModel):
        def forward(self, **batch):
            return super().forward(**batch)

    config = build(transformers, "CLIP").config
    report = fastvlp.accelerate(own := Own(config))
    assert isinstance(own, Own)
    report.restore()
    assert type(own) is Own
    other = Other(config)
    with pytest.raises(ValueError, match="nothing was asked for"):
        fastvlp.accelerate(other)
    report = fastvlp.accelerate(other, merge=1)
    assert all(part.path.startswith("vision_model.") for part in report.replaced), "its own forward was replaced"


def test_what_is_nothing_of_ours():
    with pytest.raises(TypeError, match="nothing to replace in Linear"):
        fastvlp.accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_low_precision(transformers, name):
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model, batch = build(transformers, name).to(dtype), inputs(name, return_loss=True)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stock = model(**batch).loss
            fastvlp.accelerate(model)
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, stock.float(), rtol=0.02, atol=0.02)
        loss.backward()
        assert model.logit_scale.grad.isfinite()


def two_ranks(folder):
    """transformers is imported once, for both."""
    import_open_clip()
    transformers = importlib.import_module("transformers")
    torch.multiprocessing.start_processes(rank_of_two, (transformers, folder), nprocs=2, start_method="fork")


def rank_of_two(rank, transformers, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for name in ("CLIP", "Siglip"):
        for group in (ALONE, None, dist.group.WORLD):
            model = build(transformers, name)
            fastvlp.accelerate(model, group=group)
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            batch = {key: value[rank * 6 : rank * 6 + 6] for key, value in inputs(name, 12).items()}
            output, gradients = differentiated(wrapped, batch | {"return_loss": True})
            assert "logits_per_text" not in output.keys()
            found.append((output.loss.item(), gradients["module.text_model.embeddings.token_embedding.weight"].norm().item()))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_pairs_of_all_processes(transformers, tmp_path):
    """With a group (None: all), DDP's average is the stock loss of both batches together; alone, the mean of their own."""
    in_a_process(two_ranks, str(tmp_path))
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for place, (name, pairs) in enumerate((name, pairs) for name in ("CLIP", "Siglip") for pairs in (6, 12, 12)):
        model, whole = build(transformers, name), inputs(name, 12)
        batches = [{key: value[start : start + pairs] for key, value in whole.items()} for start in range(0, 12, pairs)]
        loss = sum(model(**batch, return_loss=True).loss for batch in batches) / len(batches)
        loss.backward()
        norm = model.text_model.embeddings.token_embedding.weight.grad.norm().item()
        assert sum(results[rank][place][0] for rank in range(2)) / 2 == pytest.approx(loss.item(), rel=1e-5)
        assert [results[rank][place][1] for rank in range(2)] == pytest.approx([norm, norm], rel=1e-4)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(transformers, name, bf16, tmp_path):
    """Four steps and an evaluation give the stock model's losses; the logits reach compute_metrics in their usual place."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    whole = inputs(name, 32)
    data = [{key: value[row] for key, value in whole.items()} for row in range(32)]

    def collate(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}

    def run(accelerated):
        model, seen = build(transformers, name), []
        if accelerated:
            fastvlp.accelerate(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(accelerated)), per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=4,
            learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", bf16=bf16, use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
        handle = model.register_forward_hook(lambda module, args, output: seen.append("logits_per_image" in output.keys()))
        trainer.train()
        handle.remove()
        assert seen and any(seen) != accelerated
        with torch.no_grad():
            evaluated = model(**collate(data))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate(), evaluated.to_tuple()

    (stock, _, expected), (ours, _, found) = run(False), run(True)
    assert len(ours) == 4
    assert ours == pytest.approx(stock, rel=2e-2 if bf16 else 1e-4)
    if not bf16:
        same(found[1:3], expected[1:3])
