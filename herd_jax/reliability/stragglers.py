"""Processes that stay slow, found by the times that each says it spent on its own work."""

import numpy as np

from herd_jax.reliability.pulse import OWN_TIMES, Beat


class Stragglers:
    """Ranks processes by their own times and names those that stay slow: slower than the median by `_SHARE` of a step in `_TIMES` logged
    intervals in a row."""

    _SHARE, _TIMES = 0.1, 3

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._sum_PT = np.zeros((len(hosts), len(OWN_TIMES)))
        self._num_beats = 0
        self._in_a_row = np.zeros(len(hosts), int)

    def add(self, beat: Beat) -> None:
        self._sum_PT += beat.own_times_PT
        self._num_beats += 1

    def report(self, step_seconds: float) -> list[str]:
        """Ends an interval of steps that took `step_seconds` each; returns a line for each process that stays slow, the slowest first."""
        mean_PT = self._sum_PT / max(self._num_beats, 1)
        median_T = np.median(mean_PT, axis=0)
        late_P = mean_PT.sum(axis=1) - np.median(mean_PT.sum(axis=1))
        self._in_a_row = np.where(late_P > self._SHARE * step_seconds, self._in_a_row + 1, 0)
        self._sum_PT[:], self._num_beats = 0, 0
        lines = []
        for process in np.argsort(-late_P, kind="stable"):
            if self._in_a_row[process] and self._in_a_row[process] % self._TIMES == 0:
                worst = int(np.argmax(mean_PT[process] - median_T))
                lines.append(
                    f"process {process} on {self._hosts[process]} stays slow: {late_P[process]:.3f} s a step more than the median process, "
                    f"most of it {OWN_TIMES[worst]} ({mean_PT[process, worst]:.3f} s, median {median_T[worst]:.3f} s)"
                )
        return lines
