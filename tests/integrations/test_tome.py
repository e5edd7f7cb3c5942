"""``fastvlp.integrations.tome`` against ToMe's definition, written as loops."""

import pytest
import torch

from fastvlp.integrations.tome import bipartite_soft_matching, merge_source, merge_wavg, parse_r


def rows(metric, r, class_token, distill_token):
    """For one image, the tokens of each row of the result, in ToMe's order."""
    n = len(metric)
    unit = metric / metric.norm(dim=1, keepdim=True)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    r = min(r, (n - class_token - distill_token) // 2)
    if r <= 0:
        return [[i] for i in range(n)]
    best = {i: max(odd[int(distill_token) :], key=lambda j, i=i: float(unit[i] @ unit[j])) for i in even[int(class_token) :]}
    ranked = sorted(best, key=lambda i: -float(unit[i] @ unit[best[i]]))
    gone = ranked[:r]
    stay = [i for i in even if i not in gone] if class_token else ranked[r:]
    order = [0, 1, *stay[1:], *odd[1:]] if distill_token else [*stay, *odd]
    return [[i, *(j for j in gone if best[j] == i)] for i in order]


@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("n", "r"), [(8, 2), (9, 3), (9, 100), (10, 100), (7, 0), (2, 5), (1, 1)])
def test_bipartite_soft_matching(n, r, class_token, distill_token):
    if n <= class_token + distill_token:
        return
    generator = torch.Generator().manual_seed(n * 7 + r)
    metric, x = torch.randn(3, n, 6, generator=generator), torch.randn(3, n, 4, dtype=torch.float64, generator=generator)
    size = torch.randint(1, 5, (3, n, 1), generator=generator).double()
    merge, unmerge = bipartite_soft_matching(metric, r, class_token, distill_token)
    expected = [rows(image.double(), r, class_token, distill_token) for image in metric]
    how = {"mean": lambda tokens: tokens.mean(0), "sum": lambda tokens: tokens.sum(0), "amax": lambda tokens: tokens.amax(0)}
    for mode, combine in how.items():
        wanted = torch.stack([torch.stack([combine(image[row]) for row in of]) for image, of in zip(x, expected, strict=True)])
        torch.testing.assert_close(merge(x, mode=mode), wanted)
    merged, sizes = merge_wavg(merge, x, size)
    for image, of in enumerate(expected):
        for place, row in enumerate(of):
            weight = size[image, row]
            torch.testing.assert_close(merged[image, place], (x[image, row] * weight).sum(0) / weight.sum())
            assert sizes[image, place].item() == weight.sum()
    restored = unmerge(merged)
    for image, of in enumerate(expected):
        for place, row in enumerate(of):
            assert torch.equal(restored[image, row], merged[image, place].expand(len(row), -1))
    source = merge_source(merge, x)
    assert source.shape == (3, len(expected[0]), n)
    for image, of in enumerate(expected):
        assert [part.nonzero()[:, 0].tolist() for part in source[image]] == [sorted(row) for row in of]


def test_two_mergings_of_a_source_and_sizes():
    x = torch.randn(2, 12, 5)
    first, _ = bipartite_soft_matching(x, 4)
    once, size = merge_wavg(first, x)
    source = merge_source(first, x)
    second, _ = bipartite_soft_matching(once, 3)
    twice, size = merge_wavg(second, once, size)
    source = merge_source(second, once, source)
    torch.testing.assert_close(source.sum(2, keepdim=True), size.to(source.dtype))
    torch.testing.assert_close(twice, source @ x / size)


def test_merge_wavg_of_somebody_elses_merge():
    def merge(x, mode):
        assert mode == "sum"
        return x[:, ::2] + x[:, 1::2]

    x, size = torch.randn(2, 6, 3), torch.randint(1, 4, (2, 6, 1)).float()
    merged, sizes = merge_wavg(merge, x, size)
    torch.testing.assert_close(merged, merge(x * size, "sum") / merge(size, "sum"))
    assert torch.equal(sizes, merge(size, "sum"))
    torch.testing.assert_close(merge_wavg(merge, x)[0], merge(x, "sum") / 2)


def test_gradients_and_compilation():
    metric = torch.randn(2, 9, 5)

    def run(x):
        merge, unmerge = bipartite_soft_matching(metric, 3, class_token=True)
        merged, size = merge_wavg(merge, x)
        return (unmerge(merged) * size.sum()).tanh()

    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x))


def test_parse_r():
    assert parse_r(3, 8) == [8, 8, 8]
    assert parse_r(4, [5, 2]) == [5, 2, 0, 0] and parse_r(2, [1, 2]) == [1, 2]
    assert parse_r(5, (8, 1.0)) == [0, 4, 8, 12, 16]
    assert parse_r(5, (8, -1.0)) == [16, 12, 8, 4, 0]
    assert parse_r(4, (10, 0.0)) == [10] * 4 and parse_r(1, (6, 0.5)) == [3]
    assert parse_r(4, (6, 0.5)) == [3, 5, 7, 9]


def test_a_batch_without_images():
    merge, unmerge = bipartite_soft_matching(torch.randn(0, 9, 4), 2)
    assert merge(torch.randn(0, 9, 5)).shape == (0, 7, 5) and unmerge(torch.randn(0, 7, 5)).shape == (0, 9, 5)


def test_refusals():
    merge, unmerge = bipartite_soft_matching(torch.randn(2, 9, 4), 2)
    for other in ((3, 6, 4), (1, 18, 4)):
        with pytest.raises(ValueError, match=r"it must be \[2, 9, ...\]"):
            merge(torch.randn(other))
    with pytest.raises(ValueError, match=r"it must be \[2, 7, ...\]"):
        unmerge(torch.randn(1, 14, 4))
    with pytest.raises(TypeError, match="r is 0.5; it must be an int"):
        bipartite_soft_matching(torch.randn(2, 9, 4), 0.5)
    with pytest.raises(ValueError, match=r"must be \[B, N, d\]"):
        bipartite_soft_matching(torch.randn(5, 3), 1)
    with pytest.raises(ValueError, match="needs class_token=True"):
        bipartite_soft_matching(torch.randn(1, 5, 3), 1, distill_token=True)
