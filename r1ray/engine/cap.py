"""How many streams may run together so that each gets its tokens in time: a cap that follows the measured time between two tokens.

One up when a round that grows with its streams would still be in time, one down when it is not, every few rounds. In a round every
running stream gets a token: one step, or as many as are under way at once in a pipeline. Knows no streams; the engine tells it what
they waited.
"""

from __future__ import annotations

__all__ = ["BatchCap"]

EVERY = 8  # rounds between two changes: the last change must show first
SMOOTHING = 0.25


class BatchCap:
    """Between `least` and `most`; without an objective it stays at `most`.

    Args:
        objective_s: Longest time between two tokens of a stream (TPOT), seconds.
    """

    def __init__(self, *, least: int, most: int, objective_s: float | None) -> None:
        self.least, self.most = min(least, most), most
        self.objective_s = objective_s
        self.value = most if objective_s is None else self.least
        self._mean_s: float | None = None
        self._rounds = 0.0

    def step(self, seconds: float, num_running: int, *, someone_waits: bool, share: float = 1.0) -> None:
        """After a step that gave this share of the decoding streams a token, for which they had waited `seconds` since their last.

        `num_running`: streams that share the time, those of other steps and those still at their prompt included.
        """
        if self.objective_s is None:
            return
        self._mean_s = seconds if self._mean_s is None else self._mean_s + SMOOTHING * (seconds - self._mean_s)
        self._rounds += share
        if self._rounds < EVERY:
            return
        if self._mean_s > self.objective_s:
            self._set(max(self.least, min(self.value, num_running) - 1))
        elif someone_waits and num_running >= self.value and self._mean_s * (num_running + 1) / num_running <= self.objective_s:
            self._set(min(self.most, self.value + 1))

    def _set(self, value: int) -> None:
        self.value = value
        self._rounds = 0.0
