"""Does the kit say the same on every processor? Right models and faults, on other instructions and numbers of threads.

    python -m benchmarks.processors
    python -m benchmarks.processors --threads 1 --faults 4

A *setting* has PyTorch, oneDNN and MKL compute with the instructions of a kind of processor. They are chosen when a
process starts, so each setting, with one, two or four threads, is a process of its own: a *cell*. Each cell compares
right models, whole twins and layers whose rounding depends much on the order of adding, with recordings that were made
with every setting, and looks for faults drawn by chance from the catalogue. What ships was recorded by LAVIS on one
machine; where LAVIS's environment is there, it records the twins again with each setting. Ends with 1 where a right
model is called wrong, a fault is told wrong, or two cells name different causes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.process import ROOT
from benchmarks.results import table
from blip2nb.catalogue.bench import Bench
from blip2nb.catalogue.captioners import CATALOGUE
from blip2nb.catalogue.cases import Case
from blip2nb.conversion.files import open_source
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.stages import stages
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.lavis_env.reference import shipped_tape
from blip2nb.proof.behaviour import tape_images
from blip2nb.trace import Stage, compare
from blip2nb.trace.tape import Tape
from blip2nb.variants import TWINS, variant

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
SHIPPED = "as shipped"
SETTINGS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
}
THREADS = (1, 2, 4)  # products are added up in another order with another number; one process may have more than cores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available() -> list[str]:
    """The settings that this machine's processor can compute with."""
    variables = {name: value for name, value in os.environ.items() if name not in SETTINGS["default"]}
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"]
    best = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()
    names = list(SETTINGS)
    return names[: names.index(best) + 1] if best in names else names[:1]


def environment(setting: str, threads: int = 1) -> dict[str, str]:
    """What a process that is to compute so is started with. Threads wait for each other without taking a core: there
    may be more of them than cores."""
    count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **SETTINGS[setting], **count, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one process said.

    Attributes:
        excess: recording -> the smallest and the largest of all stages in float32.
        alarms: what was called wrong and is right.
        causes: recording -> fault -> the first cause that was named, and where.
        wrong: faults whose stage, module or cause was not told right.
    """

    setting: str
    threads: int
    excess: Mapping[str, tuple[float, float]]
    alarms: Sequence[str]
    causes: Mapping[str, Mapping[str, str]]
    wrong: Sequence[str]


def main() -> int:
    """Record, run every cell, print the table; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description="Does the kit say the same on every processor?")
    parser.add_argument("--twins", nargs="+", default=list(TWINS), help="right models to compare")
    parser.add_argument("--faulty", nargs="*", default=[OPT, T5], help="models to put faults into")
    parser.add_argument("--faults", type=int, default=12, help="how many, drawn by chance from the catalogue")
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--no-lavis", action="store_true", help="only what ships, no recordings by LAVIS")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)  # what a cell's process is asked
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(dataclasses.asdict(measured(json.loads(options.cell.read_text(encoding="utf-8"))))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        cells = list(_cells(options, Path(scratch)))
    print(page(cells))
    return int(bool(complaints(cells)))


def _cells(options: argparse.Namespace, scratch: Path) -> Iterator[Cell]:
    names = sorted({*options.twins, *options.faulty}, key=list(TWINS).index)
    for name in names:
        _run([sys.executable, "-m", "blip2nb.cli", "convert", name, "--output", scratch / name / "model"], os.environ)
    recordings: dict[str, dict[str, str]] = {SHIPPED: {name: str(shipped_tape(variant(name))) for name in names}}
    settings = available()
    for setting in settings:
        _run(
            [sys.executable, "-m", "benchmarks.processors", "--cell", _ask(scratch, record=setting)],
            environment(setting),
        )
        if find_lavis() is not None and not options.no_lavis:
            recordings[setting] = {name: str(scratch / f"{setting}-{name}.safetensors") for name in names}
            for name, path in recordings[setting].items():
                command = [sys.executable, "-m", "blip2nb.cli", "capture", name, "--output", path]
                _run(command, environment(setting))
    for setting in settings:
        for threads in options.threads:
            asked = _ask(
                scratch,
                setting=setting,
                threads=threads,
                recordings=recordings,
                settings=settings,
                twins=options.twins,
                faulty=options.faulty,
                faults=options.faults,
            )
            said = _run([sys.executable, "-m", "benchmarks.processors", "--cell", asked], environment(setting, threads))
            cell = Cell(**json.loads(said.splitlines()[-1]))
            print(f"{setting}, {threads} threads: {len(cell.alarms)} alarms, {len(cell.wrong)} wrong", flush=True)
            yield cell


def _ask(scratch: Path, **what: Any) -> Path:
    path = scratch / "asked.json"
    path.write_text(json.dumps({"scratch": str(scratch), **what}), encoding="utf-8")
    return path


def _run(command: Sequence[object], variables: Mapping[str, str]) -> str:
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=dict(variables), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


# -- in a cell


def measured(asked: Mapping[str, Any]) -> Cell:
    """What this process says of right models and of faulty ones; or, where asked for that, it records the layers."""
    scratch = Path(asked["scratch"])
    if "record" in asked:
        torch.save({name: layer() for name, layer in LAYERS.items()}, scratch / f"{asked['record']}.layers.pt")
        return Cell(asked["record"], 1, {}, [], {}, [])
    excess: dict[str, tuple[float, float]] = {}
    alarms: list[str] = []
    causes: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for recorded, tapes in asked["recordings"].items():
        found = [one for name in asked["twins"] for one in right_twin(name, scratch / name / "model", tapes[name])]
        excess[recorded], some = _judged(found)
        alarms += [f"{recorded}: {one}" for one in some]
        causes[recorded] = {}
        for name in asked["faulty"]:
            bench = Bench(
                scratch / name / "model", Tape(Path(tapes[name])), functools.partial(open_source, variant(name))
            )
            for case in drawn(bench, asked["faults"]):
                first, right = named(bench, case)
                causes[recorded][f"{name}: {case}"] = first
                wrong += [] if right else [f"{recorded}: {name}: {case}: {first}"]
    for setting in asked["settings"]:
        there = torch.load(scratch / f"{setting}.layers.pt", weights_only=True)
        excess[f"layers, {setting}"], some = _judged([right_layer(name, there[name]) for name in LAYERS])
        alarms += [f"layers, {setting}: {one}" for one in some]
    return Cell(asked["setting"], asked["threads"], excess, alarms, causes, wrong)


Judged = tuple[str, Any, bool]
"""What was compared, the comparison, and whether its excess counts: it is another in half precision."""


def _judged(found: Sequence[Judged]) -> tuple[tuple[float, float], list[str]]:
    single = [stage.excess for _, one, counts in found if counts for stage in one.stages if stage.excess is not None]
    alarms = [
        f"{what}: {stage.name}: excess {stage.excess}, arrival {stage.arrival_error}"
        for what, one, _ in found
        for stage in one.faults
    ]
    return (min(single), max(single)), alarms


def right_twin(name: str, folder: Path, tape_path: str) -> Iterator[Judged]:
    """A twin with its known difference put right, in each dtype; with the weights from before the cast, and without."""
    tape, model = Tape(Path(tape_path)), variant(name)
    before: dict[str, torch.Tensor] = {}
    for dtype, kind in DTYPES.items():
        loaded = huggingface.load(folder, dtype)
        loaded.model.vision_model.post_layernorm.eps = 1e-5
        given = huggingface.forward_inputs(loaded, model, tape_images(tape)[0], tape.metadata["texts"])
        before = before or dict(loaded.model.named_parameters(remove_duplicate=False))
        for weights in (None,) if kind is torch.float32 else (None, before.get):
            words = f"{name} in {dtype}" + " with the weights known" * bool(weights)
            found = compare(tape, loaded.model, stages(model), given, weights=weights, explain=False)
            yield words, found, kind is torch.float32


def drawn(bench: Bench, count: int, seed: str = "processors") -> list[Case]:
    """Faults of the catalogue, each at a place drawn by chance; the same in every cell."""
    chance = random.Random(f"{seed}/{bench.right.variant.name}")
    cases = (bench.cases(fault) for fault in CATALOGUE.values())
    every = [chance.choice(some) for some in cases if some]
    return chance.sample(every, min(count, len(every)))


def named(bench: Bench, case: Case) -> tuple[str, bool]:
    """Where the kit finds a fault and what it calls it, in words; and whether that is right, or need not be found."""
    answer = bench.ask(case)
    first = answer.findings[0] if answer.findings else None
    words = answer.error or ("nothing" if first is None else f"{first.stage}, {first.module}, {first.causes[0].id}")
    return words, answer.marks is None or answer.marks.right


# -- layers in which the order of adding, or the library's exp, decides


def _drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """By numpy: torch's own are not the same with other instructions."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def _patches(scale: float) -> tuple[torch.nn.Module, torch.Tensor]:
    """A convolution with a bias like the rest of its output, or far above it: an almost empty image."""
    layer = torch.nn.Conv2d(3, 192, 14, 14)
    layer.weight.data.copy_(_drawn(192, 3, 14, 14) / 588**0.5)  # by its 3 · 14 · 14 inputs
    layer.bias.data.copy_(_drawn(192, seed=1) / 10)  # type: ignore[union-attr]
    return layer, scale * _drawn(1, 3, 112, 112, seed=2)


def _matrix(bias: float) -> tuple[torch.nn.Module, torch.Tensor]:
    layer = torch.nn.Linear(2048, 512)
    layer.weight.data.copy_(_drawn(512, 2048) / 2048**0.5)
    layer.bias.data.copy_(_drawn(512, seed=1) * bias)
    return layer, _drawn(1, 16, 2048, seed=2)


def _function(make: Callable[[], torch.nn.Module], scale: float) -> tuple[torch.nn.Module, torch.Tensor]:
    return make(), scale * _drawn(1, 40, 160)


_MADE: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {
    "patches": lambda: _patches(1.0),
    "patches of an almost empty image": lambda: _patches(1e-3),
    "a matrix": lambda: _matrix(0.1),
    "a matrix with a large bias": lambda: _matrix(100.0),
    "gelu": lambda: _function(torch.nn.GELU, 1.0),
    "gelu of small values": lambda: _function(torch.nn.GELU, 1e-2),
    "gelu with tanh": lambda: _function(lambda: torch.nn.GELU(approximate="tanh"), 1.0),
    "silu": lambda: _function(torch.nn.SiLU, 1.0),
    "softmax": lambda: _function(lambda: torch.nn.Softmax(-1), 10.0),
    "layer norm": lambda: _function(lambda: torch.nn.LayerNorm(160), 1.0),
}


def _output(name: str) -> torch.Tensor:
    layer, x = _MADE[name]()
    with torch.no_grad():
        return layer.eval()(x)


LAYERS: dict[str, Callable[[], torch.Tensor]] = {name: functools.partial(_output, name) for name in _MADE}
"""What each gives, with the instructions of this process."""


def right_layer(name: str, expected: torch.Tensor) -> Judged:
    """A layer against what another process made of it."""
    layer, x = _MADE[name]()
    table = [Stage("layer", "there", "0", inputs={"input": "there:input"})]
    recorded = {"there": expected, "there:input": x}
    return name, compare(recorded, torch.nn.Sequential(layer).eval(), table, x, explain=False), True


# -- what is printed


def complaints(cells: Sequence[Cell]) -> list[str]:
    """Every alarm, every fault that was not told right, and every fault with another cause in another cell."""
    said = [f"{cell.setting}, {cell.threads} threads: {one}" for cell in cells for one in (*cell.alarms, *cell.wrong)]
    causes: dict[str, dict[str, str]] = {}
    for cell in cells:
        for recorded, faults in cell.causes.items():
            for fault, cause in faults.items():
                causes.setdefault(fault, {})[f"{cell.setting}, {cell.threads} threads, recorded {recorded}"] = cause
    return said + [f"{fault}: {by}" for fault, by in causes.items() if len(set(by.values())) > 1]


def page(cells: Sequence[Cell]) -> str:
    """A line for each cell and recording, and the complaints."""
    rows = [
        [cell.setting, str(cell.threads), recorded, f"{least:.3g}", f"{most:.3g}",
         str(sum(one.startswith(f"{recorded}: ") for one in cell.alarms)),
         str(len(cell.causes.get(recorded, {}))), str(sum(one.startswith(f"{recorded}: ") for one in cell.wrong))]
        for cell in cells
        for recorded, (least, most) in cell.excess.items()
    ]  # fmt: skip
    head = ["computed with", "threads", "recorded", "smallest excess", "largest", "alarms", "faults", "told wrong"]
    return "\n".join([table(head, rows), "", *(complaints(cells) or ["No alarm, and the same causes everywhere."])])


if __name__ == "__main__":
    sys.exit(main())
