"""Every notebook as in JupyterLab: Run All, and Run All again in the same kernel."""

import pytest
from nbclient import NotebookClient
from notebook_runs import (
    CONVERT_NOTHING,
    NEAR,
    OWN_KERNEL,
    T5,
    check_converted,
    check_executed,
    injected,
    parameters,
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder of outputs for all that is executed on a model here, as people have it."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("path", OWN_KERNEL, ids=lambda path: path.stem)
def test_run_all_works_from_notebooks_and_again_in_the_same_kernel_converts_nothing_twice(
    path, outputs, kernels_begin_warm
):
    given = {"model_name": T5} if "model_name" in parameters(path) else {}
    notebook = injected(path, **given, output_dir=str(outputs))
    client = NotebookClient(notebook, resources={"metadata": {"path": str(NEAR)}}, timeout=None)
    with client.setup_kernel():
        written = []
        for _ in ("Run All", "and again"):
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
            check_executed(path, notebook)
            check_converted(path, outputs, T5)
            written.append({file: file.stat().st_mtime_ns for file in outputs.glob("*/model/*.safetensors")})
    assert written[0] or path.stem in CONVERT_NOTHING
    assert written[1] == written[0]
