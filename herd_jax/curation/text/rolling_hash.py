"""64-bit hashes of many spans of one text at once, the same on every machine: a polynomial over the code points, then a mixer."""

import functools

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_OFFSET = np.uint64(0xD1B54A32D192ED03)  # added to each code point: none counts as nothing


class SpanHashes:
    """`of(starts, ends)` hashes the spans [start, end) of `points_T`: equal for equal spans, wherever they stand; not mixed. T < 2**20."""

    def __init__(self, points_T: np.ndarray):
        powers, _ = _powers(max(len(points_T), 1))
        self._sums = np.zeros(len(points_T) + 1, np.uint64)
        np.cumsum((points_T.astype(np.uint64) + _OFFSET) * powers[: len(points_T)], out=self._sums[1:])

    def of(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        _, inverses = _powers(len(self._sums))
        return (self._sums[ends] - self._sums[starts]) * inverses[starts]


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads each bit over all 64 (the finaliser of MurmurHash3): a bijection of uint64."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of each n consecutive ones, in their order: uint64 [max(0, len(hashes) - n + 1)]."""
    count = max(0, len(hashes) - n + 1)
    combined = hashes[:count].copy()
    for offset in range(1, n):
        combined *= np.uint64(_BASE)
        combined += hashes[offset : offset + count]
    return mix(combined)


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first powers of the base and of its inverse, `count` or more."""
    return _power_table(max(12, (count - 1).bit_length()))


@functools.lru_cache(maxsize=2)
def _power_table(log2_count: int) -> tuple[np.ndarray, np.ndarray]:
    assert log2_count <= 20, "longer texts are hashed piece by piece"
    bases = np.full((2, 1 << log2_count), _BASE, np.uint64)
    bases[1] = pow(_BASE, -1, 1 << 64)
    bases[:, 0] = 1
    return tuple(np.multiply.accumulate(bases, axis=1))
