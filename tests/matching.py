"""ToMe's matching in one segment, written as its definition."""

from torch import Tensor


def merged_rows(metric: Tensor, share: float) -> list[list[int]]:
    """The tokens of each row that merging floor(share * n) of n tokens leaves, the one that stayed first; rows in the order of those.

    Tokens of even place look for the most similar one of odd place; the most similar of all merge.
    """
    unit = metric / metric.norm(dim=1, keepdim=True)
    odd = range(1, len(metric), 2)
    best = {i: max(odd, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in range(0, len(metric), 2) if len(odd)}
    gone = sorted(best, key=lambda i: -float(unit[i] @ unit[best[i]]))[: int(share * len(metric))]
    return [[i, *(j for j in gone if best[j] == i)] for i in range(len(metric)) if i not in gone]
