"""blip2nb moves BLIP-2 checkpoints from LAVIS to Hugging Face transformers and proves that nothing was lost.

import blip2nb

run = blip2nb.convert("tiny-blip2-opt-2.7b")
report = blip2nb.verify(run)
"""

__version__ = "0.1.0"
__all__ = [
    "Report",
    "Run",
    "Tape",
    "break_it",
    "capture",
    "check",
    "convert",
    "diff",
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
    "variant",
    "verify",
    "which",
]

_HOMES = {
    "break_it": "api",
    "capture": "api",
    "check": "api",
    "check_proof": "api",
    "convert": "api",
    "diff": "api",
    "draw": "api",
    "explore": "api",
    "export_figures": "api",
    "faults": "api",
    "finish": "api",
    "plan": "api",
    "proven": "api",
    "push": "api",
    "revert": "api",
    "show": "api",
    "sweep": "api",
    "verify": "api",
    "check_notebook": "notebook",
    "show_source": "notebook",
    "Report": "report",
    "Run": "runs",
    "Tape": "trace.tape",
    "variant": "variants",
    "which": "models.files",
}


def __getattr__(name):
    # imported on first use, so that `import blip2nb` and `blip2nb --help` are instant
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module("blip2nb." + _HOMES[name]), name)
    raise AttributeError("module 'blip2nb' has no attribute {!r}".format(name))
