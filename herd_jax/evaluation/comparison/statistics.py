"""Paired tests of two models on the same items, and the correction for several tasks."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

EXACT_ITEMS = 14  # of items with a difference, at most this many have all their signs flipped in every way
FLIPS = 2**EXACT_ITEMS  # drawn at random otherwise


def paired(a_I: np.ndarray, b_I: np.ndarray) -> dict:
    """Returns the scores of two models on the same items, and whether the second differs.

    "difference": mean of b - a, with "half_interval" of 95 %: 1.96 standard errors of the paired differences. "p", two-sided: exact McNemar
    where all scores are 0 or 1, else by flips of the signs of the differences.
    """
    difference_I = b_I - a_I
    num_items = len(difference_I)
    is_binary = bool(np.isin(a_I, (0, 1)).all() and np.isin(b_I, (0, 1)).all())
    wins, losses = int((difference_I > 0).sum()), int((difference_I < 0).sum())
    return {
        "num_items": num_items,
        "scores": [float(a_I.mean()), float(b_I.mean())],
        "difference": float(difference_I.mean()),
        "half_interval": 1.96 * float(difference_I.std(ddof=1)) / math.sqrt(num_items) if num_items > 1 else 0.0,
        "wins": wins,
        "losses": losses,
        "test": "mcnemar" if is_binary else "sign flips",
        "p": mcnemar(wins, losses) if is_binary else sign_flips(difference_I),
    }


def mcnemar(wins: int, losses: int) -> float:
    """Returns the two-sided exact p-value: under no difference each item on which the two disagree is a toss of a fair coin."""
    num = wins + losses
    log_ways = np.array([math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) for k in range(min(wins, losses) + 1)])
    return min(1.0, 2 * float(np.exp(log_ways - num * math.log(2)).sum()))


def sign_flips(difference_I: np.ndarray) -> float:
    """Returns the two-sided p-value of the mean difference: the share of sign patterns whose mean is as far from 0; all of them for few items,
    else `FLIPS` random ones and the one observed."""
    difference_I = difference_I[difference_I != 0]
    if not len(difference_I):
        return 1.0
    observed = abs(difference_I.sum()) * (1 - 1e-12)  # sums in another order round differently
    if len(difference_I) <= EXACT_ITEMS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(difference_I))))
        return float((np.abs(signs @ difference_I) >= observed).mean())
    rng = np.random.default_rng(0)
    rows = max(1, 2**22 // len(difference_I))  # in memory at a time
    as_far = sum(
        int((np.abs(rng.choice((-1.0, 1.0), (min(rows, FLIPS - done), len(difference_I))) @ difference_I) >= observed).sum())
        for done in range(0, FLIPS, rows)
    )
    return (1 + as_far) / (1 + FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values corrected so that the chance of any false finding among them stays that of one (Holm's step-down)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected
