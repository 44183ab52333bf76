"""What the notebooks need of Jupyter itself: a check of the kernel and of the parameters papermill was given, and the
kit's messages in the cells' outputs.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from typing import Any

from blip2nb.errors import RequestError

_INJECTED = "# Parameters\n"  # how papermill begins the cell it puts in


def check_notebook(kernel: str = "python3") -> None:
    """Refuse a wrong kernel, and a parameter that papermill injected and the notebook does not declare.

    papermill accepts any name in silence, so that `-p modelname …` would run the default model. Declared is what the
    cell before the injected one assigns. From here on the kit's messages show in the notebook.

    Args:
        kernel: "python3" for the kit's own environment, "lavis" for the one with LAVIS.

    Raises:
        RequestError: naming the kernel to choose, or the parameter and the nearest one there is.
    """
    _check_kernel(kernel)
    _show_messages()
    from IPython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell is not None else []
    injected = [number for number, cell in enumerate(cells) if cell.startswith(_INJECTED)]
    for number in injected:
        refuse_undeclared(assigned(cells[injected[0] - 1]), assigned(cells[number]))


def _check_kernel(kernel: str) -> None:
    old = int(importlib.metadata.version("transformers").split(".")[0]) < 5  # what LAVIS needs is far older
    if (kernel == "lavis" and importlib.util.find_spec("lavis") is None) or (kernel != "lavis" and old):
        raise RequestError(
            f"This notebook needs the kernel {kernel!r}, which {sys.executable} is not. "
            "Choose Kernel > Change Kernel, or give papermill -k."
        )


def _show_messages() -> None:
    """Show what the kit says (what it keeps, what it goes on with) under the cell, unless logging is set up already."""
    log = logging.getLogger("blip2nb")
    if not log.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def show_source(thing: Any) -> Any:
    """The source of a function, class or module of the package, for a notebook to show: the step as it is done."""
    from IPython.display import Code

    return Code(inspect.getsource(thing), language="python")


def assigned(code: str) -> list[str]:
    """The names that a cell of plain assignments gives values to; none where it is not plain Python."""
    try:
        return [name for name, _ in assignments(code)]
    except SyntaxError:
        return []


def assignments(code: str) -> list[tuple[str, ast.expr | None]]:
    """The names that a cell of plain assignments declares, in order, each with the expression that it is given; None
    where it is only annotated. Raises SyntaxError where the cell is not plain Python."""
    found: list[tuple[str, ast.expr | None]] = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [(target.id, node.value) for target in targets if isinstance(target, ast.Name)]
    return found


def refuse_undeclared(declared: list[str], given: list[str]) -> None:
    """Raises RequestError for the first name that is given and not declared."""
    for name in given:
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"This notebook has no parameter {name!r}.{hint} It has: {', '.join(declared)}.")
