"""What is committed is clean: notebooks without outputs, links that lead somewhere, words spelt right, a whole book."""

import ast
import base64
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from PIL import Image

from blip2nb.families.captioners.inputs import png

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "outputs" / "README.md"]
PROSE += [ROOT / "docs" / "index.md", ROOT / "docs" / "architecture.md", *NOTEBOOKS]
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


# --- notebooks


ONE_PIXEL = base64.b64encode(png(Image.new("RGB", (1, 1)))).decode()


def run_in_place(path):
    """Write what a run and its editors leave in a notebook, without the minutes that runs take."""
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "stands still"}
        cell.outputs = [
            nbformat.v4.new_output("stream", text="a run said this"),
            nbformat.v4.new_output("display_data", bar),
            nbformat.v4.new_output("display_data", {**bar, "image/png": ONE_PIXEL}),
        ]
        cell.metadata.execution = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
        cell.metadata.papermill = {"status": "completed"}
        cell.metadata.scrolled = True
    injected = nbformat.v4.new_code_cell("# Parameters\nmodel_name = 'x'", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(notebook.cells.index(code[0]) + 1, injected)
    notebook.metadata.language_info |= {"version": "3.11.7", "mimetype": "text/x-python", "file_extension": ".py"}
    notebook.metadata.papermill = {"duration": 1.0}
    notebook.metadata.widgets = {
        "application/vnd.jupyter.widget-state+json": {"state": {"a": {}}, "version_major": 2, "version_minor": 0}
    }
    nbformat.write(notebook, path)


def git(*arguments, cwd):
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository whose filter is set up as `make test` does it, with a notebook that was run."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "convert.ipynb", tmp_path / "notebooks")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    git("init", cwd=tmp_path)
    subprocess.run(["make", "--silent", "--file", ROOT / "Makefile", "filter"], cwd=tmp_path, check=True)
    run_in_place(tmp_path / "notebooks" / "convert.ipynb")
    return tmp_path


@needs_git
def test_git_takes_a_notebook_as_it_was_before_it_ran(clone):
    """Outputs, counts, widgets and what was injected are gone; ids, tags and the kernel are kept."""
    git("add", "notebooks", cwd=clone)
    assert (
        git("show", ":notebooks/convert.ipynb", cwd=clone).stdout == (ROOT / "notebooks" / "convert.ipynb").read_text()
    )


@needs_git
def test_without_the_environment_git_says_so_and_works(clone):
    (clone / ".venv").unlink()
    assert ".venv/bin/python" in git("add", "notebooks", cwd=clone).stderr
    as_it_was = (clone / "notebooks" / "convert.ipynb").read_text()
    assert git("show", ":notebooks/convert.ipynb", cwd=clone).stdout == as_it_was


@needs_git
def test_every_notebook_is_as_the_filter_leaves_it(clone):
    command = shlex.split(git("config", "filter.nbstripout.clean", cwd=clone).stdout)
    done = subprocess.run([*command, "--verify", *NOTEBOOKS], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}`make strip` mends it."
    for path in NOTEBOOKS:
        as_written = nbformat.writes(nbformat.read(path, nbformat.NO_CONVERT)) + "\n"
        assert path.read_text() == as_written, f"{path.name}: nbformat would lay it out differently. `make strip` does."


# --- links


class Html(HTMLParser):
    """What HTML leads to: (tag, address) of everything it links or loads. And the anchors in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [(tag, values[name]) for name in ("href", "src", "data") if values.get(name)]
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}


def rendered(path):
    """A page's Markdown as HTML, with the anchors that GitHub gives headings."""
    markdown = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, 4).cells
        return "\n".join(markdown.render(cell.source) for cell in cells if cell.cell_type == "markdown")
    return markdown.render(path.read_text())


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for _, link in Html(rendered(path)).links:
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), link
            continue
        target = (path.parent / unquote(address.path)).resolve() if address.path else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if address.fragment:
            assert address.fragment in Html(rendered(target)).anchors, link


# --- words


def test_words_are_spelt_right():
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- the book


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The book as `make docs` binds it, of one notebook that was run and others that were not. Warnings are errors."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "notebooks", folder / "source" / "notebooks", ignore=shutil.ignore_patterns(".*"))
    run_in_place(folder / "source" / "notebooks" / "convert.ipynb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs"]
    done = subprocess.run(
        [*command, folder / "source", folder / "html"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_the_books_contents_name_every_notebook_once_convert_first_and_lavis_last(book):
    contents = (book / "index.html").read_text().split('class="bd-links')[1].split("</nav>")[0]
    named = [Path(link).stem for _, link in Html(contents).links if link.startswith("notebooks/")]
    assert sorted(named) == [path.stem for path in NOTEBOOKS]
    assert (named[0], named[-1]) == ("convert", "lavis")
    steps = [name for name in named if name[0].isdigit()]
    assert steps == sorted(steps)


def test_the_book_shows_what_a_run_printed_and_of_widgets_the_picture_alone(book):
    page = (book / "notebooks" / "convert.html").read_text()
    assert "a run said this" in page
    assert "stands still" not in page
    assert "widget-view" not in page
    assert page.count("<img") == page.count("a run said this")
    assert "Shown without its outputs" not in page


def test_a_notebook_that_was_not_run_says_so(book):
    assert "Shown without its outputs" in (book / "notebooks" / "lavis.html").read_text()


def test_the_book_loads_nothing_from_the_network(book):
    loaded = [link for page in book.rglob("*.html") for tag, link in Html(page.read_text()).links if tag != "a"]
    assert len(loaded) > 100
    assert not [link for link in loaded if urlsplit(link).netloc]
    styles = "".join(path.read_text() for path in book.rglob("*.css"))
    assert "url(" in styles
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", styles)


# --- code


LIBRARY = sorted((ROOT / "blip2nb").rglob("*.py"))


@pytest.mark.parametrize("path", [*LIBRARY, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=lambda path: path.stem)
def test_text_is_read_and_written_as_utf_8_and_not_as_the_locale_has_it(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [
        call.lineno for call in calls if _opens_text(call) and not any(one.arg == "encoding" for one in call.keywords)
    ]


def _opens_text(call):
    name = ast.unparse(call.func)
    if name in ("open", "os.fdopen"):
        return not any("b" in str(one.value) for one in call.args[1:2] if isinstance(one, ast.Constant))
    return name.endswith((".read_text", ".write_text"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_errors_name_parameters_and_not_options_of_the_command_line(path):
    """Who calls from Python or a notebook has no options. A whole command may be named, and `cli` speaks of its own."""
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "RequestError" and "cli" not in path.parts
    ]
    words = [one.value for call in calls for one in ast.walk(call) if isinstance(one, ast.Constant)]
    assert not [word for word in words if re.search(r"--[a-z]", str(word)) and "blip2nb convert" not in str(word)]


HOUSE = ("blip2nb", "benchmarks", "record_lavis")  # the last is what the recorder is called where it travels


@pytest.mark.parametrize("path", [*LIBRARY, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=lambda path: path.stem)
def test_no_module_uses_what_another_calls_private(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and _of_the_house(node)]
    names = [alias for node in imports for alias in node.names]
    taken = [alias.name for alias in names if _private(alias.name)]
    known = {alias.asname or alias.name for alias in names}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    taken += [ast.unparse(node) for node in attributes if _private(node.attr) and ast.unparse(node.value) in known]
    assert taken == []


def _of_the_house(node):
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return any(name.partition(".")[0] in HOUSE for name in names)


def _private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))
