"""How `make docs` binds the executed notebooks, and the pages beside them, as a book.

Sphinx's source directory is put together from `docs/_build/source/notebooks/`, where the notebooks were executed, and
from copies of what lies beside them in the checkout, in the same places, so that relative links in README and notebooks
lead on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parent.parent
BESIDE = (
    "[A-Z]*",
    "*.yml",
    "docs/*.png",
    "docs/architecture.md",
    "docs/schemas/*",
    "benchmarks/results/*",
    "outputs/README.md",
    "blip2nb/**/*.py",
    "tests/*.py",
)
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
UNEXECUTED = (
    "```{note}\nShown without its outputs: the kernel that it runs on is not installed. `make lavis` sets it up.\n```"
)

project = "blip2nb"
html_title = "blip2nb"
root_doc = "index"
include_patterns = [
    "index.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md", "notebooks/*.ipynb",
    "docs/architecture.md",
]  # fmt: skip

extensions = ["myst_nb"]
nb_execution_mode = "off"  # papermill has done it
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, which stand still here
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # it would come from the network
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub names them

html_math_renderer = "mathml"  # what browsers draw by themselves; MathJax would come from the network
html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar
    "footer_content_items": [],
}
html_static_path = ["_static"]
html_css_files = ["book.css"]


def setup(app: Sphinx) -> None:
    app.connect("config-inited", lay_out)
    app.connect("source-read", prepare)
    app.add_html_math_renderer("mathml", inline_renderers=(draw_formula, None), block_renderers=(draw_formula, None))


def lay_out(app: Sphinx, _config: Config) -> None:
    """Copy what notebooks and README may refer to into the source directory."""
    shutil.copy(ROOT / "docs" / "index.md", app.srcdir)
    for path in (path for pattern in BESIDE for path in ROOT.glob(pattern)):
        copy = Path(app.srcdir, path.relative_to(ROOT))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def prepare(_app: Sphinx, name: str, source: list[str]) -> None:
    """Leave out the widgets of a notebook, which need a kernel, but for the picture that a widget may carry. Below the
    title of a notebook that did not run, say so."""
    if name.startswith("notebooks/"):
        notebook = nbformat.reads(source[0], as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell in code:
            still = [output for output in cell.outputs if WIDGET not in output.get("data", {}) or PNG in output.data]
            for output in still:
                output.get("data", {}).pop(WIDGET, None)
            cell.outputs = still
        if not any(cell.execution_count for cell in code):
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(UNEXECUTED))
        source[0] = nbformat.writes(notebook)


def draw_formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML. Raises docutils' MathError for TeX that it does not know."""
    if isinstance(node, nodes.math_block):
        translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    else:
        translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode
