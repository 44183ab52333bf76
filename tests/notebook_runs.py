"""The notebooks, and what is looked for in each that was executed."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from blip2nb.notebook import assigned

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OWN_KERNEL = [path for path in NOTEBOOKS if path.stem != "lavis"]
OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NEAR = ROOT / "notebooks"
PICTURES = {"convert": 9, "05_activations": 7, "01_what_is_in_a_checkpoint": 0, "sweep": 0}
CONVERT_NOTHING = ("10_your_own_port", "sweep")  # or keep no model of it
STEPS = [path for path in NOTEBOOKS if path.stem not in ("convert", "lavis")]
PAPERMILL = [str(Path(sys.executable).parent / "papermill")]


def papermill(*arguments, cwd):
    return subprocess.run(
        [*PAPERMILL, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def shown(notebook):
    """All the text that an executed notebook shows, and the number of its pictures."""
    text, pictures = [], 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            pictures += "image/png" in data
            text.append(output.get("text", "") or data.get("text/plain", "") or "\n".join(output.get("traceback", [])))
    return "\n".join(text), pictures


def injected(path, **given):
    """A notebook with these parameters, as papermill gives it to a kernel."""
    return parameterize_notebook(load_notebook_node(str(path)), given)


def parameters(path):
    """The names that a notebook's tagged cell declares."""
    tagged = next(cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", []))
    return assigned(tagged.source)


def check_executed(path, notebook):
    """Every cell ran, none shows a traceback, and the pictures are there."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    text, pictures = shown(notebook)
    assert "Traceback" not in text
    assert pictures >= PICTURES.get(path.stem, 1)


def check_converted(path, outputs, model):
    """What the whole way leaves."""
    if path.stem == "convert":
        run = outputs / model
        assert json.loads((run / "report.json").read_text())["verdict"] == "explained"
        assert (run / "report.html").is_file()
        assert {path.suffix for path in (run / "figures").iterdir()} == {".png"}
