"""How `make docs` binds the executed notebooks, and the pages beside them, as a book.

Sphinx's source directory is put together from `docs/_build/source/notebooks/`, where the notebooks were executed, and
from links to the rest of the checkout. There everything lies as it does in the checkout, so that relative links in README
and notebooks lead to the same places.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from sphinx.application import Sphinx
from sphinx.config import Config

ROOT = Path(__file__).parent.parent
UNEXECUTED = "```{note}\nShown without its outputs: the kernel that it runs on is not installed. `make lavis` sets it up.\n```"

project = "blip2nb"
html_title = "blip2nb"
root_doc = "index"
include_patterns = [
    "index.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md", "notebooks/*.ipynb",
]  # fmt: skip

extensions = ["myst_nb"]
nb_execution_mode = "off"  # papermill has done it
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would come from the network
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_heading_anchors = 4  # as GitHub names them

html_theme = "sphinx_book_theme"
html_theme_options = {"use_fullscreen_button": False, "show_navbar_depth": 2}
html_copy_source = True  # the executed notebooks, to download
html_show_copyright = False


def setup(app: Sphinx) -> None:
    app.connect("config-inited", lay_out)
    app.connect("source-read", say_unexecuted)


def lay_out(app: Sphinx, _config: Config) -> None:
    """Link what notebooks and README may refer to into the source directory."""
    visible = (path for path in ROOT.iterdir() if not path.name.startswith("."))
    links = {path.name: path for path in visible if path.name not in ("docs", "notebooks", "outputs")}
    links |= {"index.md": ROOT / "docs" / "index.md"}
    links |= {f"docs/{path.name}": path for path in (ROOT / "docs").glob("*.png")}
    for name, path in links.items():
        link = Path(app.srcdir, name)
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)


def say_unexecuted(_app: Sphinx, name: str, source: list[str]) -> None:
    """Say so below the title of a notebook that did not run."""
    if name.startswith("notebooks/"):
        notebook = nbformat.reads(source[0], as_version=4)
        if not any(cell.get("execution_count") for cell in notebook.cells):
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(UNEXECUTED))
            source[0] = nbformat.writes(notebook)
