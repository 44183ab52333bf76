"""What a run of a sweep says of its place, in folders of any name."""

import html
import shlex

import nbformat
import papermill
import pytest
from records import raw

from blip2nb.handles import Report, Run
from blip2nb.lavis_env.reference import completion
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import Origin
from blip2nb.report.schema import Content
from blip2nb.sweeps.place import HIDDEN, place, relocate


def run_in(folder):
    return Run(folder / "a run", folder / "a run" / "model")


def says(run):
    """What a notebook shows of a run: as text, as HTML, and with the command that completes its proof."""
    return [repr(run), run._repr_html_(), repr(run.report), html.escape(raw(run.report)["complete_with"])]


@pytest.mark.parametrize("name", ["out", "für später", "it's mine", '<a> & "b"', "結果 'x'"])
def test_a_run_is_moved_with_all_that_it_says_of_its_place(tmp_path, converted, name):
    """In the report as in the notebook: paths, commands, HTML and parameters, as they are really written."""
    home = tmp_path / name
    workshop = place(home).begin("a run", "0" * 64)
    made, moved = run_in(workshop), run_in(home)
    manifest = Manifest.read(converted("tiny-blip2-opt-2.7b").model)
    report = Content(complete_with=completion(made, manifest, Origin()))
    Report(report).save(made.folder)
    cell = nbformat.v4.new_code_cell("output_dir = ''", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata |= {"kernelspec": {"name": "python3", "language": "python"}, "papermill": {}}
    notebook = papermill.parameterize.parameterize_notebook(notebook, {"output_dir": str(workshop)})
    shown = [nbformat.v4.new_output("stream", text=one) for one in says(made)]
    notebook.cells.append(nbformat.v4.new_code_cell(outputs=shown))
    nbformat.write(notebook, made.folder / "convert.ipynb")

    relocate(made.folder, workshop, str(home))
    assert not [path for path in made.folder.iterdir() if HIDDEN.encode() in path.read_bytes()]
    made.folder.rename(moved.folder)
    assert raw(moved.report)["complete_with"] == completion(moved, manifest, Origin())
    assert str(moved.model) in shlex.split(raw(moved.report)["complete_with"])
    _, injected, last = nbformat.read(moved.folder / "convert.ipynb", 4).cells
    given = {}
    exec(injected.source, given)
    assert given["output_dir"] == str(home)
    assert [output.text for output in last.outputs] == says(moved)
