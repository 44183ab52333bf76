"""What every notebook is: its form, its parameters, and what is refused before anything runs."""

import json
import statistics
import subprocess
import sys

import nbformat
import pytest
from click.testing import CliRunner
from notebook_runs import NEAR, NOTEBOOKS, OWN_KERNEL, STEPS, injected, papermill, parameters
from papermill.cli import papermill as papermill_command

from blip2nb.notebook import assigned, refuse_undeclared


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_form_of_all(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert code.index(tagged[0]) == 0
    lines = tagged[0].source.strip().splitlines()
    assert all(": " in line and " = " in line and "  # " in line for line in lines), "annotated scalars, a comment each"
    assert notebook.metadata.kernelspec.name == ("lavis" if path.stem == "lavis" else "python3")
    assert notebook.cells[0].source.startswith("# ")
    assert sum(cell.source.startswith("# ") for cell in prose) == 1
    assert sum(cell.source.startswith("## ") for cell in prose) >= 3
    assert code[-1].source.startswith("assert ")
    assert "check_notebook" in code[1].source
    assert not any("check_notebook" in cell.source for cell in code[2:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_an_essay_with_short_cells_of_code(path):
    cells = nbformat.read(path, 4).cells
    code = sorted(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code")
    assert sum(cell.cell_type == "markdown" for cell in cells) > len(code)
    assert statistics.median(code) <= 7
    assert statistics.quantiles(code, n=10)[-1] <= 20


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_shows_the_packages_own_source_and_ends_with_two_exercises(path):
    cells = nbformat.read(path, 4).cells
    assert any("show_source(" in cell.source for cell in cells if cell.cell_type == "code")
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    exercises = next(number for number, text in enumerate(prose) if "xercises" in text)
    assert "\n".join(prose[exercises:]).count("<summary>") == 2
    assert sum("assert " in cell.source for cell in cells if cell.cell_type == "code") >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_lists_each_parameter_with_its_comment(path):
    shown = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)])
    assert shown.exit_code == 0
    for name in parameters(path):
        assert f"  {name}: " in shown.output
    assert ("which model" in shown.output) == ("model_name" in parameters(path))


# Runs the first three code cells of each notebook as a kernel does, the second of them papermill's: what each raised
FIRST_CELLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

raised = {}
for name, cells in json.load(sys.stdin).items():
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(history_load_length=0)
    with capture_output():
        done = [shell.run_cell(cell, store_history=True) for cell in cells]
    raised[name] = [repr(one.error_in_exec) for one in done]
print(json.dumps(raised))
"""


@pytest.fixture(scope="module")
def misspelt(tmp_path_factory):
    """Notebook -> what each of its first code cells raises where a parameter is misspelt; and where they ran."""
    folder = tmp_path_factory.mktemp("misspelt")
    asked = {}
    for path in OWN_KERNEL:
        cells = injected(path, outputdir=str(folder / "x")).cells
        asked[path.stem] = [cell.source for cell in cells if cell.cell_type == "code"][:3]
    command = [sys.executable, "-c", FIRST_CELLS]
    done = subprocess.run(command, input=json.dumps(asked), cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), folder


@pytest.mark.parametrize("path", OWN_KERNEL, ids=lambda path: path.stem)
def test_a_misspelt_parameter_is_refused_before_anything_runs(path, misspelt):
    raised, folder = misspelt
    *before, check = raised[path.stem]
    assert before == ["None", "None"]
    assert "no parameter 'outputdir'. Did you mean 'output_dir'?" in check
    assert list(folder.iterdir()) == []


def test_a_misspelt_parameter_ends_papermill_with_the_sentence(tmp_path):
    done = papermill(NEAR / "convert.ipynb", tmp_path / "out.ipynb", "-p", "outputdir", tmp_path / "x", cwd=tmp_path)
    assert done.returncode != 0
    assert "no parameter 'outputdir'. Did you mean 'output_dir'?" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


def test_undeclared_names_are_found_in_a_cell():
    assert assigned("a: int = 1  # one\nb = 2\nprint(a)") == ["a", "b"]
    refuse_undeclared(["a", "b"], ["b"])
    with pytest.raises(Exception, match="It has: a, b"):
        refuse_undeclared(["a", "b"], ["zzz"])
