"""When kernels read operands through descriptors, and the kernels of pairwise_sigmoid and similarity_attend that do."""

from importlib import import_module

import pytest
import torch

from tests.kernels import test_pairwise_sigmoid_triton as pairwise
from tests.kernels import test_similarity_attend_triton as attend
from tests.kernels.aot import SHARED_LIMIT, Recorder
from tests.kernels.interpreter import in_a_process

pytest.importorskip("triton", reason="Triton is not installed")


def test_where_descriptors_are_used(monkeypatch):
    module = import_module("fastvlp_kernels._triton")
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    monkeypatch.delenv("FASTVLP_TMA", raising=False)
    assert module.descriptors(x) is None
    monkeypatch.setenv("FASTVLP_TMA", "tiles")
    assert module.descriptors(x, x[3:]) == "tiles"
    unaligned = torch.zeros(8 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 64)
    for other in (x.float(), unaligned, torch.zeros(8, 68, dtype=torch.bfloat16)[:, :64], x[:1].expand(8, 64)):
        assert module.descriptors(x, other) is None
    monkeypatch.setattr(module, "architecture", lambda device: 8)
    assert module.descriptors(x) is None
    monkeypatch.setattr(module, "architecture", lambda device: 10)
    assert module.descriptors(x) == "tiles"
    monkeypatch.setattr(module, "TensorDescriptor", None)
    assert module.descriptors(x) is None
    monkeypatch.setenv("FASTVLP_TMA", "yes")
    with pytest.raises(ValueError, match="FASTVLP_TMA='yes' is unknown; allowed: tiles, persistent, or unset"):
        module.descriptors(x)


def interpreted_cases() -> None:
    """Small tiles, so that several occur, that reach beyond the operands on both sides."""
    sigmoid = import_module("fastvlp_kernels.pairwise_sigmoid.triton")
    usual, products = sigmoid.config, sigmoid.product_config
    sigmoid.config = lambda dtype, vectors: {**usual(dtype, vectors), "BLOCK_M": 16, "BLOCK_N": 16}
    sigmoid.product_config = lambda: {**products(), "BLOCK_M": 16, "BLOCK_D": 32, "BLOCK_K": 16}
    sigmoid.WAVE_TILES = range(1, 2)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    pairwise.compare(18, 21, 72, torch.bfloat16, None, 0, False)
    pairwise.compare(37, 20, 40, torch.float16, "positive", 5, True)
    scale = torch.tensor([20.0], requires_grad=True)
    for dtype, ids in ((torch.bfloat16, "exclude"), (torch.float16, "")):
        attend._compare([*attend._problem(150, 140, 72, 100, dtype), scale], ids=ids)


def test_interpreted():
    in_a_process(interpreted_cases, TRITON_INTERPRET="1", FASTVLP_TMA="tiles")


def _fits(compiled) -> None:
    assert compiled.spills == 0 and compiled.shared <= SHARED_LIMIT[compiled.arch]
    assert compiled.holds("cp.async.bulk.tensor") and not compiled.holds("cp.async.cg")
    assert compiled.holds({90: "wgmma", 100: "tcgen05"}[compiled.arch])


@pytest.mark.parametrize("arch", [90, 100])
def test_compiled_ahead_of_time(arch, monkeypatch):
    monkeypatch.setenv("FASTVLP_TMA", "tiles")
    monkeypatch.setattr(import_module("fastvlp_kernels._triton"), "architecture", lambda device: arch // 10)
    recorders = attend._launches(monkeypatch, arch, torch.bfloat16, True)
    for name in ("_forward_kernel", "_backward_kernel"):
        _fits(recorders[name].compile(arch))
    sigmoid = import_module("fastvlp_kernels.pairwise_sigmoid.triton")
    logits = Recorder(sigmoid._logits_kernel)
    monkeypatch.setattr(sigmoid, "_logits_kernel", logits)
    monkeypatch.setattr(sigmoid, "_products_kernel", Recorder(sigmoid._products_kernel))
    x, one = torch.zeros(4096, 768, dtype=torch.bfloat16), torch.ones(())
    sigmoid.forward(x, x, one, one, *[None] * 6, False, 0, torch.bfloat16, [True] * 4 + [False] * 4)
    _fits(logits.compile(arch))
