"""The package without its repository, as a wheel installs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import blip2nb


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages that holds this one, and notebooks of somebody else."""
    site = tmp_path_factory.mktemp("site")
    (site / "notebooks").mkdir()
    shutil.copytree(
        Path(blip2nb.__file__).parent, site / "blip2nb", ignore=shutil.ignore_patterns("__pycache__", "tapes")
    )
    return site


def python(site, *arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_without_the_notebooks_a_sweep_says_what_is_missing_and_what_to_do(site, tmp_path):
    shutil.rmtree(site / "notebooks")
    done = python(site, "-m", "blip2nb.cli", "sweep", "tiny-*", cwd=tmp_path)
    (site / "notebooks").mkdir()
    assert done.returncode == 2
    assert done.stderr.startswith(
        "blip2nb: There is no notebook 'convert': the kit's own are in its repository and not"
    )
    assert "Give a notebook's path, or work in a clone" in done.stderr


def test_runs_go_to_the_callers_folder_and_not_among_the_packages(site, tmp_path):
    done = python(site, "-c", "from blip2nb.report.runs import outputs_folder; print(outputs_folder())", cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "outputs")
