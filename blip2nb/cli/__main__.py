"""`python -m blip2nb.cli`."""

from blip2nb.cli import program

program()
