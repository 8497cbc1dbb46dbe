"""Named sampling settings with their sources: what a sweep tries first, so that its result can be compared with common advice.

The seeds' values are claims to measure, never truths. `max_tokens` is the sweep's, not the profile's: a profile's own length
(128 for dialogue, 64 for edge devices) would be measured as quality lost to truncation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BASELINE", "PRESENT", "PROFILES", "Profile"]

PRESENT = "current"
"""Name of what a version answers with already: the policy that it has when a sweep begins."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Fields of Sampling that differ from the sweep's base settings."""

    name: str
    source: str
    fields: Mapping[str, float | int] = field(default_factory=dict)


BASELINE = Profile("r1-recommended", "DeepSeek-R1 README: temperature 0.5-0.7 (0.6), top_p 0.95", {"temperature": 0.6, "top_p": 0.95})

PROFILES: tuple[Profile, ...] = (
    BASELINE,
    Profile("greedy", "no sampling: the likeliest token", {"temperature": 0.0}),
    Profile("factual", "seed 000: low temperature 0.1-0.3 for factual answers", {"temperature": 0.2, "top_p": 1.0}),
    Profile("dialogue", "seed 003: real-time dialogue", {"temperature": 0.3, "top_p": 0.9, "frequency_penalty": 0.7}),
    Profile("report", "seed 003: long text", {"temperature": 0.5, "top_p": 1.0, "top_k": 40, "repetition_penalty": 1.2}),
    Profile("edge", "seed 003: low-resource devices", {"temperature": 0.1, "top_p": 1.0}),
    Profile("legal", "seed 003: dynamic parameters, legal", {"temperature": 0.2, "top_p": 0.95}),
    Profile("creative", "seed 003: dynamic parameters, creative", {"temperature": 0.8, "top_p": 0.7}),
    Profile("general", "seed 003: dynamic parameters, everything else", {"temperature": 0.5, "top_p": 0.85}),
    Profile("varied", "seed 002: against repetitive answers", {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}),
)
