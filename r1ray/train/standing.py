"""How a training stands on the dialogues held out of it: the best loss so far, and whether waiting for a better one is over.

Pure numbers, equal on all ranks and kept in every checkpoint, so that a resumed run goes on waiting where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["KEPT", "MARK", "Standing"]

MARK = "held_out_loss"
"""Its name in the curve, in MLflow and in a version's metrics."""

KEPT = "kept_score"
"""Ray Train keeps the checkpoints with the highest: each new best stands above all others, newer above older."""

_BEST = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`loss` is of the step that was measured last, `num_worse` counts measurements since the best one."""

    loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    num_worse: int = 0

    def after(self, step: int, loss: float) -> Standing:
        """With what was measured after `step`."""
        if self.best_loss is None or loss < self.best_loss:
            return Standing(loss=loss, best_loss=loss, best_step=step)
        return replace(self, loss=loss, num_worse=self.num_worse + 1)

    def is_over(self, patience: int | None) -> bool:
        return patience is not None and self.num_worse >= patience

    def kept_score(self, step: int) -> float:
        """Of a checkpoint of `step`."""
        return step + _BEST if step == self.best_step else step
