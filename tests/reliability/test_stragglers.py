"""Processes that stay slow are named."""

import numpy as np

from herd_jax.reliability.pulse import Beat
from herd_jax.reliability.stragglers import Stragglers


def reports(stragglers, own_times_PT, step_seconds=1.0, num_steps=5):
    for _ in range(num_steps):
        stragglers.add(Beat(0, np.array(own_times_PT)))
    return stragglers.report(step_seconds)


def test_processes_that_stay_slow_are_ranked():
    stragglers = Stragglers(["a", "b", "c", "d", "e"])
    slow = [[0.01, 0.01, 0.0]] * 3 + [[0.3, 0.01, 0.0], [0.01, 0.02, 0.6]]
    assert reports(stragglers, slow) == reports(stragglers, slow) == []  # twice may be chance
    first, second = reports(stragglers, slow)
    assert first == (
        "process 4 on e stays slow: 0.610 s a step more than the median process, most of it checkpoint (0.600 s, median 0.000 s)"
    )
    assert second.startswith("process 3 on d stays slow: 0.290 s") and "most of it input (0.300 s, median 0.010 s)" in second
    assert [len(reports(stragglers, slow)) for _ in range(3)] == [0, 0, 2]  # not at every interval


def test_who_is_slow_now_and_then_or_a_little_is_not_reported():
    stragglers = Stragglers(["a", "b", "c"])
    even, slow = [[0.01, 0.01, 0.0]] * 3, [[0.01, 0.01, 0.0], [0.5, 0.01, 0.0], [0.01, 0.01, 0.0]]
    assert not any(reports(stragglers, times) for times in (slow, slow, even, slow, slow, even))
    assert not any(reports(stragglers, slow, step_seconds=10.0) for _ in range(6))
    assert not any(reports(Stragglers(["alone"]), [[9.0, 9.0, 9.0]]) for _ in range(6))
