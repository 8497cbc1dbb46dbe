"""Compare models on held-out dialogues: a table here, a JSON report, MLflow runs, tags on the versions.

    ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/configs/evaluate.yaml \
        'models=[smollm2-135m-instruct, bank-assistant]' data.path=/data/test.parquet limit=140

The first model is what the others are compared with.
"""

from r1ray import entry
from r1ray.environment import prepare_environment
from r1ray.evaluate.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> None:
    prepare_environment()
    from r1ray.evaluate.job import evaluate_models

    evaluate_models(config)


if __name__ == "__main__":
    raise SystemExit(entry.run(EvaluateConfig, __doc__, evaluate))
