"""What the notebooks need of Jupyter itself: a check of the kernel, the parameters that papermill was given brought to
their declared types, and the kit's messages in the cells' outputs.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from blip2nb.errors import RequestError, did_you_mean

_INJECTED = "# Parameters\n"  # how papermill begins the cell it puts in


def check_notebook(kernel: str = "python3") -> None:
    """Refuse a wrong kernel, and bring what papermill injected to the types that the notebook declares.

    papermill accepts any name and any value in silence: `-p modelname …` would run the default model, and `-p overwrite
    false` is a text, which Python takes for true. Declared is what the cell before the injected one assigns. From here
    on the kit's messages show in the notebook.

    Args:
        kernel: "python3" for the kit's own environment, "lavis" for the one with LAVIS.

    Raises:
        RequestError: naming the kernel to choose; or a parameter that is not declared, and the nearest one there is; or
            one with a value that is not of its type.
    """
    _check_kernel(kernel)
    _show_messages()
    from IPython import get_ipython

    shell = get_ipython()
    values = shell.user_ns if shell is not None else {}
    cells = values.get("In", [])
    injected = [number for number, cell in enumerate(cells) if cell.startswith(_INJECTED)]
    for number in injected:
        tagged, given = cells[injected[0] - 1], assigned(cells[number])
        refuse_undeclared(assigned(tagged), given)
        declared = parameters(tagged)
        values.update({name: typed(declared[name], values[name]) for name in given})


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
        return list(parameters(code))
    except SyntaxError:
        return []


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook: its name, its type, and its default as the notebook writes it; None without one."""

    name: str
    kind: type
    expression: str | None

    @property
    def default(self) -> Any:
        """Raises ValueError where it is no plain value."""
        return ast.literal_eval(self.expression or "None")


def parameters(code: str) -> dict[str, Parameter]:
    """The parameters that a cell of plain assignments declares, in order. The type is what it is annotated with, else
    the default's. Raises SyntaxError where the cell is not plain Python."""
    found = {}
    for node in ast.parse(code).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        expression = ast.unparse(node.value) if node.value is not None else None
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found[target.id] = Parameter(target.id, _kind(node), expression)
    return found


def _kind(node: ast.Assign | ast.AnnAssign) -> type:
    """The type of a declaration. Of `str | None` and `list[str]` it is the first name: None is a parameter not given,
    and what is in a list is not looked at."""
    for part in ast.walk(node.annotation) if isinstance(node, ast.AnnAssign) else ():
        if isinstance(part, ast.Name) and part.id in _KINDS:
            return _KINDS[part.id]
    try:
        default = ast.literal_eval(node.value) if node.value is not None else None
    except ValueError:
        default = None
    return object if default is None else type(default)


def is_given(parameter: Parameter, value: Any) -> bool:
    """Whether a value says anything. None, null and an empty text do not; but an empty model's name says that a
    checkpoint or a run has it."""
    return value not in (None, "None", "null") and (value != "" or parameter.name == "model_name")


def typed(parameter: Parameter, value: Any) -> Any:
    """A value in its parameter's type, as papermill, a list of runs or a command line have it. The default, where it
    says nothing.

    Raises:
        RequestError: it is no value of that type.
    """
    if not is_given(parameter, value):
        return parameter.default
    convert, words, hint = _TYPES.get(parameter.kind, (_same, f"a {parameter.kind.__name__}", ""))
    try:
        return convert(value, parameter.kind)
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{parameter.name} should be {words}, found {value!r}.{hint}") from error


def _flag(value: Any, kind: type) -> bool:
    return _FLAGS[str(value).strip().lower()]


def _number(value: Any, kind: type) -> Any:
    """A text, or a number that loses nothing; True is none."""
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise ValueError
    return kind(value)


def _text(value: Any, kind: type) -> str:
    """A text, or a whole number's digits. How another value was spelled is lost: 1e5 came as 100000.0, yes as True."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError
    return str(value)


def _same(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError
    return value


_KINDS: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str, list, dict)}
_FLAGS = {word: number % 2 == 0 for number, word in enumerate(["true", "false", "yes", "no", "on", "off", "1", "0"])}
_TYPES: dict[type, tuple[Callable[[Any, type], Any], str, str]] = {
    bool: (_flag, "true or false", ""),
    int: (_number, "a whole number", ""),
    float: (_number, "a number", ""),
    str: (_text, "text", " Its spelling is lost: give it with papermill's -r instead of -p, or in quotes."),
}
"""Type → how a value is brought to it, what it is called, and what to do about one that is not of it."""


def refuse_undeclared(declared: list[str], given: list[str]) -> None:
    """Raises RequestError for the first name that is given and not declared."""
    for name in given:
        if name not in declared:
            hint = did_you_mean(name, declared)
            raise RequestError(f"This notebook has no parameter {name!r}.{hint} It has: {', '.join(declared)}.")
