"""The `blip2nb` command. Everything heavy is imported inside the commands, so that --help is instant."""

from blip2nb.cli import files, machine, proofs  # noqa: F401 (they register their commands)
from blip2nb.cli.entry import app, main, program

__all__ = ["app", "main", "program"]
