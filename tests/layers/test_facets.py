"""Facet-decoupled attention: one pass over all facets against a pass for each, and its masks against loops over pairs of tokens."""

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks.rivals import import_torchvision
from fastvlp.layers import Block, facet_mask, packed_attend, pairs
from fastvlp_kernels import Packed

PREFIX, FACETS, WIDTH = (5, 0, 3, 9), (2, 4, 1), 16


def passes(prefix, facets):
    """The tokens of each pass over a text with one of its facets, in the order of the facets: numbers in the packed batch."""
    found, start = [], 0
    for shared, own in zip(prefix, facets, strict=True):
        end = start + shared
        for size in own:
            found.append([*range(start, start + shared), *range(end, end + size)])
            end += size
        start = end
    return found


def sees(prefix, facets):
    """bool [T, T] by the definition: in some pass, the query comes at or after the key."""
    total = sum(prefix) + sum(map(sum, facets))
    mask = torch.zeros(total, total, dtype=torch.bool)
    for tokens in passes(prefix, [own or [0] for own in facets]):
        for place, i in enumerate(tokens):
            mask[i, tokens[: place + 1]] = True
    return mask


@pytest.mark.parametrize("facets", [FACETS, [[2, 4, 1], [3], [1, 1], [2]]])
def test_masks_positions_and_last_tokens(facets):
    per_text = [facets] * len(PREFIX) if facets is FACETS else facets
    mask = facet_mask(PREFIX, facets)
    expected = sees(PREFIX, per_text)
    i, j = torch.meshgrid(torch.arange(len(expected)), torch.arange(len(expected)), indexing="ij")
    assert torch.equal(mask.block_mask.mask_mod(None, None, i, j), expected)
    dense, first = mask.dense(), 0
    assert dense.shape[:2] == (len(PREFIX), 1)
    for text, length in enumerate(mask.lengths.tolist()):
        own = torch.eye(dense.shape[2], dtype=torch.bool)
        own[:length, :length] = expected[first : first + length, first : first + length]
        assert torch.equal(dense[text, 0], own)
        first += length
    for tokens, last in zip(passes(PREFIX, per_text), mask.last.tolist(), strict=True):
        assert mask.position[tokens].tolist() == list(range(len(tokens))) and tokens[-1] == last
    assert [int(f) for f in mask.facet[:12]] == [0] * 5 + [1, 1, 2, 2, 2, 2, 3]


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return nn.ModuleList(Block(WIDTH, 2, 2 * WIDTH, 3, "gelu") for _ in range(3)).double().requires_grad_(False)


def test_one_pass_equals_a_pass_for_each_facet(tower):
    """Outputs, and the gradients of a loss on the embeddings."""
    mask = facet_mask(PREFIX, FACETS)
    tokens = torch.randn(len(mask.facet), WIDTH, dtype=torch.float64, requires_grad=True)
    places = torch.randn(20, WIDTH, dtype=torch.float64)
    x = tokens + places[mask.position]
    for block in tower:
        x = block(x, mask.attend)
    found = x[mask.last]
    alone = passes(PREFIX, [FACETS] * len(PREFIX))
    packed = Packed.of(torch.cat([tokens[ids] + places[: len(ids)] for ids in alone]), [len(ids) for ids in alone])
    for block in tower:
        packed = packed.replace(x=block(packed.x, packed_attend(packed, causal=True)))
    expected = packed.x[packed.cu_seqlens[1:].long() - 1]
    assert found.shape == (len(PREFIX) * len(FACETS), WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(out, tokens, upstream)[0] for out in (found, expected)), rtol=1e-10, atol=1e-11)


def test_a_language_model_with_rotary_positions():
    """A Llama of transformers, with fewer key heads than query heads, by ``dense()`` and ``position`` of padded texts."""
    pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # makes one importable that was built for another torch, for transformers
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = llama.LlamaModel(config).double().eval().requires_grad_(False)
    mask = facet_mask(PREFIX, FACETS)
    ids = torch.randint(50, (len(mask.facet),))
    padded, real = Packed.of(ids, mask.lengths).to_padded()
    positions, _ = Packed.of(mask.position, mask.lengths).to_padded()
    out = model(input_ids=padded, attention_mask=mask.dense(), position_ids=positions, use_cache=False).last_hidden_state
    found = out[real][mask.last]
    for mine, tokens in zip(found, passes(PREFIX, [FACETS] * len(PREFIX)), strict=True):
        alone = model(input_ids=ids[tokens][None], use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(mine, alone, rtol=1e-10, atol=1e-10)


def test_through_flex_attention(monkeypatch):
    """Uncompiled, over several blocks, with fewer key heads than query heads."""
    prefix, facets = (150, 3, 40), [[20, 130], [], [9, 8, 7]]
    mask = facet_mask(prefix, facets)
    total = len(mask.facet)
    q, k, v = (torch.randn(total, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * 8**-0.5
    weights = scores.masked_fill(~sees(prefix, facets), -torch.inf).softmax(-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(mask.attend(q, k, v), expected)
    for scores in (1, 1 << 22):
        monkeypatch.setattr(pairs, "SCORES", scores)
        torch.testing.assert_close(mask.pairs.attend(q, k, v), expected)
    monkeypatch.setattr(pairs, "flexes", lambda v: True)
    torch.testing.assert_close(mask.pairs.attend(q, k, v), expected)
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    blocks = mask.block_mask.to_dense().bool()
    assert (blocks | ~flex.create_block_mask(mask.block_mask.mask_mod, None, None, total, total, device="cpu").to_dense().bool()).all()
    assert not blocks.triu(1).any()


def test_empty_and_wrong_inputs():
    none = facet_mask([], [3])
    assert none.dense().shape == (0, 1, 0, 0) and none.attend(*torch.zeros(3, 0, 2, 4)).shape == (0, 2, 4)
    assert facet_mask([4, 2], []).lengths.tolist() == [4, 2]
    for prefix, facets, message in (
        ([3, -1], [2], r"text 1 has a prefix of -1 tokens and facets of \[2\]"),
        ([3, 1], [[2], [1, 0]], r"text 1 .*facets of \[1, 0\]; facets have 1 or more"),
        ([3, 1], [[2]], "2 prefixes and facets of 1 texts"),
        ([3], [1] * 32, "a text has 32 facets; at most 31 are allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            facet_mask(prefix, facets)
    with pytest.raises(ValueError, match=r"token_type has shape \(5,\); it must have shape \(4,\)"):
        facet_mask([3], [2]).attend(*torch.zeros(3, 4, 2, 8))
