"""Signals are noted, and given back."""

import os
import signal

import numpy as np
import pytest

from herd_jax.reliability.pulse import Beat
from herd_jax.reliability.signals import Signals


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
