"""blip2nb moves BLIP-2 checkpoints from LAVIS to Hugging Face transformers and proves that nothing was lost.

import blip2nb

run = blip2nb.convert("tiny-blip2-opt-2.7b")
report = blip2nb.verify(run)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; see _HOMES
    from blip2nb._version import __version__ as __version__
    from blip2nb.api import break_it as break_it
    from blip2nb.api import capture as capture
    from blip2nb.api import check as check
    from blip2nb.api import check_proof as check_proof
    from blip2nb.api import convert as convert
    from blip2nb.api import diff as diff
    from blip2nb.api import draw as draw
    from blip2nb.api import explore as explore
    from blip2nb.api import export_figures as export_figures
    from blip2nb.api import faults as faults
    from blip2nb.api import finish as finish
    from blip2nb.api import plan as plan
    from blip2nb.api import proven as proven
    from blip2nb.api import push as push
    from blip2nb.api import revert as revert
    from blip2nb.api import show as show
    from blip2nb.api import sweep as sweep
    from blip2nb.api import verify as verify
    from blip2nb.conversion.files import which as which
    from blip2nb.handles import Report as Report
    from blip2nb.handles import Run as Run
    from blip2nb.notebook import check_notebook as check_notebook
    from blip2nb.notebook import show_source as show_source
    from blip2nb.trace.tape import Tape as Tape
    from blip2nb.variants import variant as variant

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
    "__version__": "_version",
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
    "Report": "handles",
    "Run": "handles",
    "Tape": "trace.tape",
    "variant": "variants",
    "which": "conversion.files",
}


def __getattr__(name):
    # imported on first use, so that `import blip2nb` and `blip2nb --help` are instant
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module("blip2nb." + _HOMES[name]), name)
    raise AttributeError("module 'blip2nb' has no attribute {!r}".format(name))


def __dir__():
    return sorted({*globals(), *_HOMES})
