"""Every notebook, through the real papermill and real kernels, as people type it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from notebook_runs import (
    NEAR,
    OPT,
    OWN_KERNEL,
    ROOT,
    T5,
    check_converted,
    check_executed,
    papermill,
    parameters,
    shown,
)
from records import raw

import blip2nb
from blip2nb.conversion.files import own_files
from blip2nb.variants import variant

pytestmark = pytest.mark.usefixtures("kernels_begin_warm")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder of outputs for all that is executed on a model here, as people have it."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("path", OWN_KERNEL, ids=lambda path: path.stem)
def test_a_notebook_runs_headless_from_the_root(path, outputs, tmp_path):
    given = ["-p", "model_name", OPT] if "model_name" in parameters(path) else []
    given += ["-p", "output_dir", outputs]
    done = papermill(path.relative_to(ROOT), tmp_path / "out.ipynb", *given, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]
    check_executed(path, nbformat.read(tmp_path / "out.ipynb", 4))
    check_converted(path, outputs, OPT)


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
    text, pictures = shown(nbformat.read(tmp_path / "out.ipynb", 4))
    assert "incomplete" in text
    assert "blip2nb capture tiny-blip2-opt-2.7b" in text
    assert pictures == 1


@pytest.mark.lavis
def test_the_command_that_completes_the_proof_completes_it(own_checkpoint, tmp_path):
    run = blip2nb.convert("tiny-blip2-opt-2.7b", own_checkpoint, output_dir=tmp_path)
    report = blip2nb.verify(run, lavis_python="none", figures=False)
    assert report.verdict == "incomplete"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(raw(report)["complete_with"], shell=True, check=True, env={**os.environ, "PATH": path}, cwd=tmp_path)
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


def test_a_step_looks_at_a_run_by_its_name_alone_and_goes_to_standard_output(tmp_path):
    blip2nb.convert(T5, output_dir=tmp_path, run_name="mine", max_shard_size="200kB")
    done = papermill(
        "03_fuse_q_and_v_biases.ipynb", "-p", "model_name", "", "-p", "run_name", "mine", "-p", "output_dir", tmp_path,
        cwd=NEAR,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    assert any(cell.get("outputs") for cell in nbformat.reads(done.stdout, 4).cells)
