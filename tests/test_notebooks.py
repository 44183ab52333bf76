"""Every notebook, through the real papermill and real kernels, as people type it."""

import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch

import blip2nb
from blip2nb.models.files import own_files
from blip2nb.notebook import assigned, refuse_undeclared
from blip2nb.variants import variant

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OWN_KERNEL = [path for path in NOTEBOOKS if path.stem != "lavis"]
OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NEAR = ROOT / "notebooks"
PICTURES = {"convert": 9, "05_activations": 7, "01_what_is_in_a_checkpoint": 0}
STEPS = [path for path in NOTEBOOKS if path.stem not in ("convert", "lavis")]
PAPERMILL = [str(Path(sys.executable).parent / "papermill")]


def papermill(*arguments, cwd, environment=None):
    return subprocess.run(
        [*PAPERMILL, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def executed(path):
    """All the text that an executed notebook shows, and the number of its pictures."""
    text, pictures = [], 0
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            pictures += "image/png" in data
            text.append(output.get("text", "") or data.get("text/plain", "") or "\n".join(output.get("traceback", [])))
    return "\n".join(text), pictures


def parameters(path):
    """The names that a notebook's tagged cell declares."""
    tagged = next(cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", []))
    return assigned(tagged.source)


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


@pytest.fixture(scope="module")
def listings():
    """Notebook -> what papermill lists of it, two of them at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(papermill, "--help-notebook", path, cwd=ROOT) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_lists_each_parameter_with_its_comment(path, listings):
    shown = listings[path].result()
    assert shown.returncode == 0
    for name in parameters(path):
        assert f"  {name}: " in shown.stdout
    assert ("which model" in shown.stdout) == ("model_name" in parameters(path))


@dataclasses.dataclass(frozen=True)
class Executed:
    """What became of one execution, and when each converted file under the outputs was written."""

    outputs: Path
    end: subprocess.CompletedProcess
    notebook: Path
    written: dict[Path, int]


def execute(path, model, start, outputs, notebook):
    """As people type it, from the root or from notebooks/."""
    given = ["-p", "model_name", model] if "model_name" in parameters(path) else []
    name = path.relative_to(ROOT) if start == ROOT else path.name
    given += ["-p", "output_dir", outputs]
    end = papermill(name, notebook, *given, cwd=start, environment={"OMP_NUM_THREADS": "1"})  # two run at a time
    written = {file: file.stat().st_mtime_ns for file in outputs.glob("*/model/*.safetensors")}
    return Executed(outputs, end, notebook, written)


@pytest.fixture(scope="module")
def executions(tmp_path_factory):
    """(notebook, model, folder it was started from) -> its execution, begun before the first is asked for: on the OPT
    twin from the root and then at once from notebooks/, on the T5 twin from notebooks/. Each model has outputs of its
    own, and works while the other does."""
    with ThreadPoolExecutor(1) as opt, ThreadPoolExecutor(1) as t5:
        jobs = {}
        for path, (model, pool, start) in itertools.product(
            OWN_KERNEL, ((OPT, opt, ROOT), (OPT, opt, NEAR), (T5, t5, NEAR))
        ):
            folder = tmp_path_factory.mktemp(path.stem)
            outputs = tmp_path_factory.getbasetemp() / f"outputs-{model}"
            jobs[path.stem, model, start] = pool.submit(execute, path, model, start, outputs, folder / "executed.ipynb")
        yield jobs
        for job in jobs.values():
            job.cancel()


@pytest.mark.parametrize(("model", "start"), [("opt", "root"), ("opt", "notebooks"), ("t5", "notebooks")])
@pytest.mark.parametrize("path", OWN_KERNEL, ids=lambda path: path.stem)
def test_a_notebook_runs_from_either_folder(path, model, start, executions):
    done = executions[path.stem, {"opt": OPT, "t5": T5}[model], {"root": ROOT, "notebooks": NEAR}[start]].result()
    assert done.end.returncode == 0, done.end.stderr[-1500:]
    cells = [cell for cell in nbformat.read(done.notebook, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    text, pictures = executed(done.notebook)
    assert "Traceback" not in text
    assert pictures >= PICTURES.get(path.stem, 1)


@pytest.mark.parametrize("path", OWN_KERNEL, ids=lambda path: path.stem)
def test_a_second_run_in_a_row_converts_nothing_again(path, executions):
    first, second = (executions[path.stem, OPT, start].result() for start in (ROOT, NEAR))
    assert first.written
    assert second.written == first.written


def test_convert_leaves_report_page_and_figures(executions):
    for model in (OPT, T5):
        run = executions["convert", model, NEAR].result().outputs / model
        report = json.loads((run / "report.json").read_text())
        assert report["verdict"] == "explained"
        assert (run / "report.html").is_file()
        assert {path.suffix for path in (run / "figures").iterdir()} == {".png"}


@pytest.fixture(scope="module")
def misspelt(tmp_path_factory):
    """Notebook -> its execution with a misspelt parameter, and the folder it was started in, two of them at a time."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {}
        for path in OWN_KERNEL:
            folder = tmp_path_factory.mktemp(path.stem)
            given = (path, folder / "out.ipynb", "-p", "outputdir", folder / "x")
            jobs[path] = pool.submit(papermill, *given, cwd=folder), folder
        yield jobs


@pytest.mark.parametrize("path", OWN_KERNEL, ids=lambda path: path.stem)
def test_a_misspelt_parameter_is_refused_before_anything_runs(path, misspelt):
    job, folder = misspelt[path]
    done = job.result()
    assert done.returncode != 0
    assert "no parameter 'outputdir'. Did you mean 'output_dir'?" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    ("notebook", "wrong", "right"), [("lavis", "python3", "lavis"), ("convert", "lavis", "python3")]
)
@pytest.mark.lavis
def test_the_wrong_kernel_is_said_in_one_sentence(notebook, wrong, right, tmp_path):
    done = papermill(f"{notebook}.ipynb", tmp_path / "out.ipynb", "-k", wrong, cwd=ROOT / "notebooks")
    assert done.returncode != 0
    assert f"needs the kernel '{right}'" in done.stderr


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    """Weights that no shipped recording fits: a twin's, with one tensor changed as by training."""
    folder = tmp_path_factory.mktemp("own") / "files"
    model = variant("tiny-blip2-opt-2.7b")
    shutil.copytree(own_files(model).vision.parent, folder)
    checkpoint = torch.load(folder / model.checkpoint, weights_only=True)
    checkpoint["model"]["query_tokens"] += 0.5
    torch.save(checkpoint, folder / model.checkpoint)
    return folder


def test_without_lavis_and_a_fitting_recording_the_weights_alone_are_proven(own_checkpoint, tmp_path):
    done = papermill(
        "convert.ipynb", tmp_path / "out.ipynb", "-p", "source", own_checkpoint, "-p", "output_dir", tmp_path,
        "-p", "lavis_python", "none", cwd=ROOT / "notebooks",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    text, pictures = executed(tmp_path / "out.ipynb")
    assert "incomplete" in text
    assert "blip2nb capture tiny-blip2-opt-2.7b" in text
    assert pictures == 1


@pytest.mark.lavis
def test_the_command_that_completes_the_proof_completes_it(own_checkpoint, tmp_path):
    run = blip2nb.convert("tiny-blip2-opt-2.7b", own_checkpoint, output_dir=tmp_path)
    report = blip2nb.verify(run, lavis_python="none", figures=False)
    assert report.verdict == "incomplete"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(report["complete_with"], shell=True, check=True, env={**os.environ, "PATH": path}, cwd=tmp_path)
    assert run.report.verdict == "explained"


@pytest.mark.lavis
def test_convert_runs_lavis_by_itself_where_no_recording_fits(own_checkpoint, tmp_path):
    done = papermill(
        "notebooks/convert.ipynb", tmp_path / "out.ipynb", "-p", "source", own_checkpoint, "-p", "output_dir", tmp_path,
        "-p", "run_name", "mine", "-p", "proof", "both", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert json.loads((tmp_path / "mine" / "report.json").read_text())["verdict"] == "explained"
    inner = nbformat.read(tmp_path / "mine" / "lavis.ipynb", 4)
    assert inner.metadata.kernelspec.name == "lavis"
    assert all(cell.execution_count for cell in inner.cells if cell.cell_type == "code")


@pytest.mark.lavis
def test_lavis_notebook_runs_by_hand_twice_in_a_row_from_either_folder(tmp_path):
    for start, notebook in ((ROOT, "notebooks/lavis.ipynb"), (NEAR, "lavis.ipynb")):
        done = papermill(notebook, tmp_path / "out.ipynb", "-p", "output_dir", tmp_path, cwd=start)
        assert done.returncode == 0, done.stderr[-1500:]
    assert (tmp_path / "tiny-blip2-opt-2.7b" / "tape.safetensors").is_file()


def test_undeclared_names_are_found_in_a_cell():
    assert assigned("a: int = 1  # one\nb = 2\nprint(a)") == ["a", "b"]
    refuse_undeclared(["a", "b"], ["b"])
    with pytest.raises(Exception, match="It has: a, b"):
        refuse_undeclared(["a", "b"], ["zzz"])


def test_a_step_looks_at_a_run_by_its_name_alone_and_goes_to_standard_output(tmp_path):
    blip2nb.convert(T5, output_dir=tmp_path, run_name="mine", max_shard_size="200kB")
    done = papermill(
        "03_fuse_q_and_v_biases.ipynb", "-p", "model_name", "", "-p", "run_name", "mine", "-p", "output_dir", tmp_path,
        cwd=NEAR,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    assert any(cell.get("outputs") for cell in nbformat.reads(done.stdout, 4).cells)
