"""The `r1ray` command. Reading order: frame, commands (what there is), doctor (the checks), chat (the streaming client)."""

from r1ray.cli.commands import app

__all__ = ["app"]
