"""What every operator refuses alike: what is no dense tensor, by its name."""

import pytest
import torch

from fastvlp_kernels import (
    Packed,
    bi_wkv,
    bias_activation,
    grouped_linear,
    linear_cross_entropy,
    maxsim,
    merge_plan,
    packed_attention,
    pairwise_sigmoid,
    patch_embed,
    residual_norm,
    segment_pool,
    similarity_attend,
    similarity_logsumexp,
    similarity_topk,
    token_select,
)  # fmt: skip

CU = torch.tensor([0, 2, 6], dtype=torch.int32)
X, HEADS = torch.randn(6, 4), torch.randn(6, 2, 4)
CALLS = {
    bi_wkv: {"r": HEADS, "k": HEADS, "v": HEADS, "w": HEADS, "u": HEADS[0], "cu_seqlens": CU},
    bias_activation: {"x": X},
    grouped_linear: {"x": X, "types": torch.arange(6) % 2, "weight": torch.ones(2, 3, 4)},
    linear_cross_entropy: {"x": X, "weight": X, "targets": torch.arange(6)},
    maxsim: {"x": X, "cu_x": CU, "y": X, "cu_y": CU},
    merge_plan: {"metric": X, "cu_seqlens": CU},
    packed_attention: {"q": HEADS, "k": HEADS, "v": HEADS, "cu_seqlens_q": CU},
    pairwise_sigmoid: {"x": X, "y": X},
    patch_embed: {"pixels": torch.zeros(24), "sizes": torch.tensor([[2, 4]]), "weight": torch.zeros(5, 12)},
    residual_norm: {"x": X, "branch": X, "weight": X[0]},
    segment_pool: {"x": X, "cu_seqlens": CU},
    similarity_attend: {"x": X, "y": X, "v": X},
    similarity_logsumexp: {"x": X, "y": X},
    similarity_topk: {"x": X, "y": X},
    token_select: {"scores": X[:, 0], "cu_seqlens": CU},
    Packed.of: {"x": X},
}
OPTIONS = {
    pairwise_sigmoid: {"scale": 1.0, "bias": 0.0}, patch_embed: {"patch_size": 2, "mean": 0.5, "std": 0.5}, token_select: {"keep": 1},
    similarity_attend: {"scale": 1.0}, similarity_topk: {"k": 2}, Packed.of: {"lengths": [2, 4]},
}  # fmt: skip
CASES = [pytest.param(call, name, id=f"{call.__name__} {name}") for call, tensors in CALLS.items() for name in tensors]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_what_is_no_dense_tensor_is_refused_by_name(call, name):
    given = CALLS[call] | OPTIONS.get(call, {})
    call(**given)
    for wrong in (given[name].numpy(), given[name].tolist(), None):
        with pytest.raises(TypeError, match=rf"\b{name} is {type(wrong).__name__}; it must be a torch.Tensor"):
            call(**given | {name: wrong})
    with pytest.raises(TypeError, match=rf"\b{name} has the layout torch.sparse_coo; it must be dense, as {name}.to_dense"):
        call(**given | {name: given[name].to_sparse()})
