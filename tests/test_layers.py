"""The layers of docs/architecture.md hold: nothing imports upward or in a circle, be it in a function or for types."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "blip2nb"
LAZY = {"", "trace"}  # packages whose __init__ names what is imported when it is first used


def layers() -> dict[str, int]:
    """Package or module at the top -> its line in the table."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(_version .*?)```", page, re.S)
    lines = [line.split("  ")[0].split() for line in block.splitlines()]
    return {name: number for number, names in enumerate(lines) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name below blip2nb -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of the kit that a file imports, wherever in it, and the line. By `-m` and by import_module too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("blip2nb."):
                    yield alias.name.removeprefix("blip2nb."), node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "blip2nb":
            base = (node.module or "").removeprefix("blip2nb").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".strip(".")
                yield (whole if whole in MODULES else base), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.removeprefix("blip2nb.")
            if node.value.startswith("blip2nb.") and name in MODULES and " " not in node.value:
                yield name, node.lineno


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in LAZY])
def test_nothing_imports_upward(name: str):
    of, own = layers(), top(name)
    for other, line in imported(MODULES[name]):
        assert other in MODULES, f"line {line}: there is no {other}"
        assert of[top(other)] < of[own] or top(other) == own or of[top(other)] == of[own] == 0, f"line {line}: {other}"


def test_every_package_has_its_line_and_every_line_a_package():
    assert set(layers()) == {top(name) for name in MODULES if name}


def test_nothing_imports_in_a_circle():
    graph = {
        name: {other for other, _ in imported(path) if other != name}
        for name, path in MODULES.items()
        if name not in LAZY
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_only_a_lazy_verb_imports_the_catalogue():
    users = {name for name, path in MODULES.items() if any(top(other) == "catalogue" for other, _ in imported(path))}
    assert {name for name in users if top(name) != "catalogue"} == {"api.several"}


def test_the_page_names_files_that_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {word for word in re.findall(r"`([\w/]+\.(?:py|j2))`", page) if "/" in word}
    missing = [one for one in named if not (PACKAGE / one).exists() and not (ROOT / one).exists()]
    assert not missing
