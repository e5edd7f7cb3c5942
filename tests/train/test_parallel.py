"""How parameters lie and blocks are computed changes memory and time, never the gradient."""

import dataclasses
import json

import pytest
import torch

from fastvlp.config import ConfigError
from fastvlp.train import train
from fastvlp.train.checkpoint import checkpoints, verify
from fastvlp.train.parallel import World, join, parallelize
from tests.systems.small import make, whole
from tests.systems.two_ranks import train as two_steps
from tests.train.conftest import recipe_of, weights


@pytest.fixture(scope="module")
def plain():
    return {name: two_steps(make(name), counted(name), 1) for name in ("clip", "coca")}


def counted(name):
    return dataclasses.replace(whole(), counts=make(name).counts(whole()))


@pytest.mark.parametrize("name", ["clip", "coca"])
@pytest.mark.parametrize("options", [{"checkpointing": "blocks"}, {"checkpointing": "selective"}, {"compile": "aot_eager"},
                                     {"compile": "aot_eager", "checkpointing": "blocks"}], ids=json.dumps)
def test_recomputed_and_compiled_blocks_give_the_same_gradients(name, options, plain):
    torch._dynamo.reset()
    for parts in (1, 3):
        system = parallelize(make(name), **options)
        assert list(system.state_dict()) == list(make(name).state_dict())
        for found, expected in zip(two_steps(system, counted(name), parts), plain[name], strict=True):
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"checkpointing": "selective"}, {"checkpointing": "selective", "compile": "aot_eager"},
                                     {"checkpointing": "blocks"}], ids=json.dumps)
def test_a_tower_that_is_called_twice_in_half_precision_is_computed_again_alike(options):
    """Autocast keeps the cast weights of the first call for the second, which recomputation does not have."""
    torch._dynamo.reset()
    images = whole().image
    images = images.replace(x=images.x.float())
    exact = make("clip").float()
    ((exact.embed_image(images) * 2).sum() + exact.embed_image(images).square().sum()).backward()
    system = parallelize(make("clip").float(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (system.embed_image(images) * 2).sum() + system.embed_image(images).square().sum()
    loss.backward()
    for found, expected in zip(system.image.parameters(), exact.image.parameters(), strict=True):
        assert (found.grad - expected.grad).norm() <= 0.05 * expected.grad.norm()


def test_checkpointed_blocks_keep_less():
    """Bytes that autograd saves in the forward of one block-heavy tower."""
    def saved(**options):
        system, kept = parallelize(make("clip"), **options), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().nbytes()) or x, lambda x: x):
            system.encode(whole())
        return sum(kept)

    whole_graph, selective, blocks = saved(), saved(checkpointing="selective"), saved(checkpointing="blocks")
    assert blocks < 0.5 * whole_graph and blocks <= selective < whole_graph


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="train.shard is 3 on 2 processes; it must divide"):
        parallelize(make("clip"), 3, world=World(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match="train.offload is for several processes"):
        parallelize(make("clip"), offload=True)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(ConfigError, match="SLURM_NTASKS=2.*torchrun"), join("cpu"):
        pass


def test_checkpoints_that_are_written_meanwhile_are_the_same(settings, recwarn):
    settings["train"] |= {"checkpoint_every": 2, "keep": 9}
    train(recipe_of(settings))
    settings["run"]["name"], settings["train"]["asynchronous"] = "meanwhile", True
    train(recipe_of(settings))
    assert not [str(warned.message) for warned in recwarn if "torch.distributed is disabled" in str(warned.message)]
    from pathlib import Path

    one, two = (Path(settings["run"]["dir"]) / name for name in ("run", "meanwhile"))
    names = [[path.name for path in checkpoints(folder / "checkpoints")] for folder in (one, two)]
    assert names[0] == names[1] and len(names[0]) == 5
    for path in checkpoints(two / "checkpoints"):
        assert verify(path)["counters"]["step"] == int(path.name[-8:])
    a, b = weights(one), weights(two)
    assert all(torch.equal(a[name], b[name]) for name in a)
