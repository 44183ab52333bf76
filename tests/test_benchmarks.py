"""The benchmark measures what it says: sources in the released layout, whole processes, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blip2nb import api
from blip2nb.families.captioners.mapping import entries, variant_sources
from blip2nb.variants import TWINS, variant
from blip2nb.weights.rules import Tied

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def _twin_size(name: str, language: torch.dtype) -> Any:
    from benchmarks.synthetic import Size

    return Size(name, variant(name), torch.float16, language)


@pytest.mark.parametrize("name", [name for name in TWINS if not variant(name).vision_in_checkpoint])
def test_a_synthetic_source_is_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import in_memory, synthetic

    monkeypatch.setattr(synthetic, "SHARD_BYTES", 60_000)
    size = _twin_size(name, torch.bfloat16 if variant(name).language.kind == "t5" else torch.float16)
    synthetic.write_source(size, tmp_path / "source")
    held = in_memory.load_all(size, tmp_path / "source")
    tied = {source for entry in entries(size.variant) if isinstance(entry.rule, Tied) for source in entry.sources}
    expected = {source: shape for source, shape in variant_sources(size.variant).items() if source not in tied}
    assert {source: tuple(tensor.shape) for source, tensor in held.items()} == expected
    assert all(bool(tensor.isfinite().all()) for tensor in held.values())
    assert len(list((tmp_path / "source" / size.variant.language_folder).glob("*-of-*"))) > 1
    weights = sum(tensor.nbytes for tensor in held.values())
    on_disk = sum(path.stat().st_size for path in (tmp_path / "source").rglob("*") if path.is_file())
    assert synthetic.source_bytes(size) == weights <= on_disk
    assert (api.convert(name, tmp_path / "source", tmp_path / "model").model / "config.json").is_file()


def test_the_plain_way_gives_the_same_model(tmp_path: Path) -> None:
    from benchmarks import in_memory, synthetic

    size = synthetic.SIZES["twin"]
    synthetic.write_source(size, tmp_path / "source")
    in_memory.convert(size, tmp_path / "source", tmp_path / "plain")
    run = api.convert(size.model, tmp_path / "source", tmp_path / "streamed")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    streamed = load_file(run.model / "model.safetensors")
    assert plain.keys() == streamed.keys()
    assert all(torch.equal(plain[name], streamed[name].float()) for name in plain)


def test_the_plain_way_is_refused_where_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import in_memory
    from benchmarks.synthetic import SIZES

    monkeypatch.setattr(in_memory, "free_memory", lambda: 24_000_000_000)
    assert in_memory.refusal(SIZES["1.5b"]) == ""
    assert in_memory.refusal(SIZES["blip2-opt-2.7b"]).startswith("does not fit: needs 34 GB")


def test_the_command_measures_a_twin_and_leaves_only_its_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.convert", "--results", str(tmp_path / "results.json")]
    arguments = ["--size", "twin", "--pairs", "1", "--work", str(tmp_path / "work")]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "results.json").read_text())["sizes"]["twin"]
    (pair,) = measured["series"]["auto"]["pairs"]
    assert pair["convert"] > pair["copy"] > 0
    assert measured["memory"]["convert"] > measured["memory"]["imports"] > 10_000_000
    assert measured["series"]["auto"]["output_bytes"] > 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]

    again = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "measured already" in again.stderr
    assert "| twin | auto |" in again.stdout
