"""Two kinds of texts that a classifier can tell apart, and cannot by length."""

import numpy as np

GOOD = "the river rises in mountains and flows through several towns before it reaches the sea near an old harbour".split()
BAD = "click here buy now cheap offer subscribe login menu cookie accept share follow next previous sale free deal".split()


def make_sets(num_texts=120, seed=0, share=0.7) -> dict[str, list[str]]:
    """Words mostly of one list, the rest of the other."""
    rng = np.random.default_rng(seed)

    def text(mine, other):
        return " ".join(rng.choice(mine if rng.random() < share else other) for _ in range(rng.integers(8, 40)))

    return {"yes": [text(GOOD, BAD) for _ in range(num_texts)], "no": [text(BAD, GOOD) for _ in range(num_texts)]}
