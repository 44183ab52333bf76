"""The command line: instant help, JSON of a fixed shape on stdout alone, and exit statuses that scripts can use."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.main
from conftest import Outcome, edit_weights

import blip2nb
from blip2nb.cli import app
from blip2nb.handles import Run
from blip2nb.twins import twin_tensors
from blip2nb.variants import RELEASED, TWINS, VARIANTS, variant

Command = Callable[..., Outcome]
COMMANDS = sorted(typer.main.get_command(app).commands)
TWIN = "tiny-blip2-opt-2.7b"


def test_help_imports_nothing_heavy(tmp_path: Path):
    script = (
        "import sys\n"
        "import blip2nb.cli\n"
        "sys.argv = ['blip2nb', '--help']\n"
        "try:\n"
        "    blip2nb.cli.main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "Commands" in done.stdout
    loaded = set(json.loads(done.stderr.replace("'", '"')))
    assert "blip2nb" in loaded
    heavy = {"torch", "torchvision", "transformers", "numpy", "safetensors", "PIL", "huggingface_hub", "matplotlib"}
    assert not loaded & (heavy | {"papermill", "IPython", "jupyter_client", "tqdm"})


def test_the_verbs_of_the_python_interface_are_commands():
    assert set(COMMANDS) >= {"variants", "keys", "doctor", "convert", "capture", "verify", "show"}
    assert all(callable(getattr(blip2nb, verb)) for verb in ("convert", "capture", "verify", "show"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_can_print_json(command: Command, name: str):
    ended = command(name, "--help")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("Usage: ")
    assert "--json" in ended.out


def test_the_version_is_the_packages(command: Command):
    assert command("--version").out.strip() == blip2nb.__version__


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["convert"], ["convert", TWIN, "--no-such"], ["keys", "bert"]]
)
def test_a_request_that_cannot_be_understood_ends_with_2(command: Command, arguments: list[str]):
    ended = command(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.strip()


def test_variants_lists_the_seven_models_and_their_twins(command: Command):
    rows = json.loads(command("variants", "--json").out)
    assert [row["model"] for row in rows] == list(VARIANTS)
    assert (len(rows), sum(row["twin"] for row in rows)) == (14, 7)
    keys = {"model", "lavis", "image_size", "language_model", "checkpoint", "prompt", "parameters", "twin"}
    assert all(set(row) == keys for row in rows)
    counts = {row["model"]: row["parameters"] for row in rows}
    for name in TWINS:
        assert counts[name] == sum(tensor.numel() for tensor in twin_tensors(variant(name)).values())
    sizes = {"opt-2.7b": 3.74e9, "opt-6.7b": 7.75e9, "flan-t5-xl": 3.94e9, "flan-t5-xxl": 12.2e9}  # the papers' figures
    for language, size in sizes.items():
        assert counts[f"blip2-{language}"] == pytest.approx(size, rel=0.01)
    lines = command("variants").out.splitlines()
    assert [line.split()[0] for line in lines] == list(VARIANTS)


@pytest.mark.parametrize("name", RELEASED)
def test_keys_prints_the_whole_mapping_of_a_full_size_model(command: Command, name: str):
    rows = json.loads(command("keys", name, "--json").out)
    assert all(list(row) == ["source", "target", "rule", "shape"] for row in rows)
    sources = [source for row in rows for source in row["source"]]
    assert len(set(sources)) == len(sources) == (1288 if "opt" in name else 1331)
    targets = [row["target"] for row in rows if row["target"] is not None]
    assert len(set(targets)) == len(targets) == (1248 if "opt" in name else 1291)
    assert {row["rule"] for row in rows} == {"Rename", "FuseQueryValueBias", "Tied", "Drop"}
    for row in rows:
        assert row["source"]
        assert all(isinstance(source, str) for source in row["source"])
        assert (row["target"] is None) == (row["rule"] == "Drop")
        assert (len(row["source"]) == 2) == (row["rule"] == "FuseQueryValueBias")
        assert row["shape"]
        assert all(type(size) is int and size > 0 for size in row["shape"])
    fused = next(row for row in rows if row["rule"] == "FuseQueryValueBias")
    assert fused["source"] == [f"visual_encoder.blocks.0.attn.{leaf}_bias" for leaf in "qv"]
    assert fused["shape"] == [3 * 1408]


def test_keys_in_words_has_a_line_for_each_rule_applied(command: Command):
    lines = command("keys", TWIN).out.splitlines()
    assert len(lines) == len(json.loads(command("keys", TWIN, "--json").out))
    assert "Rename              query_tokens -> query_tokens (1, 32, 48)" in lines


def test_convert_prints_the_directory_and_nothing_else_on_stdout(command: Command, tmp_path: Path):
    model = tmp_path / "model"
    assert command("convert", TWIN, "-o", model).out == f"{model}\n"
    assert json.loads(command("convert", TWIN, "-o", model, "--json").out) == {"model": TWIN, "output": str(model)}


def test_verify_ends_with_0_where_the_difference_is_explained_and_show_repeats_it(
    command: Command, model_copy: Callable[[str], Run]
):
    run = model_copy(TWIN)
    ended = command("verify", run.model, "--no-figures", "--json")
    report = json.loads(ended.out)
    assert (ended.status, report["verdict"], report["proof"]) == (0, "explained", "both")
    required = {
        *("model_name", "verdict", "weights", "pixel_values", "logits", "stages", "known_differences"),
        *("first_divergence", "captions", "versions", "seconds"),
    }
    assert set(report) >= required
    assert json.loads((run.folder / "report.json").read_text()) == report
    assert json.loads(command("show", run.folder, "--json").out) == report
    words = command("show", run.folder)
    assert words.status == 0
    assert "explained" in words.out
    assert report["summary"] in words.out


def test_verify_ends_with_0_for_the_weights_alone_where_that_was_asked(command: Command, model_copy):
    ended = command("verify", model_copy(TWIN).model, "--proof", "weights", "--no-figures", "--json")
    report = json.loads(ended.out)
    assert (ended.status, report["verdict"], report["stages"]) == (0, "incomplete", [])


@pytest.mark.parametrize("proof", ["weights", "both"])
def test_verify_ends_with_1_for_a_damaged_model(command: Command, model_copy, proof: str):
    run = model_copy(TWIN)
    name = "language_model.model.decoder.layers.2.fc1.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3] *= 1.01

    edit_weights(run.model / "model.safetensors", damage)
    ended = command("verify", run.model, "--proof", proof, "--no-figures")
    assert ended.status == 1
    assert "diverges" in ended.out
    assert name.replace("language_model", "opt_model") in ended.out
    assert json.loads((run.folder / "report.json").read_text())["verdict"] == "diverges"


def test_doctor_reports_on_this_machine(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BLIP2NB_LAVIS_PYTHON", sys.executable)  # a Python without LAVIS, which limits but does not stop
    ended = command("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(ended.out)}
    assert ended.status == 0
    assert findings["torch"]["found"] == importlib.metadata.version("torch")
    assert findings["torch"]["fine"] is True
    assert (findings["LAVIS"]["fine"], findings["LAVIS"]["required"]) == (False, False)
    assert findings["LAVIS"]["advice"]
