"""Search training settings with Optuna and ASHA; the best ones become a config file for jobs/finetune.py.

    ray job submit --working-dir . -- python jobs/sweep_hyperparameters.py --config jobs/configs/sweep_hyperparameters.yaml num_samples=12

Submitting the same sweep again resumes it.
"""

from r1ray import entry
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.tune.hyperparameters import sweep_hyperparameters

if __name__ == "__main__":
    raise SystemExit(entry.run(HyperparameterSweepConfig, __doc__, sweep_hyperparameters))
