"""How many streams may run together so that each gets its tokens in time: a cap that follows the measured step time.

One up when a step that grows with its streams would still be in time, one down when it is not, every few steps. Knows no streams; the
engine tells it what a step took.
"""

from __future__ import annotations

__all__ = ["BatchCap"]

EVERY = 8  # steps between two changes: the last change must show first
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
        self._since_change = 0

    def step(self, seconds: float, num_decoding: int, *, someone_waits: bool) -> None:
        """After a step in which `num_decoding` streams got a token."""
        if self.objective_s is None or num_decoding == 0:
            return
        self._mean_s = seconds if self._mean_s is None else self._mean_s + SMOOTHING * (seconds - self._mean_s)
        self._since_change += 1
        if self._since_change < EVERY:
            return
        if self._mean_s > self.objective_s:
            self._set(max(self.least, min(self.value, num_decoding) - 1))
        elif someone_waits and num_decoding >= self.value and self._mean_s * (num_decoding + 1) / num_decoding <= self.objective_s:
            self._set(min(self.most, self.value + 1))

    def _set(self, value: int) -> None:
        self.value = value
        self._since_change = 0
