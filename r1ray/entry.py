"""The frame of every job: parse, print the resolved config once, call one function, turn an error into an exit code.

    raise SystemExit(entry.run(FinetuneConfig, __doc__, finetune))

Knows no job. A user's mistake is one line on stderr; a defect of ours keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from r1ray.config import Config, dump_yaml, parse_arguments
from r1ray.errors import R1RayError

__all__ = ["run"]

C = TypeVar("C", bound=Config)


def run(schema: type[C], description: str | None, job: Callable[[C], object], argv: Sequence[str] | None = None) -> int:
    """Exit code of one job: 0 done, 1 an R1RayError (printed as `Class: message`), 130 interrupted."""
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
