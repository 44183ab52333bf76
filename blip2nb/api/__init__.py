"""The verbs. The command line and the notebooks call these; what they need besides, they import by its own name."""

from blip2nb.api.converting import check, convert, plan, push, revert
from blip2nb.api.looking import diff, draw, explore, export_figures, finish, show
from blip2nb.api.several import break_it, faults, sweep
from blip2nb.api.verifying import capture, check_proof, proven, verify

__all__ = [
    "break_it",
    "capture",
    "check",
    "check_proof",
    "convert",
    "diff",
    "draw",
    "explore",
    "export_figures",
    "faults",
    "finish",
    "plan",
    "proven",
    "push",
    "revert",
    "show",
    "sweep",
    "verify",
]
