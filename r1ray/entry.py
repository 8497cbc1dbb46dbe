"""The frame of every job: parse, print the resolved config once, call one function, turn an error into an exit code.

    raise SystemExit(entry.run(FinetuneConfig, __doc__, finetune))

Knows no job. A user's mistake is one line on stderr; a defect of ours keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from r1ray.config import Config, dump_yaml, parse_arguments
from r1ray.errors import R1RayError

__all__ = ["run", "stay_in_own_cluster"]

C = TypeVar("C", bound=Config)


def run(schema: type[C], description: str | None, job: Callable[[C], object], argv: Sequence[str] | None = None) -> int:
    """Exit code of one job: 0 done, 1 an R1RayError (printed as `Class: message`), 130 interrupted."""
    stay_in_own_cluster()
    try:
        config = parse_arguments(schema, description, argv)
        print(f"# resolved config\n{dump_yaml(config)}", flush=True)
        job(config)
    except R1RayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def stay_in_own_cluster(processes: Path = Path("/proc")) -> None:
    """Put the address of the cluster that runs this submitted job into RAY_ADDRESS.

    Ray 2.60 puts there the address of the latest `ray start` with the same --temp-dir (job_supervisor.py, `auto`). With two heads on a
    machine that may be another cluster, which has no copy of the job's working directory: every actor fails to fetch its package. The
    raylet that started us was told its cluster's address on its command line.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # Ray sets it for submitted jobs only
        return
    try:
        command = (processes / os.environ["RAY_RAYLET_PID"] / "cmdline").read_text(encoding="utf-8").split("\0")
    except (KeyError, OSError):
        return
    own = next((part.partition("=")[2] for part in command if part.startswith("--gcs-address=")), None)
    if own and own != os.environ.get("RAY_ADDRESS"):
        print(f"joining {own}, which runs this job: RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} is another cluster", flush=True)
        os.environ["RAY_ADDRESS"] = own
