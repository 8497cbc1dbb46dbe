"""Measure sampling settings on an evaluation set, take the best from the Pareto front, attach it to the version.

    ray job submit --working-dir . -- python jobs/sweep_sampling.py --config jobs/configs/sweep_sampling.yaml model=bank-assistant

Submitting the same sweep again resumes it.
"""

from r1ray import entry
from r1ray.tune.config import SamplingSweepConfig
from r1ray.tune.sampling import sweep_sampling

if __name__ == "__main__":
    raise SystemExit(entry.run(SamplingSweepConfig, __doc__, sweep_sampling))
