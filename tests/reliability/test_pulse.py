"""What the processes tell each other at a step. How several processes agree is tested with several processes."""

import jax
import numpy as np

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.reliability.pulse import Pulse


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
