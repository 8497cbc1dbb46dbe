"""The frame of every subcommand: a user's mistake is one line on stderr. Knows no subcommand."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from r1ray.errors import R1RayError

__all__ = ["command"]


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as `name` of `app`: an R1RayError is one line and exit code 1; a defect of ours keeps its traceback."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except R1RayError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                raise typer.Exit(1) from error

        app.command(name)(guarded)
        return function

    return register
