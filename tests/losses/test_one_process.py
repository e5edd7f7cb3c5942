"""On one process the losses are open_clip's, called the same way, and one operator each."""

import importlib
import inspect

import pytest
import torch
from batches import LOSSES, Batch, dense
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rivals import import_open_clip
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors


@pytest.fixture(scope="module")
def open_clip():
    try:
        import_open_clip()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    return importlib.import_module("open_clip.loss")


def theirs(open_clip, loss):
    return getattr(open_clip, LOSSES[loss].__name__)


def differentiated(module, tensors):
    """Loss and gradients that a loss gives for fresh leaves with these values."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    loss = module(*leaves.values())
    loss.backward()
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


OPTIONS = {
    "clip": [
        {},
        *({"local_loss": local, "gather_with_grad": grad, "cache_labels": True} for local in (False, True) for grad in (False, True)),
    ],
    "siglip": [{}, *({"dist_impl": name, "cache_labels": True} for name in ("bidir", "shift", "reduce", "gather"))],
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_open_clip(open_clip, loss, dtype):
    """Value and all gradients, against float64: no further from it than open_clip's, beyond four roundings of a log-sum-exp."""
    for scale, likeness in ((10.0, 0.5), (100.0, 0.45)):
        batch = Batch(loss, (97,), width=40, scale=scale, likeness=likeness, dtype=dtype)
        exact, tensors = batch.whole(torch.float64), batch.tensors()
        ours, eager = differentiated(LOSSES[loss](), tensors), differentiated(theirs(open_clip, loss)(), tensors)
        assert set(ours) == set(eager)
        for name in exact:
            if (loss, name) == ("clip", "bias"):
                assert ours[name] == 0
            else:
                tol = 4 * torch.finfo(torch.float32).eps * scale / (exact["loss"].item() if exact["loss"] < 1 else 1)
                assert_no_worse_than(ours[name], eager[name], exact[name], tol, f"{name} at scale {scale}")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_option_of_open_clip_gives_open_clips_numbers(open_clip, loss):
    tensors = Batch(loss, (33,), dtype=torch.float64).tensors()
    for options in OPTIONS[loss]:
        ours, eager = (differentiated(module(**options), tensors) for module in (LOSSES[loss], theirs(open_clip, loss)))
        for name, found in ours.items():
            torch.testing.assert_close(found, eager[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_signatures_begin_with_open_clips(open_clip, loss):
    for method in ("__init__", "forward"):
        ours, original = (inspect.signature(getattr(module, method)).parameters for module in (LOSSES[loss], theirs(open_clip, loss)))
        assert list(ours)[: len(original)] == list(original)
        for name, parameter in original.items():
            assert ours[name].kind == parameter.kind
            assert parameter.default is inspect.Parameter.empty or ours[name].default == parameter.default
        # open_clip has chunk_size behind dist_impl since its release 3.3.
        further = [name for name in list(ours)[len(original) :] if name != "chunk_size"]
        assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in further)
        assert "chunk_size" not in ours or list(ours).index("chunk_size") == list(ours).index("dist_impl") + 1


@pytest.mark.parametrize("loss", LOSSES)
def test_output_dict_is_what_open_clips_trainer_sums(loss):
    image, text, scale, bias = Batch(loss, (9,)).tensors().values()
    call = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": bias}
    plain, found = LOSSES[loss]()(**call), LOSSES[loss]()(**call, output_dict=True)
    assert list(found) == ["contrastive_loss"] and torch.equal(found["contrastive_loss"], plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_scalars_as_numbers_and_tensors_of_one_element(loss):
    tensors = Batch(loss, (9,), dtype=torch.float64).tensors()
    exact = Batch(loss, (9,), dtype=torch.float64).whole(torch.float64)
    number = LOSSES[loss]()(tensors["image"], tensors["text"], tensors["scale"].item(), tensors["bias"].item())
    assert number.item() == pytest.approx(exact["loss"].item(), rel=1e-12)
    scale, bias = (tensors[name].reshape(1).clone().requires_grad_() for name in ("scale", "bias"))
    LOSSES[loss]()(tensors["image"], tensors["text"], scale, bias).backward()
    assert scale.grad.shape == bias.grad.shape == (1,)
    torch.testing.assert_close(scale.grad[0], exact["scale"], rtol=1e-10, atol=0)
    torch.testing.assert_close(bias.grad[0], torch.zeros((), dtype=torch.float64) if loss == "clip" else exact["bias"], rtol=1e-10, atol=0)
    without = LOSSES[loss]()(tensors["image"], tensors["text"], tensors["scale"])
    assert without.item() == pytest.approx(dense(loss, *list(tensors.values())[:3], torch.zeros(())).item(), rel=1e-12)


class Operations(TorchDispatchMode):
    """The names of our operators that run, and of casts of matrices."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cast = func.overloadpacket == torch.ops.aten._to_copy and args[0].ndim == 2
        if cast or func.namespace in ("fastvlp", "c10d", "_c10d_functional"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss,operator", [("clip", "similarity_logsumexp"), ("siglip", "pairwise_sigmoid")])
def test_one_operator_without_casts(loss, operator):
    tensors = {name: tensor.requires_grad_() for name, tensor in Batch(loss, (9,), dtype=torch.bfloat16).tensors().items()}
    with Operations() as seen:
        LOSSES[loss]()(*tensors.values()).backward()
    assert seen.names == [operator, f"{operator}_backward"]


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_into_one_graph(loss):
    tensors = Batch(loss, (9,)).tensors()
    eager = differentiated(LOSSES[loss](), tensors)
    compiled = differentiated(torch.compile(LOSSES[loss](), backend="aot_eager", fullgraph=True), tensors)
    for name, found in compiled.items():
        torch.testing.assert_close(found, eager[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_matrix_of_all_pairs(loss):
    image, text, scale, bias = (tensor.requires_grad_() for tensor in Batch(loss, (6144,), width=4).tensors().values())
    with forbid_large_tensors(6144 * 6144 // 8):
        LOSSES[loss]()(image, text, scale, bias).backward()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["image", "text", "scale", "bias"])
def test_nan_is_passed_on(loss, name):
    tensors = Batch(loss, (5,)).tensors()
    tensors[name].view(-1)[0] = torch.nan
    assert LOSSES[loss]()(*tensors.values()).isnan()
