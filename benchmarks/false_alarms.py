"""How far apart two right models are: LAVIS and transformers on the same weights, for many weights and inputs.

    python -m benchmarks.false_alarms                    # goes on where it was interrupted
    python -m benchmarks.false_alarms --fresh --minutes 20

Every pair is unbroken: the only known difference, the eps of one layer norm, is repaired first. So whatever
`trace.compare` calls a fault here is a false alarm. *Calibration* runs are what thresholds are chosen from, *held-out*
runs, of other seeds, only count alarms. A run is one pair on one set of weights, one input and one number of threads:
a whole twin, or one of the released models' blocks at its full size. Needs LAVIS's environment (`make lavis`), and
10 GB of memory. Where the machine has other things to do, set OMP_WAIT_POLICY=passive: some runs have more threads than
it has cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import machine
from benchmarks.alarm_rates import OTHER, page
from benchmarks.process import ROOT, BenchmarkError
from benchmarks.processors import SETTINGS
from blip2nb import twins
from blip2nb.conversion import directory
from blip2nb.conversion.files import open_source
from blip2nb.families.captioners import configuration, huggingface, inputs
from blip2nb.families.captioners.stages import parameter_pairs, stages
from blip2nb.lavis_env import kernels
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.trace.comparison import compare
from blip2nb.trace.stage import Stage
from blip2nb.variants import TWINS, Variant, variant

RESULTS = ROOT / "benchmarks" / "results" / "false_alarms.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THREADS = ((1, 1), (2, 2), (1, 4), (4, 1), (2, 1), (4, 4))
"""LAVIS's and transformers' numbers of threads, taken in turn."""

TWIN_SEEDS = {"calibration": range(1, 6), "held-out": range(101, 114)}
BLOCK_SEEDS = {"calibration": range(1, 3), "held-out": range(101, 103)}
TWIN_INPUTS = ("picture", "noise", "flat", "batch")
BLOCK_INPUTS = 4  # scales of the inputs for each set of weights
HALF_EVERY = 2  # half precision runs on every second input

OLD_PROCESSOR = SETTINGS["default"]
"""What makes MKL, PyTorch and oneDNN compute with the instructions that every x86 processor has."""

Row = dict[str, Any]
Exact = dict[str, tuple[float, float]]
"""Stage -> the distances of LAVIS's and of transformers' float32 output to float64."""


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description="How far apart two right models are.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop measuring after this long")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--only", default="", help="only runs whose name begins so, such as twin or block/vision")
    parser.add_argument("--rows", type=Path, default=ROOT / "outputs" / ".false_alarms.jsonl", help="what was measured")
    options = parser.parse_args()
    if options.fresh:
        options.rows.unlink(missing_ok=True)
    ends = time.monotonic() + options.minutes * 60
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="false-alarms-", dir=_fast_folder()))
        ask = stack.enter_context(lavis_side(Path(name) / "lavis"))
        ask_old = stack.enter_context(lavis_side(Path(name) / "old", old=True))
        ours = machine.describe_versions()
        theirs = ask(job="versions", threads=1)["versions"]
        kept = Kept(options.rows, {"LAVIS": theirs, **{what: ours[what] for what in ("torch", "transformers")}})
        for job in jobs():
            if job.name.startswith(options.only) and not kept.has(job.name):
                if time.monotonic() > ends:
                    break
                took = time.monotonic()
                kept.add(job.name, job.measure(ask_old if job.part == OTHER else ask, Path(name) / "job"))
                print(f"{job.name}: {time.monotonic() - took:.1f} s", flush=True)
        system = machine.describe_machine(Path(name))
    beside = {"LAVIS's side": ", ".join(f"{what} {version}" for what, version in theirs.items())}
    RESULTS.write_text(page(kept.rows, {**system, **ours, **beside}), encoding="utf-8")


def _fast_folder() -> str | None:
    """Where weights pass from one process to the other: in memory, where there is such a folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Kept:
    """What was measured, a line of JSON a job, so that an interrupted benchmark goes on. What was measured with other
    versions of the libraries does not count."""

    def __init__(self, path: Path, versions: Mapping[str, Any]):
        self._path, self._versions = path, versions
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        whole = [entry for entry in whole if entry["versions"] == versions]
        self._names = {entry["job"] for entry in whole}
        self.rows: list[Row] = [row for entry in whole for row in entry["rows"]]

    def has(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str, rows: list[Row]) -> None:
        self.rows += rows
        self._names.add(name)
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"job": name, "versions": self._versions, "rows": rows}) + "\n")


# -- LAVIS's process


Ask = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def lavis_side(folder: Path, old: bool = False) -> Iterator[Ask]:
    """A process of LAVIS's environment: call what this yields with a job's fields, and it is done when that returns.

    Args:
        old: have it compute as on a processor of another kind, without wide vectors, which adds up in another order.

    Raises:
        BenchmarkError: there is no such environment, or LAVIS failed.
    """
    environment = find_lavis()
    if environment is None:
        raise BenchmarkError("This needs LAVIS's environment: make lavis.")
    folder.mkdir(exist_ok=True)
    kernels.prepare(folder / "recorder", open_source(variant(TWINS[0])), "twin")
    command = [str(environment.python), "-W", "ignore", str(Path(__file__).with_name("lavis_side.py"))]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    variables |= OLD_PROCESSOR if old else {}
    variables.pop("PYTHONPATH", None)
    with (
        (folder / "lavis.log").open("w+") as log,
        subprocess.Popen(
            [*command, str(folder / "recorder")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(**job: Any) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                log.seek(0)
                raise BenchmarkError(f"LAVIS failed: {log.read()[-2000:]}")
            return json.loads(answer)

        yield ask
        process.stdin.close()


# -- what is measured


Job: TypeAlias = "TwinJob | BlockJob | FaultJob"


def jobs() -> list[Job]:
    """All of them, in an order in which an early end leaves something of everything."""
    single = ("float32",)
    found: list[tuple[float, Job]] = [(0, FaultJob(name, 301)) for name in TWINS if not name.endswith("coco")]
    found += [(0, TwinJob(OTHER, name, 401, dtypes=single)) for name in TWINS]
    found += [(0, BlockJob(OTHER, one, 401, dtypes=single)) for one in SHAPES]
    for part in ("calibration", "held-out"):
        twins = [TwinJob(part, name, seed) for seed in TWIN_SEEDS[part] for name in TWINS]
        blocks = [BlockJob(part, shape, seed) for seed in BLOCK_SEEDS[part] for shape in SHAPES]
        found += [(number / len(twins), job) for number, job in enumerate(twins)]
        found += [(number / len(blocks), job) for number, job in enumerate(blocks)]
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def _row(part: str, run: str, dtype: str, measured: Sequence[Row]) -> Row:
    return {"set": part, "run": run, "dtype": dtype, "stages": list(measured)}


@dataclasses.dataclass(frozen=True)
class TwinJob:
    """A twin with the weights of a seed, on several inputs."""

    part: str
    model: str
    seed: int
    inputs: Sequence[str] = TWIN_INPUTS
    dtypes: Sequence[str] = tuple(DTYPES)

    @property
    def name(self) -> str:
        return f"twin/{self.model}/{self.part}/{self.seed}"

    def measure(self, ask: Ask, work: Path) -> list[Row]:
        model = variant(self.model)
        shutil.rmtree(work, ignore_errors=True)
        request, loaded = twin_pair(model, self.seed, work)
        rows = []
        for number, kind in enumerate(self.inputs):
            theirs, ours = THREADS[(self.seed * len(self.inputs) + number) % len(THREADS)]
            chance = random.Random(f"{self.name}/{kind}")
            asked = _show(request, model, kind, chance, work)
            ask(job="twin", request=asked, threads=theirs)
            recorded = load_file(asked["output"])
            torch.set_num_threads(ours)
            run = f"{self.name}/{kind}/{theirs}-{ours}"
            exact: Exact = {}
            for dtype in self.dtypes if (self.seed + number) % HALF_EVERY == 0 else ["float32"]:
                measured = measure_twin(model, loaded(dtype), recorded, asked, exact)
                rows.append(_row(self.part, run, dtype, measured))
        shutil.rmtree(work)
        return rows


def twin_pair(model: Variant, seed: int, work: Path) -> tuple[Row, Callable[[str], huggingface.Loaded]]:
    """A twin with a seed's weights: the request to LAVIS, and transformers' side by dtype, converted by the kit."""
    twins.write_twin(model, work / "source", seed)
    opened = open_source(model, work / "source")
    path = kernels.prepare(work / "request", opened, "twin")
    request = json.loads(path.read_text(encoding="utf-8"))
    with _quiet():
        directory.write_model(work / "model", opened, directory.recipe_of(opened.files, "auto", "5GB"))
    held: dict[str, huggingface.Loaded] = {}

    def loaded(dtype: str) -> huggingface.Loaded:
        if dtype not in held:
            held[dtype] = load_as(work / "model", DTYPES[dtype])
        return held[dtype]

    return request, loaded


def load_as(folder: Path, dtype: torch.dtype) -> huggingface.Loaded:
    """A converted directory in a dtype, as `from_pretrained` loads it, with its one known difference repaired."""
    from transformers import Blip2ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    with _quiet():
        loaded = huggingface.load(folder)
        if dtype != torch.float32:
            model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
            loaded = dataclasses.replace(loaded, model=model)
    loaded.model.vision_model.post_layernorm.eps = 1e-5
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and warnings: this is done hundreds of times."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _show(request: Row, model: Variant, kind: str, chance: random.Random, work: Path) -> Row:
    """The request with images and texts of a kind."""
    pictures = {
        "picture": lambda: chance.choice(inputs.demo_images(model)),
        "noise": lambda: _noise(chance),
        "flat": lambda: Image.new("RGB", (64, 64), tuple(chance.choices(range(256), k=3))),
    }
    kinds = ["picture", "noise", "flat"] if kind == "batch" else [kind]
    paths = []
    for number, one in enumerate(kinds):
        paths.append(str(work / f"{kind}-{number}.png"))
        pictures[one]().save(paths[-1])
    texts = {"text_input": [_words(chance, 1, 20) for _ in kinds]}
    if model.language.kind == "t5":
        texts["text_output"] = [_words(chance, 1, 10) for _ in kinds]
    return {**request, "images": paths, "texts": texts, "output": str(work / f"{kind}.safetensors")}


def _noise(chance: random.Random) -> Image.Image:
    size = (chance.randint(32, 300), chance.randint(32, 300))
    values = np.random.default_rng(chance.getrandbits(32)).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def _words(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choices(twins.WORDS, k=chance.randint(least, most)))


def measure_twin(
    model: Variant,
    loaded: huggingface.Loaded,
    recorded: Mapping[str, torch.Tensor],
    request: Row,
    exact: Exact,
    table: Sequence[Stage] = (),
) -> list[Row]:
    """Compare a twin with a recording, at all stages or at those of `table`.

    Args:
        exact: filled by a run in float32, used by those in half precision.
    """
    images = [Image.open(path).convert("RGB") for path in request["images"]]
    given = huggingface.forward_inputs(loaded, model, images[0], request["texts"])
    if len(images) > 1:
        processor = loaded.processor.image_processor
        given["pixel_values"] = processor(images, return_tensors="pt")["pixel_values"]
        if model.language.kind == "t5":  # LAVIS masks the padding of the answers
            given["decoder_attention_mask"] = (given["labels"] != -100).long()
    given["pixel_values"] = given["pixel_values"].to(loaded.model.vision_model.dtype)
    table = table or stages(model)
    return measured(compare(recorded, loaded.model, table, given, explain=False), recorded, table, exact)


def measured(found: Any, recorded: Mapping[str, torch.Tensor], table: Sequence[Stage], exact: Exact) -> list[Row]:
    """What is kept of a comparison.

    Every stage by kind, n (how many values its output has), arrival, local, rounding, excess and carrying; in half
    precision also `whole`: LAVIS's distance to float64 on the float32 weights and inputs, over the half-precision
    output's distance to that. LAVIS's own output stands for the exact one there: it is ten thousand times nearer to
    it. Where transformers keeps a stage in float32, it is the excess itself.
    """
    rows = []
    for place, stage in zip(table, found.stages, strict=True):
        row = {"stage": stage.name, "kind": kind_of(stage.name), "n": recorded[place.reference].numel()}
        row |= {"arrival": stage.arrival_error, "local": stage.local_error}
        row |= {"rounding": stage.rounding, "excess": stage.excess}
        if stage.local_error:
            row["carrying"] = carrying(found.local_outputs[stage.name].double() - recorded[place.reference].double())
        if stage.name in exact:
            theirs, single = exact[stage.name]
            in_single = stage.local_error == 0 or 0 < stage.rounding < 10 * single
            row["whole"] = stage.excess if in_single else theirs / stage.local_error
        rows.append(row)
    if not exact:
        judged = [one for one in found.stages if one.excess is not None]
        exact.update((one.name, (one.excess * one.rounding, one.rounding)) for one in judged)
    return rows


def carrying(error: torch.Tensor) -> float:
    """How many values an error is spread over: about as many as there are if all are alike, few where a few large ones
    carry it (three times the squared sum of squares over the sum of fourth powers, which of n values on a bell curve
    gives n)."""
    squares = error.flatten() ** 2
    return 3 * (squares.sum() ** 2 / (squares**2).sum()).item()


_KINDS = (
    ("pixels", "junction"),
    ("language.inputs_embeds", "junction"),
    ("language.attention_mask", "junction"),
    ("language.decoder.input_ids", "junction"),
    ("vision.embeddings", "patches"),
    ("vision.block", "vision block"),
    ("vision.post_layernorm", "norm"),
    ("qformer.embeddings", "norm"),
    ("qformer.layer", "Q-Former layer"),
    ("projection", "linear"),
    ("logits", "linear"),
    ("language.positions", "look-up"),
    ("language.block", "OPT block"),
    ("language.encoder.block", "T5 encoder block"),
    ("language.decoder.block", "T5 decoder block"),
    ("language.encoder.position_bias", "look-up"),
    ("language.decoder.position_bias", "look-up"),
    ("language", "norm"),
)


def kind_of(stage: str) -> str:
    """What a stage is, by its name."""
    return next(kind for start, kind in _KINDS if stage.startswith(start))


# -- faults of a known size


FAULT_SIZES = (1, 3, 10)
"""How many times a stage's own rounding, in the dtype of the run, a planted fault changes its output by."""

_NORMS = {
    "vision.block.02": ("vision_model.encoder.layers.2.layer_norm2", "eps"),
    "vision.post_layernorm": ("vision_model.post_layernorm", "eps"),
    "qformer.layer.01": ("qformer.encoder.layer.1.output_query.LayerNorm", "eps"),
    "language.block.02": ("language_model.model.decoder.layers.2.final_layer_norm", "eps"),
    "language.encoder.block.01": ("language_model.encoder.block.1.layer.1.layer_norm", "variance_epsilon"),
}
"""Stage -> a norm in it, and what its eps is called: a fault there can be made as small as one likes, and half
precision does not round it away."""


@dataclasses.dataclass(frozen=True)
class FaultJob:
    """A twin with a norm's eps changed, at one stage after another, by so much as gives a fault of a known size."""

    model: str
    seed: int
    part: str = "planted"

    @property
    def name(self) -> str:
        return f"fault/{self.model}/{self.seed}"

    def measure(self, ask: Ask, work: Path) -> list[Row]:
        model = variant(self.model)
        shutil.rmtree(work, ignore_errors=True)
        request, loaded = twin_pair(model, self.seed, work)
        asked = _show(request, model, "picture", random.Random(self.name), work)
        ask(job="twin", request=asked, threads=1)
        torch.set_num_threads(1)
        recorded = load_file(asked["output"])
        rows = []
        for stage in (one for one in stages(model) if one.name in _NORMS):
            for dtype in DTYPES:
                found = [_planted(model, stage, loaded, dtype, recorded, asked, size) for size in FAULT_SIZES]
                rows.append(_row(self.part, f"{self.name}/{stage.name}", dtype, found))
        shutil.rmtree(work)
        return rows


def _planted(
    model: Variant,
    stage: Stage,
    loaded: Callable[[str], huggingface.Loaded],
    dtype: str,
    recorded: Mapping[str, torch.Tensor],
    request: Row,
    size: float,
) -> Row:
    """What is measured at a stage with a fault `size` times its own rounding."""
    path, eps = _NORMS[stage.name]

    def measure(dtype: str, change: float, exact: Exact) -> Row:
        norm = loaded(dtype).model.get_submodule(path)
        right = getattr(norm, eps)
        setattr(norm, eps, right + change)
        try:
            return measure_twin(model, loaded(dtype), recorded, request, exact, [stage])[0]
        finally:
            setattr(norm, eps, right)

    probe = 1e-3
    single = measure("float32", probe, {})
    unbroken = measure(dtype, 0, {})
    change = size * unbroken["rounding"] * probe / single["local"]
    fault = measure("float32", change, {})["local"]
    row = measure(dtype, change, {})
    if dtype != "float32":
        # what is exact has the fault too, so the half-precision output is as far from it as it was
        kept = unbroken["rounding"] < 10 * single["rounding"]
        row["whole"] = row["excess"] if kept else fault / unbroken["local"]
    return {**row, "wanted": size, "fault": fault}


# -- blocks at their full size


@dataclasses.dataclass(frozen=True)
class Shape:
    """One of the released models' modules at its full size.

    Attributes:
        model, stage: where it stands. tokens: how many positions it is shown.
        kind: which module of LAVIS's that is, in `lavis_side.build_block`'s words.
    """

    name: str
    model: str
    stage: str
    kind: str
    tokens: int


_TEXT, _ANSWER = 44, 10  # 32 queries and a short text, a short answer

SHAPES = (
    Shape("patches-224", "blip2-opt-2.7b", "vision.embeddings", "patches", 257),
    Shape("patches-364", "blip2-opt-2.7b-coco", "vision.embeddings", "patches", 677),
    Shape("vision-257", "blip2-opt-2.7b", "vision.block.00", "vision", 257),
    Shape("vision-677", "blip2-opt-2.7b-coco", "vision.block.00", "vision", 677),
    Shape("post-norm", "blip2-opt-2.7b", "vision.post_layernorm", "vision_norm", 257),
    Shape("q-former-norm", "blip2-opt-2.7b", "qformer.embeddings", "norm", 32),
    Shape("q-former-cross-257", "blip2-opt-2.7b", "qformer.layer.00", "qformer", 32),
    Shape("q-former-cross-677", "blip2-opt-2.7b-coco", "qformer.layer.00", "qformer", 32),
    Shape("q-former-self", "blip2-opt-2.7b", "qformer.layer.01", "qformer", 32),
    Shape("projection", "blip2-opt-2.7b", "projection", "linear", 32),
    Shape("opt-2.7b", "blip2-opt-2.7b", "language.block.00", "opt", _TEXT),
    Shape("opt-6.7b", "blip2-opt-6.7b", "language.block.00", "opt", _TEXT),
    Shape("opt-norm", "blip2-opt-6.7b", "language.final_layer_norm", "norm", _TEXT),
    Shape("t5-xl-encoder", "blip2-flan-t5-xl", "language.encoder.block.01", "t5_encoder", _TEXT),
    Shape("t5-xl-decoder", "blip2-flan-t5-xl", "language.decoder.block.01", "t5_decoder", _ANSWER),
    Shape("t5-xxl-encoder", "blip2-flan-t5-xxl", "language.encoder.block.01", "t5_encoder", _TEXT),
    Shape("t5-xxl-decoder", "blip2-flan-t5-xxl", "language.decoder.block.01", "t5_decoder", _ANSWER),
    Shape("t5-norm", "blip2-flan-t5-xxl", "language.encoder.final_layer_norm", "t5_norm", _TEXT),
    Shape("t5-logits", "blip2-flan-t5-xl", "logits", "linear", _ANSWER),
)


def shape(name: str) -> Shape:
    """The shape of this name."""
    return next(one for one in SHAPES if one.name == name)


class Alone(torch.nn.Module):
    """A module that is a model by itself, so that `compare` can run it."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, **arguments: Any) -> Any:
        return self.block(**arguments)


@dataclasses.dataclass(frozen=True)
class BlockJob:
    """A block with the weights of a seed, on inputs of several scales."""

    part: str
    shape: Shape
    seed: int
    dtypes: Sequence[str] = tuple(DTYPES)

    @property
    def name(self) -> str:
        return f"block/{self.shape.name}/{self.part}/{self.seed}"

    def measure(self, ask: Ask, work: Path) -> list[Row]:
        model = variant(self.shape.model)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        chance = random.Random(self.name)
        generator = torch.Generator().manual_seed(chance.getrandbits(32))
        torch.set_num_threads(2)
        place = next(one for one in stages(model) if one.name == self.shape.stage)
        candidate = Alone(empty_block(model, place)).eval()
        # weights so large that attention looks at one token alone, so small that it looks at all alike, and between
        gain = 10 ** chance.uniform(-1, 0.5)
        save_file(fill_block(candidate.block, model, place, generator, gain), work / "weights.safetensors")
        rows = []
        for number in range(BLOCK_INPUTS):
            theirs, ours = THREADS[(self.seed * BLOCK_INPUTS + number) % len(THREADS)]
            half = number % HALF_EVERY == 0
            # float16 ends at 65504 and loses digits below 6e-5, so it sees a narrower range
            scale = 10 ** (chance.uniform(-1, 0.5) if half else chance.uniform(-3, 3))
            given = block_inputs(self.shape, model, generator, scale, massive=number == BLOCK_INPUTS - 1)
            save_file(_for_lavis(self.shape, place, given), work / "inputs.safetensors")
            ask(
                job="block",
                block=_sizes(self.shape, model),
                weights=str(work / "weights.safetensors"),
                inputs=str(work / "inputs.safetensors"),
                output=str(work / "output.safetensors"),
                threads=theirs,
            )
            torch.set_num_threads(ours)
            expected = load_file(work / "output.safetensors")["output"]
            run = f"{self.name}/{number} scale {scale:.1e}/{theirs}-{ours}"
            exact: Exact = {}
            for dtype in self.dtypes if half else ["float32"]:
                there = in_dtype(candidate, self.shape, place, dtype)
                rows.append(
                    _row(self.part, run, dtype, compare_block(there, place, self.shape, given, expected, exact))
                )
        shutil.rmtree(work)
        return rows


def empty_block(model: Variant, place: Stage) -> torch.nn.Module:
    """transformers' module at a stage, as its whole model makes it, without values."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    short = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, layers=1),
        qformer=dataclasses.replace(model.qformer, layers=2),
        language=dataclasses.replace(model.language, layers=2),
    )
    text = {"opt": twins._opt_config, "t5": twins._t5_config}[model.language.kind](short)
    config = configuration.model_config(short, text, image_token=model.language.vocabulary - 1, newline=0)
    with torch.device("meta"):
        whole = Blip2ForConditionalGeneration(Blip2Config(**config))
    whole.vision_model.post_layernorm.eps = 1e-5
    return whole.get_submodule(place.candidate).to_empty(device="cpu").float()


def fill_block(
    block: torch.nn.Module, model: Variant, place: Stage, generator: torch.Generator, gain: float
) -> dict[str, torch.Tensor]:
    """Give a block random weights, rows of unlike size and a few strong channels; returns them by LAVIS's names."""
    for name, value in block.named_parameters():
        value.requires_grad_(False)
        if value.dim() == 1:
            value.normal_(generator=generator).mul_(0.1)
            if name.endswith("weight"):
                value.add_(1)
                value[:4] *= 8
        else:
            value.normal_(generator=generator).mul_(gain / value[0].numel() ** 0.5)
            value *= torch.randn(len(value), *[1] * (value.dim() - 1), generator=generator).mul_(0.3).exp_()
    theirs = {}
    held = dict(block.named_parameters())
    for name, (target, rows) in parameter_pairs(model).items():
        own = held.get(target.removeprefix(f"{place.candidate}.")) if target.startswith(f"{place.candidate}.") else None
        if own is None:
            continue
        if name.endswith("q_bias"):
            own[len(own) // 3 : 2 * len(own) // 3] = 0  # the key's
        for start in (f"{place.reference}.", "visual_encoder.", "LayerNorm."):
            name = name.removeprefix(start)
        theirs[name] = (own if rows is None else own[rows]).clone()
    return theirs


def block_inputs(
    shape: Shape, model: Variant, generator: torch.Generator, scale: float, massive: bool
) -> dict[str, torch.Tensor]:
    """What a block is called with, by the candidate's names: noise of a scale, with strong channels and a strong token.

    Args:
        massive: whether a single value is a thousand times as large as the rest, as trained models have them: it
            passes on through the residual, and carries most of the output's norm and of its rounding.
    """
    kind, place = shape.kind, next(one for one in stages(model) if one.name == shape.stage)

    def noise(tokens: int, width: int) -> torch.Tensor:
        values = torch.randn(1, tokens, width, generator=generator) * scale
        values[..., torch.randint(width, (4,), generator=generator)] *= 50
        values[:, torch.randint(tokens, (1,), generator=generator)] *= 5
        if massive:
            values[0, 0, int(torch.randint(width, (1,), generator=generator))] = 1000 * scale
        return values

    if kind == "patches":
        size = model.image_size
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator) * scale}
    first = next(name for name in ("hidden_states", "input") if name in place.inputs)
    given = {first: noise(shape.tokens, _width(shape, model))}
    if kind == "qformer" and "encoder_hidden_states" in place.inputs:
        given["encoder_hidden_states"] = noise(model.vision_tokens, model.vision.width)
    if kind == "t5_decoder":
        given["encoder_hidden_states"] = noise(_TEXT, model.language.width)
        causal = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril()
        given["attention_mask"] = causal[None, None]
    if kind in ("t5_encoder", "t5_decoder"):
        table = (shape.tokens, shape.tokens, model.language.heads)
        given["position_bias"] = torch.randn(*table, generator=generator).permute(2, 0, 1)[None].contiguous()
    return given


def _for_lavis(shape: Shape, place: Stage, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by LAVIS's names. Its T5 wants the mask added to the positions' bias, its OPT a mask of numbers."""
    out = {name: value.contiguous() for name, value in given.items()}
    lowest = torch.finfo(torch.float32).min
    if "attention_mask" in out:
        out["position_bias"] = out["position_bias"].masked_fill(~out.pop("attention_mask"), lowest)
    if shape.kind == "opt":
        out["attention_mask"] = torch.full((1, 1, shape.tokens, shape.tokens), lowest).triu(1)
    renamed = {name: where[1:] for name, where in place.inputs.items() if where.startswith(":")}
    if shape.kind == "patches":
        renamed["pixel_values"] = "x"
    if shape.kind in ("norm", "vision_norm", "linear"):
        renamed["input"] = "x" if shape.kind == "vision_norm" else "input"
    return {renamed.get(name, name): value for name, value in out.items()}


def _width(shape: Shape, model: Variant) -> int:
    if shape.stage.startswith("vision"):
        return model.vision.width
    return model.qformer.width if shape.stage.startswith(("qformer", "projection")) else model.language.width


def _sizes(shape: Shape, model: Variant) -> Row:
    """What `lavis_side.build_block` needs to know."""
    sizes: Row = {"kind": shape.kind, "width": _width(shape, model), "heads": model.vision.heads}
    if shape.kind.startswith(("opt", "t5")):
        language = model.language
        sizes |= {"heads": language.heads, "mlp": language.mlp, "head_width": language.head_width}
    if shape.kind == "qformer":
        sizes |= {"encoder_width": model.vision.width, "layer": int(shape.stage[-2:]), "queries": model.qformer.queries}
        sizes["cross_every"] = model.qformer.cross_every
    if shape.kind == "patches":
        sizes["image"] = model.image_size
    if shape.kind == "norm":
        sizes["eps"] = 1e-12 if shape.stage.startswith("qformer") else 1e-5
    if shape.kind == "linear":
        logits = shape.stage == "logits"
        sizes |= {"outputs": model.language.vocabulary if logits else model.language.width, "bias": not logits}
    return sizes


def in_dtype(candidate: Alone, shape: Shape, place: Stage, dtype: str) -> Alone:
    """A copy of a block in a dtype. In float16 transformers keeps T5's `wo` and the Q-Former in float32."""
    there = copy.deepcopy(candidate)
    if dtype == "float16" and place.name.startswith("qformer"):
        return there
    kept = ".wo" if dtype == "float16" else "nothing"
    for name, module in there.named_modules():
        if not name.endswith(kept) and not list(module.children()):
            module.to(DTYPES[dtype])
    return there


def compare_block(
    candidate: Alone,
    place: Stage,
    shape: Shape,
    given: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    exact: Exact,
) -> list[Row]:
    """Judge a block as a stage of its own, with the table's own inputs and arrangement."""
    dtype = next(candidate.parameters()).dtype
    alone = dataclasses.replace(
        place,
        reference="block",
        candidate="block",
        inputs={name: f"block:{name}" for name in place.inputs},
        arrange={},
        modules={},
    )
    recorded = {"block": expected, **{f"block:{name}": given[name] for name in place.inputs}}
    arguments = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    if shape.kind == "qformer":
        arguments["query_length"] = shape.tokens  # type: ignore[assignment]
    return measured(compare(recorded, candidate, [alone], arguments, explain=False), recorded, [alone], exact)


if __name__ == "__main__":
    main()
