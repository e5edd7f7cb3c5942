"""The attention functions of flash-attn, torch and xformers against dense attention with a mask."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from fastvlp.integrations.attention import BlockDiagonalMask, flash_attn_varlen_func, memory_efficient_attention, varlen_attn

Q, K = (5, 1, 7, 3), (5, 4, 2, 6)


def draw(lengths, heads, generator, width=8):
    return torch.randn(sum(lengths), heads, width, dtype=torch.float64, generator=generator)


def inputs(heads=4, key_heads=4, k_lengths=K):
    generator = torch.Generator().manual_seed(0)
    q, k, v = draw(Q, heads, generator), draw(k_lengths, key_heads, generator), draw(k_lengths, key_heads, generator)
    starts = [torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) for lengths in (Q, k_lengths)]
    return q, k, v, *starts


def dense(q, k, v, k_lengths=K, causal=False, scale=None, bias=None):
    """Segment by segment; causal at the end of a segment, a query that sees nothing gives 0."""
    outs = []
    for a, b, c, n, m, x in zip(
        q.split(Q), k.split(k_lengths), v.split(k_lengths), Q, k_lengths, (bias or [None] * len(Q)), strict=True
    ):  # fmt: skip
        mask = torch.zeros(n, m, dtype=q.dtype) if x is None else x.expand(n, m).clone()
        if causal:
            mask[torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)] = -torch.inf
        group = q.shape[1] // k.shape[1]
        b, c = b.repeat_interleave(group, 1), c.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (a, b, c)), attn_mask=mask, scale=scale).transpose(0, 1)
        outs.append(torch.where(mask.isneginf().all(1)[:, None, None], 0, out))
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_attn_and_torch(causal, key_heads):
    q, k, v, cu_q, cu_k = inputs(key_heads=key_heads)
    expected = dense(q, k, v, causal=causal, scale=0.3)
    found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 6, softmax_scale=0.3, causal=causal)
    torch.testing.assert_close(found, expected)
    window = (-1, 0) if causal else (-1, -1)
    torch.testing.assert_close(varlen_attn(q, k, v, cu_q, cu_k, 7, 6, scale=0.3, window_size=window, enable_gqa=True), expected)
    size = torch.randint(1, 5, (len(k),)).float()
    weighted = dense(q, k, v, causal=causal, bias=list(size.double().log().split(K)))
    torch.testing.assert_close(flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 6, causal=causal, key_size=size), weighted)


def test_positions_and_names_are_those_of_the_libraries():
    flash = list(inspect.signature(flash_attn_varlen_func).parameters)
    assert flash[:16] == (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap alibi_slopes "
        "deterministic return_attn_probs block_table"
    ).split()  # fmt: skip
    theirs = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn").varlen_attn
    own = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name in own:
            assert own[name].kind == parameter.kind and own[name].default == parameter.default, name
    assert list(inspect.signature(theirs).parameters)[:7] == list(own)[:7]


def test_what_is_not_computed_is_refused_by_name():
    q, k, v, cu_q, cu_k = inputs()
    for name, value in {"window_size": (4, 4), "softcap": 30.0, "alibi_slopes": torch.ones(4), "return_attn_probs": True,
                        "block_table": torch.ones(1)}.items():  # fmt: skip
        only = f"; only {name}=None is" if isinstance(value, torch.Tensor) else ""
        with pytest.raises(ValueError, match=f"flash_attn_varlen_func: {name}=.*{only}"):
            flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 6, **{name: value})
    for name, value in {"return_aux": True, "window_size": (3, 0), "seqused_k": torch.ones(4), "block_table": torch.ones(1)}.items():
        only = f"a tensor .*; only {name}=None is" if isinstance(value, torch.Tensor) else ""
        with pytest.raises(ValueError, match=f"varlen_attn: {name}={only}"):
            varlen_attn(q, k, v, cu_q, cu_k, 7, 6, **{name: value})
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        varlen_attn(q, k[:, :2], v[:, :2], cu_q, cu_k, 7, 6)
    with pytest.raises(ValueError, match="op=1 is not computed"):
        memory_efficient_attention(q[None], k[None], v[None], op=1)
    with pytest.raises(ValueError, match=r"dropout_p=1.5.*from 0 to below 1"):
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 6, 1.5)
    with pytest.raises(ValueError, match="attn_bias is Tensor"):
        memory_efficient_attention(q[None], k[None], v[None], torch.zeros(1))
    with pytest.raises(ValueError, match="batch of 2"):
        memory_efficient_attention(torch.cat((q[None], q[None])), k[None], v[None], BlockDiagonalMask.from_seqlens(Q, K))
    with pytest.raises(ValueError, match="must be"):
        memory_efficient_attention(q[None], k, v)
    with pytest.raises(ValueError, match="every segment needs both"):
        BlockDiagonalMask.from_seqlens(Q, K[:2])
    with pytest.raises(ValueError, match=r"kv_seqlen is \[5, -2\]; the lengths of segments are 0 or more"):
        BlockDiagonalMask.from_seqlens([2, 3], [5, -2])
    mask = BlockDiagonalMask.from_seqlens(Q, K)
    for wrong in (mask.make_causal, lambda: mask.split(q[None])):
        with pytest.raises(ValueError, match="differ in number"):
            wrong()


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_masks(causal):
    q, k, v, _, _ = inputs()
    mask = BlockDiagonalMask.from_seqlens(Q, K)
    mask = mask.make_causal_from_bottomright() if causal else mask
    found = memory_efficient_attention(q[None], k[None], v[None], mask)
    torch.testing.assert_close(found[0], dense(q, k, v, causal=causal))
    bias = mask.materialize((1, 4, sum(Q), sum(K)), torch.float64)
    assert bias.shape == (1, 4, sum(Q), sum(K)) and bias.unique().tolist() == [-torch.inf, 0]
    probabilities = torch.nan_to_num((torch.einsum("nhd,mhd->hnm", q, k) * 8**-0.5 + bias[0]).softmax(-1))
    torch.testing.assert_close(found[0], torch.einsum("hnm,mhd->nhd", probabilities, v))


def test_xformers_masks_move_with_their_tensors():
    mask = BlockDiagonalMask.from_seqlens(Q, K, device="cpu").make_causal_from_bottomright()
    moved = mask.to("meta")
    assert moved.q_starts.is_meta and moved.k_starts.is_meta and moved.causal and torch.equal(moved.q_lengths, mask.q_lengths)
    itself = BlockDiagonalMask.from_seqlens(Q).to(torch.device("meta"))
    assert itself.k_starts is itself.q_starts


def test_xformers_lists_batches_and_gradients():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(b, m, 2, 4, dtype=torch.float64, generator=generator).requires_grad_() for b, m in ((2, 3), (1, 5), (3, 1))]
    mask, joined = BlockDiagonalMask.from_tensor_list(parts)
    assert joined.shape == (1, 14, 2, 4) and mask.q_lengths.tolist() == [3, 3, 5, 1, 1, 1]
    for one, other in zip(mask.split(joined), parts, strict=True):
        assert torch.equal(one, other)
    causal = mask.make_causal()
    found = causal.split(memory_efficient_attention(joined, joined, joined, causal))
    for one, part in zip(found, parts, strict=True):
        heads = part.transpose(1, 2)
        expected = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(one, expected)
        ours, theirs = (torch.autograd.grad(x.square().sum(), part, retain_graph=True)[0] for x in (one, expected))
        torch.testing.assert_close(ours, theirs)
    queries = [torch.randn(b, 2, 2, 4, dtype=torch.float64, generator=generator) for b in (2, 1, 3)]
    mask, q, k, v = BlockDiagonalMask.from_tensor_lists_qkv(queries, parts, parts)
    for one, query, part in zip(mask.split_queries(memory_efficient_attention(q, k, v, mask)), queries, parts, strict=True):
        heads = part.transpose(1, 2)
        torch.testing.assert_close(one, F.scaled_dot_product_attention(query.transpose(1, 2), heads, heads).transpose(1, 2))
    assert [part.shape for part in mask.split_kv(k)] == [part.shape for part in parts]
    x = parts[0].detach()
    single = memory_efficient_attention(x[:, :, 0], x[:, :, 0], x[:, :, 0], output_dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, F.scaled_dot_product_attention(x[:, :, 0], x[:, :, 0], x[:, :, 0]).float())


@pytest.mark.parametrize("causal", [False, True])
def test_dropped_weights(causal):
    """Every probability is 0 or divided by 1 - p: with one-hot values the output is the probabilities themselves."""
    q, k, _, cu_q, cu_k = inputs()
    one_hot = torch.eye(sum(K), dtype=q.dtype)[:, None].expand(-1, k.shape[1], -1)
    size = torch.rand(sum(K)) * 3 + 0.1
    whole = flash_attn_varlen_func(q, k, one_hot, cu_q, cu_k, 7, 6, causal=causal, key_size=size)
    torch.manual_seed(0)
    draws = torch.stack([
        flash_attn_varlen_func(q, k, one_hot, cu_q, cu_k, 7, 6, 0.25, causal=causal, key_size=size) for _ in range(40)
    ])  # fmt: skip
    kept = draws != 0
    torch.testing.assert_close(draws, kept * whole / 0.75)
    shares = kept.double().mean(0)[whole > 0]
    assert (shares.mean() - 0.75).abs() < 0.02 and shares.std() < 0.15, "each weight is drawn by itself"
    mask = BlockDiagonalMask.from_seqlens(Q, K)
    other = memory_efficient_attention(q[None], k[None], one_hot[None], mask, 0.25)
    torch.testing.assert_close(other, (other != 0) * memory_efficient_attention(q[None], k[None], one_hot[None], mask) / 0.75)


def test_gradients_through_dropped_weights():
    q, k, v, cu_q, cu_k = (x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs())

    def attend(q, k, v):
        torch.manual_seed(0)
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 6, 0.3)

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_the_old_place():
    import fastvlp.attention
    import fastvlp.integrations.attention as attention
    import fastvlp.integrations.tome as tome
    import fastvlp.tome

    for old, new in ((fastvlp.attention, attention), (fastvlp.tome, tome)):
        for name in dir(old):
            assert name.startswith("_") or getattr(old, name) is getattr(new, name)
