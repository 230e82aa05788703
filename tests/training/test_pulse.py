"""Signals that are noted, and processes that stay slow. How several processes agree is tested with several processes."""

import os
import signal

import jax
import numpy as np
import pytest

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.training.pulse import Beat, Pulse, Signals, Stragglers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_may_come_twice(number):
    before = signal.getsignal(number)
    with Signals().noted() as signals:
        assert signals.seen == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert Beat(signals.seen, np.zeros((1, 3))).start_again
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_raises():
    with Signals().noted() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.seen and not Beat(signals.seen, np.zeros((1, 3))).start_again
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_beat_of_one_process():
    pulse = Pulse(make_mesh(MeshConfig(tp=2, dp=4), jax.devices()))
    beat = pulse.read(pulse.send(2, [0.5, 0.25, 1.0]))
    assert beat.stop == 2 and beat.start_again
    np.testing.assert_array_equal(beat.own_times_PT, [[0.5, 0.25, 1.0]])


def test_a_gather_over_devices():
    """As several processes do it: each device brings its process's row."""
    pulse = Pulse(make_mesh(MeshConfig(tp=2, cp=2, dp=2), jax.devices()))
    rows = np.arange(32, dtype=np.float32).reshape(8, 4)
    sent = pulse._gather(jax.make_array_from_callback(rows.shape, pulse._sharding, lambda index: rows[index]))
    pulse._rows = [0, 3, 6]
    beat = pulse.read(sent)
    assert beat.stop == 24
    np.testing.assert_array_equal(beat.own_times_PT, rows[[0, 3, 6], 1:])


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
