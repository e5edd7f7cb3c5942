"""The likelihood of captions, a word at a time in plain float64 mathematics."""

from importlib import import_module

import pytest
import torch
from torch import nn

from fastvlp.losses import next_token_hits, next_token_nll, word_nll
from fastvlp_kernels._testing import forbid_large_tensors
from fastvlp_kernels.packed import Packed

cpu = import_module("fastvlp_kernels.linear_cross_entropy.cpu")
LENGTHS = [0, 3, 1, 0, 5, 2, 0]
VOCABULARY, WIDTH = 13, 4


def batch(seed=0):
    made = torch.Generator().manual_seed(seed)
    hidden = Packed.of(torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64, generator=made).requires_grad_(), LENGTHS)
    return hidden, torch.randint(0, VOCABULARY, (hidden.total,), generator=made)


def log_probability(head, state, word):
    logits = head.weight @ state + (0 if head.bias is None else head.bias)
    return (logits[word].exp() / logits.exp().sum()).log()


@pytest.mark.parametrize("few", [False, True], ids=["one piece", "pieces"])
@pytest.mark.parametrize("bias", [False, True])
def test_next_token_nll(bias, few, monkeypatch):
    if few:
        monkeypatch.setattr(cpu, "LEAST", 1)
    torch.manual_seed(0)
    head, (hidden, ids) = nn.Linear(WIDTH, VOCABULARY, bias).double(), batch()
    texts = hidden.replace(x=ids)
    rows = []
    for states, words in zip(hidden.segments(), texts.segments(), strict=True):
        rows.append(-sum((log_probability(head, states[i], words[i + 1]) for i in range(len(words) - 1)), states.sum() * 0))
    found, expected = next_token_nll(hidden, head, texts), torch.stack(rows)
    torch.testing.assert_close(found, expected)
    leaves, upstream = [hidden.x, *head.parameters()], torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
    if not bias:
        torch.testing.assert_close(next_token_nll(hidden, head.weight, texts), expected)
    alone = torch.cat([next_token_nll(hidden.take([row]), head, texts.take([row])) for row in range(len(LENGTHS))])
    torch.testing.assert_close(alone, expected)
    assert next_token_nll(hidden.take([]), head, texts.take([])).shape == (0,)


@pytest.mark.parametrize("few", [False, True], ids=["one piece", "pieces"])
def test_next_token_hits(few, monkeypatch):
    """Every other word is made the likeliest one after the word before it."""
    if few:
        monkeypatch.setattr("fastvlp.losses.captions.LOGITS", 3 * VOCABULARY)
    torch.manual_seed(0)
    head, (hidden, ids) = nn.Linear(WIDTH, VOCABULARY).double(), batch()
    ids[1::2] = (hidden.x @ head.weight.T + head.bias).argmax(1)[:-1:2]
    texts = hidden.replace(x=ids)
    expected = [sum(int((head.weight @ states[i] + head.bias).argmax()) == words[i + 1] for i in range(len(words) - 1))
                for states, words in zip(hidden.segments(), texts.segments(), strict=True)]
    assert next_token_hits(hidden, head, texts).tolist() == expected and 0 < sum(expected) < sum(LENGTHS) - len(LENGTHS)
    assert next_token_hits(hidden.take([]), head, texts.take([])).shape == (0,)


def test_word_nll_leaves_out_what_does_not_count():
    torch.manual_seed(0)
    head, (hidden, ids) = nn.Linear(WIDTH, VOCABULARY).double(), batch()
    hidden_words = torch.tensor([True, False, True, False, False, True, True, False, False, True, False])
    found = word_nll(hidden, head, ids.masked_fill(~hidden_words, -100))
    each = torch.stack([-log_probability(head, hidden.x[i], ids[i]) if hidden_words[i] else hidden.x[i].sum() * 0 for i in range(len(ids))])
    torch.testing.assert_close(found, torch.stack([part.sum() for part in each.split(LENGTHS)]))


def test_sixteen_bits_are_summed_in_float32_and_half_trained_heads_work():
    head, (hidden, ids) = nn.Linear(WIDTH, VOCABULARY), batch()
    states = hidden.replace(x=hidden.x.detach().float())
    exact = next_token_nll(hidden, head.double(), hidden.replace(x=ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = next_token_nll(states, head.float(), states.replace(x=ids))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert head.weight.grad.dtype == torch.float32


def test_only_a_piece_of_the_logits_is_held(monkeypatch):
    monkeypatch.setattr(cpu, "LEAST", 1)
    head, hidden = nn.Linear(WIDTH, VOCABULARY), Packed.of(torch.randn(1000, WIDTH, requires_grad=True), [400, 600])
    with forbid_large_tensors(1000 * VOCABULARY // 2):
        next_token_nll(hidden, head, hidden.replace(x=torch.randint(0, VOCABULARY, (1000,)))).sum().backward()


@pytest.mark.parametrize(("call", "message"), [
    (lambda h, ids: next_token_nll(h, nn.Linear(WIDTH, 5), Packed.of(ids, [11])), r"made for segments of \[11\] tokens"),
    (lambda h, ids: next_token_nll(h, nn.Linear(3, 5), h.replace(x=ids)), r"the tokens of hidden have shape \(11, 4\)"),
    (lambda h, ids: word_nll(h, nn.Linear(WIDTH, 5), ids[1:]), r"targets are torch.int64 \(10,\); they must be integers \(11,\)"),
    (lambda h, ids: word_nll(h, nn.Linear(WIDTH, 5), ids.float()), "they must be integers"),
    (lambda h, ids: word_nll(h, nn.Linear(WIDTH, 5), ids * 0 - 200), "a target is -200; allowed: 0 to 4, and -100"),
    (lambda h, ids: word_nll(h, nn.Linear(WIDTH, 5), ids * 0 + 5), "a target is 5; allowed: 0 to 4"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*batch())


def test_divergence_of_words_from_a_teacher():
    """Against F.kl_div of whole logits, in float64 and with gradients; the teacher gets none."""
    from fastvlp.losses import word_kl

    torch.manual_seed(0)
    lengths, heads = [3, 0, 5], (torch.nn.Linear(6, 11).double(), torch.nn.Linear(9, 11).double())
    s, t = (Packed.of(torch.randn(8, width, dtype=torch.float64, requires_grad=True), lengths) for width in (6, 9))
    leaves = [s.x, heads[0].weight, heads[0].bias]
    for temperature in (1.0, 2.0):
        found = word_kl(s, heads[0], t, heads[1], temperature)
        mine, theirs = ((head(x.x) / temperature).log_softmax(1) for head, x in zip(heads, (s, t), strict=True))
        each = temperature**2 * torch.nn.functional.kl_div(mine, theirs.detach(), reduction="none", log_target=True).sum(1)
        expected = torch.stack([part.sum() for part in each.split(lengths)])
        torch.testing.assert_close(found, expected)
        upstream = torch.randn(3, dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)
        assert not any(torch.autograd.grad(word_kl(s, heads[0], t, heads[1]).sum(), [t.x, *heads[1].parameters()], allow_unused=True))
    with pytest.raises(ValueError, match="as many words, and biases"):
        word_kl(s, heads[0], t, torch.nn.Linear(9, 12).double())
