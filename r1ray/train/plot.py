"""The learning curve for people: one line in the job log, one picture in MLflow. Reads steps, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1ray.train.progress import Step
from r1ray.train.standing import MARK

__all__ = ["draw", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`values` as at most `width` bars, each the mean of its share: `█▅▃▂▁▁  2.084 -> 0.171`."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(_BARS[round((mean - low) * scale)] for mean in means)
    return f"{bars}  {means[0]:.3f} -> {means[-1]:.3f}"


def draw(steps: Sequence[Step], path: Path) -> Path:
    """Loss per trained token, on what was held out too, and learning rate over tokens seen, as a PNG at `path`."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    seen, total = [], 0
    for step in steps:
        total += step.tokens
        seen.append(total)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    loss = figure.subplots()
    loss.plot(seen, [step.loss for step in steps], color="tab:blue", linewidth=1.2)
    measured = [(at, step.marks[MARK]) for at, step in zip(seen, steps, strict=True) if MARK in step.marks]
    if measured:
        loss.plot(*zip(*measured, strict=True), color="tab:orange", linewidth=1.2, marker="o", markersize=3)
        loss.legend(["trained on", "held out"], loc="upper right")
    loss.set(xlabel="tokens seen", ylabel="loss (nats per trained token)", title=path.parent.name, ylim=(0, None))
    rate = loss.twinx()
    rate.plot(seen, [step.learning_rate for step in steps], color="tab:gray", linewidth=0.8, linestyle="--")
    rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
    figure.savefig(path)
    return path
