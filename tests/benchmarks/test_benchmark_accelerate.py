"""The case of fastvlp.accelerate: every model is measured untouched and with each switch that it takes, and each switch does its work."""

import pytest
import torch

import fastvlp
from benchmarks import registry, report, rivals
from benchmarks.cases import accelerate
from benchmarks.measure import build, check_parity, results

CPU = torch.device("cpu")
CASE = registry.find("accelerate")
SHAPES = CASE.shapes("cpu", True)
pytestmark = pytest.mark.skipif(rivals.version("open_clip_torch") is None, reason="open_clip is not installed")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.values["model"])
def test_every_model_is_measured_with_each_switch(shape):
    try:
        problem = CASE.problem(shape, CPU)
    except registry.InapplicableError as why:
        pytest.skip(str(why))
    tasks, left_out = build(CASE.providers, problem)
    masked = accelerate.MODELS[shape.values["model"]][2]
    assert set(left_out) == ({"fastvlp drop"} if masked else set())
    errors, wrong = check_parity(CASE, problem, tasks)
    assert set(errors) == {"untouched", "fastvlp pack"} and not wrong
    exact = CASE.exact(problem).results
    assert all(exact[name].any() for name in ("value", "gradients"))
    for name in tasks.keys() - errors.keys():  # merging and dropping change the function, and nothing about its shape
        found = tasks[name].canonical(results(tasks[name], "forward+backward"))
        assert found["gradients"].shape == exact["gradients"].shape
        assert not torch.allclose(found["value"].double(), exact["value"], rtol=1e-3, atol=1e-4), name
    assert problem.facts["library"].split()[1][0].isdigit() and (masked or problem.facts["flops_saved"] > 0.05)


def test_a_missing_library_leaves_out_its_models_alone(monkeypatch):
    monkeypatch.setattr(accelerate, "needs", lambda package: lambda device: f"no {package}" if package == "transformers" else "")
    with pytest.raises(registry.InapplicableError, match="no transformers"):
        CASE.problem(next(shape for shape in SHAPES if "ViT" in shape.name and "transformers" in shape.name), CPU)
    assert CASE.problem(SHAPES[0], CPU).facts["library"].startswith("timm")


def test_a_third_of_the_tokens_merges():
    for shape in (SHAPES[0], CASE.shapes("cpu", False)[0]):
        model = accelerate.MODELS["timm ViT"][1](shape.values)
        last = fastvlp.accelerate(model, merge=accelerate._merge(shape)).expected[-1]
        assert last.tokens[1] == pytest.approx(1 + shape.values["side"] ** 2 * (1 - accelerate.MERGED), rel=0.12)


def test_the_table_shows_a_ratio_for_each_switch():
    shape = CASE.shapes("cpu", False)[0].name
    rows = [{"provider": name, "kind": kind, "shape": shape, "mode": "forward+backward", "p50_ms": ms, "ratio_eager": 300 / ms}
            for name, kind, ms in (("untouched", "eager", 300.0), ("fastvlp merge", "ours", 200.0),
                                   ("fastvlp pack", "ours", 250.0))]  # fmt: skip
    table = report.accelerate({"cpu-x": {"accelerate": {"rows": rows}}})
    assert f"| cpu-x | {shape} | 300 | 200 | 1.50x |  |  | 250 | 1.20x |" in table and table.count(report.UNMEASURED) >= len(SHAPES) - 1
