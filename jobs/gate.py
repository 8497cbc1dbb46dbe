"""Judge a version, and promote it when every check passes; production is untouched when one fails.

    ray job submit --working-dir . -- python jobs/gate.py --config jobs/configs/gate.yaml model=bank-assistant

Exit code 1 and the failed checks by name when it is refused.
"""

from r1ray import entry
from r1ray.environment import prepare_environment
from r1ray.evaluate.gate.config import GateConfig


def gate(config: GateConfig) -> None:
    prepare_environment()
    from r1ray.evaluate.gate.job import gate

    gate(config)


if __name__ == "__main__":
    raise SystemExit(entry.run(GateConfig, __doc__, gate))
