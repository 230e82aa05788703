"""What a model gains by items that it may have seen in training, and from which coverage on an item counts as seen (section 5.1.4)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

THRESHOLDS = tuple(tenths / 10 for tenths in range(1, 11))  # that T_D is chosen from
SHARES = ("0.2", "0.5", "0.8", "1")  # those that tables show
SIGNIFICANT = 1.96  # standard deviations
MIN_ITEMS = 10  # contaminated ones, and clean ones: with fewer there is no usable estimate


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a model gains at one threshold: the mean score of all items, that of the clean ones, the first less the second, and that in standard
    deviations. The paper does not say how it tests for significance; here the clean items are held against random subsets of their number.
    """

    score: float
    clean_score: float
    gain: float
    z: float

    @property
    def is_significant(self) -> bool:
        return self.z >= SIGNIFICANT


def estimated_gain(coverage_I: np.ndarray, score_I: np.ndarray, threshold: float) -> Gain | None:
    """Returns the gain where items of at least this coverage count as contaminated; None where they, or the others, are too few."""
    is_clean_I = coverage_I < threshold
    num_items, num_clean = len(coverage_I), int(is_clean_I.sum())
    if min(num_clean, num_items - num_clean) < MIN_ITEMS:
        return None
    score, clean_score = float(score_I.mean()), float(score_I[is_clean_I].mean())
    # The mean of a subset drawn without replacement.
    deviation = math.sqrt(score_I.var(ddof=1) / num_clean * (1 - num_clean / num_items))
    return Gain(score, clean_score, score - clean_score, (score - clean_score) / deviation if deviation else 0.0)


def choose_threshold(coverage: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> float | None:
    """Returns T_D: of `THRESHOLDS` the one with the largest significant gain of any of the models, of equals the highest; None where none is.

    A model has coverage and score of each item that it was scored on.
    """
    gains = [
        (gain.gain, threshold)
        for threshold in THRESHOLDS
        for coverage_I, score_I in zip(coverage, scores, strict=True)
        if (gain := estimated_gain(coverage_I, score_I, threshold)) and gain.is_significant
    ]
    return max(gains)[1] if gains else None


def estimate(coverage: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> dict:
    """Returns the estimate of a task, for JSON: `coverage` by item id, `scores` by model and item id (those of other ids do not count).

    "threshold": T_D or None; "contaminated": the share of the items at T_D or above; "gains": by model at T_D; "curves": by model, at each
    of the thresholds with a usable estimate.
    """
    all_I = np.array(list(coverage.values()))
    joined = {}
    for model, score in scores.items():
        ids = [each for each in coverage if each in score]
        joined[model] = (np.array([coverage[each] for each in ids]), np.array([score[each] for each in ids], np.float64))
    threshold = choose_threshold([pair[0] for pair in joined.values()], [pair[1] for pair in joined.values()])
    curves = {
        model: [{"threshold": each, **_fields(gain)} for each in THRESHOLDS if (gain := estimated_gain(*pair, each))]
        for model, pair in joined.items()
    }
    return {
        "num_items": len(all_I),
        "mean_coverage": float(all_I.mean()),
        "items_at": {f"{each:g}": int((all_I >= each).sum()) for each in THRESHOLDS},
        "threshold": threshold,
        "contaminated": None if threshold is None else float((all_I >= threshold).mean()),
        "num_scored": {model: len(pair[0]) for model, pair in joined.items()},
        "gains": {
            model: _fields(gain)
            for model, pair in joined.items()
            if threshold is not None and (gain := estimated_gain(*pair, threshold))
        },
        "curves": curves,
    }  # fmt: skip


def _fields(gain: Gain) -> dict:
    return dataclasses.asdict(gain) | {"is_significant": gain.is_significant}
