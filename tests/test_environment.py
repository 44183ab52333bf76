"""What sets a machine up is one thing said in several places: this holds them equal."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from blip2nb import doctor
from blip2nb.lavis_env import kernels

ROOT = Path(__file__).parent.parent


def conda(name):
    content = yaml.safe_load((ROOT / name).read_text())
    (pip,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    plain = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    return plain, pip


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_conda_and_pip_install_the_same():
    makefile = (ROOT / "Makefile").read_text()
    for name, wanted in (
        ("environment.yml", ["-c constraints.txt", "-e ."]),
        ("environment-lavis.yml", ["-c constraints-lavis.txt", "-r requirements-lavis.txt"]),
    ):
        plain, pip = conda(name)
        assert plain == ["python=3.11", "pip"]
        assert pip == wanted
        assert f"pip install -q {' '.join(pip)}\n" in makefile


def test_the_tested_versions_are_the_installed_ones_and_above_the_floors():
    pins = pinned("constraints.txt")
    requirements = importlib.metadata.requires("blip2nb")
    assert len(requirements) > 10
    for requirement in requirements:
        name, floor = re.match(r"([\w-]+)(?:>=([\d.]+))?", requirement).groups()
        installed = importlib.metadata.version(name)
        pin = pins[name.lower().replace("_", "-")]
        assert pin == installed, f"{name}: constraints.txt says {pin}"
        if floor:
            assert [int(part) for part in floor.split(".")] <= [int(part) for part in installed.split(".")[:2]]


def test_what_reads_a_notebook_compiles_no_grammar_when_it_starts():
    """jsonschema from 4.25 on does, for a check of addresses that no notebook has: it made papermill four times slower
    to start."""
    code = "import nbformat, sys; print('rfc3987_syntax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_floor_of_transformers_is_one_that_works_and_doctor_knows_it(monkeypatch):
    """Before 5.6 there is no `BlipImageProcessorPil`, up to 5.14 a right flan-t5 is called wrong: tried with both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = dict(re.match(r"([\w-]+)(?:>=([\d.]+))?", one).groups() for one in project["dependencies"])
    assert {name: floors[name] or "0.0" for name in doctor.FLOORS} == doctor.FLOORS
    assert [int(part) for part in floors["transformers"].split(".")] >= [5, 15]
    assert all(finding.fine for finding in doctor._packages())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.14.1")
    assert [finding.what for finding in doctor._packages() if not finding.fine] == ["transformers"]


def test_no_test_depends_on_what_a_registry_has_today():
    """What tests install has exact versions; `make newest`, which has none, is no part of them."""
    for name in ("constraints.txt", "constraints-lavis.txt", "requirements-transformers4.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line and not line.startswith("#")]
        assert wanted
        assert not [line for line in wanted if not re.fullmatch(r"[\w.-]+==[\w.+-]+(?: *;.*)?", line)], name


def test_lavis_is_pinned_as_published():
    assert pinned("constraints-lavis.txt")["salesforce-lavis"] == "1.0.2"
    assert "salesforce-lavis==1.0.2" in (ROOT / "requirements-lavis.txt").read_text()
    assert int(pinned("constraints-lavis.txt")["numpy"].split(".")[0]) < 2


@pytest.mark.lavis
def test_lavis_is_unmodified():
    """Every file of the installed package is byte for byte what its wheel's record says."""
    code = (
        "import importlib.metadata as m, hashlib, base64\n"
        "def digest(f): return hashlib.new(f.hash.mode, f.locate().read_bytes()).digest()\n"
        "def text(f): return base64.urlsafe_b64encode(digest(f)).rstrip(b'=').decode()\n"
        "bad = [str(f) for f in m.files('salesforce-lavis') if f.hash and text(f) != f.hash.value]\n"
        "print(len(m.files('salesforce-lavis')), bad)"
    )
    python = ROOT / ".venv-lavis" / "bin" / "python"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    count, bad = done.stdout.split(" ", 1)
    assert int(count) > 200
    assert bad.strip() == "[]"


@pytest.mark.parametrize("path", kernels._FILES.values(), ids=kernels._FILES)
def test_what_travels_to_an_old_environment_is_python_3_8(path):
    nodes = list(ast.walk(ast.parse(path.read_text(), feature_version=(3, 8))))
    imported = {node.names[0].name.split(".")[0] for node in nodes if isinstance(node, ast.Import)}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {"blip2nb", *(Path(name).stem for name in kernels._FILES)}
    lavis = {
        "torch",
        "numpy",
        "safetensors",
        "lavis",
        "omegaconf",
        "transformers",
        "PIL",
    }  # from omegaconf on, LAVIS's own
    never_called = {"blake3"}
    assert imported - sys.stdlib_module_names - ours <= lavis | never_called
    newer = {
        "removeprefix",
        "removesuffix",
        "cache",
        "pairwise",
        "is_relative_to",
        "bit_count",
        "strict",
        "slots",
        "root_dir",
    }
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
    assert not used & newer


def test_the_makefile_runs_what_ci_runs():
    """On each change the tests; each night what may fail without one, such as a new release of something."""
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    nightly = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for job in nightly["jobs"].values() for step in job["steps"] if "run" in step]
    commands = re.findall(r"^(?:exec )?(make .*)$", run, re.MULTILINE)
    assert commands == ["make test", "make extended"]
    assert steps == ["make newest", "make processors"]
    assert {"schedule", "workflow_dispatch"} <= set(nightly[True])  # YAML takes the key `on` for a truth value
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[1] for command in commands + steps} <= set(targets)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lab", "lavis"):
        assert re.search(rf"^{target}\s", listed, re.MULTILINE)
