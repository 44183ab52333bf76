"""The package itself: what completion shows, and what editors read of it."""

import ast
import subprocess
import sys
from pathlib import Path

import blip2nb

SOURCE = Path(blip2nb.__file__)


def test_completion_shows_every_verb_and_imports_nothing_for_it():
    code = "import blip2nb, sys; names = dir(blip2nb); print(*names); sys.exit('blip2nb.api' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*blip2nb.__all__, *blip2nb._HOMES, "__version__"} <= set(done.stdout.split())


def test_editors_find_each_name_where_it_is_imported_from():
    """The imports for type checkers are the table of what is imported on first use, and the names are there."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("blip2nb.")
    ]
    typed = {alias.asname: node.module.removeprefix("blip2nb.") for node in imports for alias in node.names}
    assert typed == blip2nb._HOMES
    assert all(getattr(blip2nb, name) is not None for name in typed)
    assert SOURCE.with_name("py.typed").is_file()
