"""Continuous batching without a model: predicts waiting times and throughput from how long a step takes.

Reading order: costs (how long a step takes), arrivals (who asks when for how much), play (the scheduler's rules, played to the end).
"""

from r1ray.engine.simulate.arrivals import Trace, lengths, poisson, read_trace
from r1ray.engine.simulate.costs import Sample, StepCost, StepTime, fit
from r1ray.engine.simulate.play import Limits, Outcome, simulate

__all__ = ["Limits", "Outcome", "Sample", "StepCost", "StepTime", "Trace", "fit", "lengths", "poisson", "read_trace", "simulate"]
