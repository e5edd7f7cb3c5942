"""open_clip's own trainer gives the same loss curves with fastvlp's losses as with its own."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("open_clip_train", reason="open_clip_torch is not installed")
for needed in ("webdataset", "pandas", "braceexpand"):
    pytest.importorskip(needed, reason="open_clip's trainer imports it")

from fastvlp.integrations.open_clip import create_loss  # noqa: E402
from fastvlp.losses import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
PAIRS, BATCH = 160, 16
STEPS = {"clip": 50, "accumulated": 10, "accumulated-2": 4}  # that log something; the others alone 20, on two processes 10
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
MODELS = {
    "student": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT},
    "teacher": {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT},
    "coca": {
        "embed_dim": 32,
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
}
ALONE = ("clip", "siglip", "accumulated", "coca", "distilled")
TOGETHER = ("clip-2", "siglip-2", "distilled-2", "accumulated-2")


def _free_ports(count):
    with contextlib.ExitStack() as open_ones:
        listeners = [open_ones.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _unpack(folder):
    """Pairs of a shard of the mini data as files, and the table that names them: open_clip's order of shards is not reproducible."""
    lines = ["filepath\ttitle"]
    with tarfile.open(ROOT / "fastvlp/data/mini/train-emoji-0000.tar") as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    for name in [name for name in contents if name.endswith(".webp")][:PAIRS]:
        (folder / Path(name).name).write_bytes(contents[name])
        caption = contents[name.removesuffix("webp") + "txt"].decode().strip()
        lines.append(f"{folder / Path(name).name}\t{caption}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def _curves(log):
    """Every logged loss: {name: [value of each step]}."""
    found = {}
    for line in log.read_text().splitlines():
        if "Train Epoch" in line:
            for name, value in re.findall(r"(\w*[Ll]oss): (\S+) \(", line):
                found.setdefault(name, []).append(float(value))
    return found


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """The curves of every run, by side."""
    folder = tmp_path_factory.mktemp("trainer")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = {name: ["--model", f"local-dir:{folder / name}"] for name in MODELS}
    right = ["--local-loss", "--gather-with-grad"]
    teacher = [*model["student"], "--distill-model", f"local-dir:{folder / 'teacher'}", "--distill-pretrained", "none"]
    plan = {
        # Adam with a small eps makes whole steps of the rounding of gradients that are 0.
        "common": f"--dataset-type csv --train-data {_unpack(folder)} --batch-size {BATCH} --workers 0 --lr 1e-2 --eps 1e-3 --warmup 5"
        " --seed 3 --epochs 2 --device cpu --precision fp32 --log-every-n-steps 1 --save-frequency 0".split(),
        "logs": str(folder / "logs"),
        "alone": [
            {
                "clip": [*model["student"], "--epochs", "5"],
                "siglip": [*model["student"], "--siglip"],
                "accumulated": [*model["student"], "--accum-freq", "2"],
            },
            {"coca": model["coca"], "distilled": teacher},
        ],
        "together": {
            "clip-2": [*model["student"], *right],
            "siglip-2": [*model["student"], "--siglip"],
            "distilled-2": [*teacher, *right],
            "accumulated-2": [*model["student"], *right, "--accum-freq", "2"],
        },
        "ports": _free_ports(2 * len(TOGETHER)),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("open_clip_runs.py")), str(folder / "plan.json")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    return {side: {name: _curves(folder / "logs" / f"{side}-{name}" / "out.log") for name in (*ALONE, *TOGETHER)}
            for side in ("open_clip", "fastvlp")}  # fmt: skip


@pytest.mark.parametrize("run", (*ALONE, *TOGETHER))
def test_the_curve_is_open_clips(curves, run):
    """At each of up to 50 steps, every loss that it logs, to the digits that it logs."""
    ours, theirs = (curves[side][run] for side in ("fastvlp", "open_clip"))
    assert set(ours) == set(theirs)
    assert len(theirs["Loss"]) == STEPS.get(run, 20 if run in ALONE else 10)
    assert theirs["Loss"][-1] < theirs["Loss"][0]
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=2e-4), name


ARGUMENTS = {
    **{"distill": False, "siglip": False, "model": "ViT-B-32", "horovod": False, "local_loss": True, "gather_with_grad": True},
    **{"rank": 0, "world_size": 1, "loss_dist_impl": None, "coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0},
}


@pytest.mark.parametrize(
    "change,loss",
    [({}, ClipLoss), ({"siglip": True}, SigLipLoss), ({"model": "coca_ViT-B-32"}, CoCaLoss), ({"distill": True}, DistillClipLoss),
     ({"model": "coca_ViT-B-32", "siglip": True}, CoCaLoss)],
)  # fmt: skip
def test_the_loss_is_the_one_that_open_clip_would_choose(change, loss):
    args = SimpleNamespace(**ARGUMENTS | change)
    assert type(create_loss(args)) is loss
    assert create_loss(args, strategy="ring").strategy == "ring"


def test_horovod_is_refused():
    with pytest.raises(ValueError, match="torchrun"):
        create_loss(SimpleNamespace(**ARGUMENTS | {"horovod": True}))
