"""A twin with other weights and inputs, recorded by LAVIS and compared with what transformers computes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.alarm_lavis import Ask
from benchmarks.alarm_rates import Row
from benchmarks.alarm_rows import DTYPES, HALF_EVERY, THREADS, Exact, measured, run_row
from blip2nb import twins
from blip2nb.conversion import directory
from blip2nb.conversion.files import open_source
from blip2nb.families.captioners import huggingface, inputs
from blip2nb.families.captioners.stages import stages
from blip2nb.lavis_env import kernels
from blip2nb.trace.comparison import compare
from blip2nb.trace.stage import Stage
from blip2nb.variants import Variant, variant

TWIN_INPUTS = ("picture", "noise", "flat", "batch")


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
            asked = show(request, model, kind, chance, work)
            ask(job="twin", request=asked, threads=theirs)
            recorded = load_file(asked["output"])
            torch.set_num_threads(ours)
            run = f"{self.name}/{kind}/{theirs}-{ours}"
            exact: Exact = {}
            for dtype in self.dtypes if (self.seed + number) % HALF_EVERY == 0 else ["float32"]:
                measured = measure_twin(model, loaded(dtype), recorded, asked, exact)
                rows.append(run_row(self.part, run, dtype, measured))
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
    loaded.model.vision_model.post_layernorm.eps = 1e-5  # LAVIS's
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and warnings: this is done hundreds of times."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def show(request: Row, model: Variant, kind: str, chance: random.Random, work: Path) -> Row:
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
