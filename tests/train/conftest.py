"""A data set of 48 coloured rectangles and a model small enough to train in seconds."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlp import config
from fastvlp.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 20),
           "black": (0, 0, 0), "pink": (250, 150, 180)}


def write_shard(path: Path, count: int = 48) -> Path:
    """Rectangles on white, of several aspect ratios, with their colour and a number as caption and their colour as class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            colour = list(COLOURS)[i % len(COLOURS)]
            pixels = np.full((int(rng.integers(16, 40)), int(rng.integers(16, 40)), 3), 255, np.uint8)
            pixels[4:-4, 4:-4] = COLOURS[colour]
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "png")
            fields = {"captions": [f"{colour} box {i}", f"box {i}"], "class": colour}
            for name, data in ((f"{i:03d}.png", picture.getvalue()), (f"{i:03d}.json", json.dumps(fields).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("shards") / "boxes.tar")


@pytest.fixture
def settings(shard: Path, tmp_path: Path) -> dict:
    """Changes on the recipe ``clip`` that make a short run; nested as in a YAML file."""
    return {
        "run": {"name": "run", "dir": str(tmp_path / "runs"), "device": "cpu"},
        "data": {"train": [str(shard)], "batch_size": 12, "workers": 0},
        "model": {"embed_dim": 16, "image": {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32},
                  "text": {"width": 32, "depth": 1, "heads": 2, "context_length": 12}},
        "optim": {"lr": 3e-3},
        "schedule": {"steps": 10, "warmup": 2,
                     "stages": [{"until": 0.5, "image_size": 24, "keep": 0.5}, {"image_size": 32, "augment": 0.5}]},
        "train": {"checkpoint_every": 4},
        "eval": {},
    }


def recipe_of(settings: dict, base: str = "clip") -> Recipe:
    """The recipe ``base`` with these changes."""
    changes = [f"{section}.{key}={value}" if isinstance(value, str) else f"{section}.{key}={json.dumps(value)}"
               for section, inside in settings.items() for key, value in inside.items()]
    return config.load(base, [*([] if settings.get("eval") else ["eval={}"]), *changes])


@pytest.fixture
def recipe(settings: dict, tmp_path: Path) -> Path:
    """The settings as a recipe file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe_of(settings)))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(*arguments: str | Path, module: str = "fastvlp", **options) -> subprocess.Popen:
    """``python -m fastvlp ...`` on one thread, from the repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def run(*arguments: str | Path, module: str = "fastvlp", timeout: float = 300) -> subprocess.CompletedProcess:
    """``start`` and wait."""
    process = start(*arguments, module=module)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def whole_state(folder: Path) -> dict:
    """What a run's last checkpoint holds ("model", "ema", "optim"), whatever wrote it, read by torch's own conversion."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    target = folder / "whole.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no process group
        dcp_to_torch_save(last / "state", target)
    found = torch.load(target)
    target.unlink()
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, not averaged, of a run's last checkpoint."""
    return whole_state(folder)["model"]
