"""Measure what a verification costs beside the forward passes it needs: both sides in turns, on a twin.

    python -m benchmarks.verification
    python -m benchmarks.verification --models tiny-blip2-flan-t5-xl --times 20

The bare side runs what a verification cannot do without and nothing else: the model as it is and with the known
difference put right, once more fed LAVIS's values, once in float64, and the captions of every image in every mode. The
verification is the whole of it, from a loaded package to the report in memory: reading and hashing the weights, loading
the model, both proofs. Start-up, which is importing PyTorch and transformers, is given beside them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.process import ROOT, seconds
from benchmarks.results import table
from blip2nb import api
from blip2nb.families.captioners import huggingface
from blip2nb.lavis_env.reference import SHIPPED_TAPES
from blip2nb.proof import verify
from blip2nb.proof.behaviour import tape_images
from blip2nb.proof.captions import LONGEST, MODES
from blip2nb.proof.subject import Subject
from blip2nb.trace.precision import widened
from blip2nb.trace.tape import Tape
from blip2nb.variants import variant

RESULTS = ROOT / "benchmarks" / "results" / "verification.md"
MODELS = ("tiny-blip2-opt-2.7b", "tiny-blip2-opt-2.7b-coco", "tiny-blip2-flan-t5-xl")
_STARTUP = "import torch, transformers; from transformers import Blip2ForConditionalGeneration, AutoProcessor"
PASSES = 3
"""Forward passes in float32: as shipped, with the known difference put right, and fed LAVIS's values."""


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description="What a verification costs beside the forward passes it needs.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="the twins to verify")
    parser.add_argument("--times", type=int, default=10, help="how often each side is run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [_row(model, options.times, Path(name)) for model in options.models]
        system = machine.describe_machine(Path(name))
    startup = statistics.median(seconds([sys.executable, "-c", _STARTUP]) for _ in range(3))
    RESULTS.write_text(_page(rows, startup, system, options.times), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def _row(model: str, times: int, scratch: Path) -> list[str]:
    """Median seconds of the parts of the bare side, of loading, of a verification, and the ratio."""
    run = api.convert(model, output=scratch / model / "model")
    tape = Tape(SHIPPED_TAPES / f"{model}.safetensors")
    loaded = huggingface.load(run.model)
    images = tape_images(tape)
    inputs = huggingface.forward_inputs(loaded, variant(model), images[0], tape.metadata["texts"])
    measured: dict[str, list[float]] = {}
    for _ in range(times + 1):
        for name, work in _parts(loaded, inputs, images, tape, run.model).items():
            began = time.perf_counter()
            work()
            measured.setdefault(name, []).append(time.perf_counter() - began)
    took = {name: statistics.median(values[1:]) for name, values in measured.items()}
    bare = PASSES * took["float32"] + took["float64"] + took["captions"]
    rest = took["verification"] - bare - took["loading"]
    shown = [bare, took["captions"], took["loading"], took["verification"], rest]
    ratios = [(took["verification"] - took["loading"]) / bare, took["verification"] / bare]
    return [model, *(f"{value * 1000:.0f}" for value in shown), *(f"{ratio:.2f}" for ratio in ratios)]


def _parts(
    loaded: huggingface.Loaded, inputs: dict[str, Any], images: list, tape: Tape, folder: Path
) -> dict[str, Callable[[], object]]:
    def float32() -> None:
        with torch.no_grad():
            loaded.model(**inputs)

    def float64() -> None:
        with torch.no_grad(), widened(loaded.model):
            loaded.model(**{name: _wide(value) for name, value in inputs.items()})

    def captions() -> None:
        for options in MODES.values():
            huggingface.caption(loaded, images, tape.metadata["prompt"], max_new_tokens=LONGEST, **options)

    return {
        "float32": float32,
        "float64": float64,
        "captions": captions,
        "loading": lambda: huggingface.load(folder),
        "verification": lambda: verify.verify(Subject(folder, tape)),
    }


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _page(rows: list[list[str]], startup: float, system: dict, times: int) -> str:
    head = [
        "model", "bare, ms", "of that captions, ms", "loading, ms", "verification, ms", "the rest, ms",
        "without loading ÷ bare", "÷ bare",
    ]  # fmt: skip
    words = [
        "# What a verification costs beside the forward passes it needs",
        "Written by `python -m benchmarks.verification`.",
        f"Medians of {times}, both sides in turns in one warm process. Bare is {PASSES} forward passes in float32, "
        "one in float64, and the captions. The rest is hashing every parameter and going back to the source's tensors, "
        "recording and comparing each stage, the default image processor beside the one that is proven, and the arrays "
        "that the figures draw.",
        table(head, rows),
        f"Start-up, importing PyTorch and transformers, takes {startup:.1f} s more in a fresh process.",
        "## Machine and versions",
        "\n".join(f"- {what}: {value}" for what, value in {**system, **machine.describe_versions()}.items()),
    ]
    return "\n\n".join(words) + "\n"


if __name__ == "__main__":
    main()
