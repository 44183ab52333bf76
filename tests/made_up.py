"""Reports as a verification would write them, made up so that every case a figure has to draw is there, and what reads
off a figure what was drawn."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from blip2nb.display import plots

THRESHOLD = 3.0
WIDTHS = (7.0, 3.4)


# ------------------------------------------------------------------------------------------------ made-up reports


def stage_names(kind: str, vision: int, qformer: int, language: int) -> list[str]:
    names = ["pixels", "vision.embeddings", *(f"vision.block.{n:02d}" for n in range(vision)), "vision.post_layernorm"]
    names += ["qformer.embeddings", *(f"qformer.layer.{n:02d}" for n in range(qformer)), "projection"]
    names += ["language.inputs_embeds", "language.attention_mask"]
    for stack in {"opt": [""], "t5": ["encoder.", "decoder."]}[kind]:
        if stack == "decoder.":
            names.append("language.decoder.input_ids")
        names.append(f"language.{stack}{'position_bias' if stack else 'positions'}")
        names += [f"language.{stack}block.{n:02d}" for n in range(language)]
        names.append(f"language.{stack}final_layer_norm")
    return [*names, "logits"]


JUNCTIONS = {"pixels", "language.inputs_embeds", "language.attention_mask", "language.decoder.input_ids"}


def places_of(name: str) -> dict[str, str]:
    """About where a stage is in either library."""
    number = name.rsplit(".", 1)[-1].lstrip("0") or "0"
    if name.startswith("vision.block"):
        return {"reference": f"visual_encoder.blocks.{number}", "module": f"vision_model.encoder.layers.{number}"}
    if name.startswith("qformer.layer"):
        return {"reference": f"Qformer.bert.encoder.layer.{number}", "module": f"qformer.encoder.layer.{number}"}
    return {"reference": f"lavis_model.{name}", "module": f"language_model.{name}"}


def stage(name: str, rng: np.random.Generator, excess: float | None, drift: float) -> dict[str, Any]:
    where = {"name": name, **places_of(name)}
    if name in JUNCTIONS:
        empty = dict.fromkeys(("local_error", "rounding", "excess", "fixed"))
        return {**where, "junction": True, "arrival_error": 0.0, "drift": 0.0, "bit_equal": True, **empty}
    rounding = float(10 ** rng.normal(-6.8, 0.1))
    right = float(np.exp(rng.normal(0, 0.05)))
    values = {"drift": drift, "local_error": rounding * (excess or right), "rounding": rounding}
    values["excess"] = excess or right
    fixed = {**values, "local_error": rounding, "excess": right}
    return {**where, "junction": False, "arrival_error": drift, "bit_equal": False, "fixed": fixed, **values}


def report(
    kind: str = "opt", sizes: tuple[int, int, int] = (6, 4, 3), faults: dict[str, float] | None = None
) -> dict[str, Any]:
    """A report whose stages are right but for `faults`, stage -> excess."""
    rng, faults = np.random.default_rng(0), faults or {}
    names = stage_names(kind, *sizes)
    stages = [stage(name, rng, faults.get(name), 1e-7 * (1 + n)) for n, name in enumerate(names)]
    first = next((s for s in stages if s["name"] in faults), None)
    ours = ["a cup on a plate", "two dogs lying on the grass beside a red ball " + "in the evening sun " * 4, "$x$ 中"]
    theirs = [ours[0], ours[1].replace("beside", "next to") if faults else ours[1], ours[2]]
    value = {
        "model_name": "tiny-blip2-opt-2.7b", "random_weights": True, "threshold": THRESHOLD,
        "verdict": "explained" if faults else "match", "summary": "What was found.", "stages": stages, "versions": {},
        "first_divergence": first and {
            "stage": first["name"], "module": "vision_model.post_layernorm", "local_error": first["local_error"],
            "excess": first["excess"], "cause": "eps of the post layer norm: LAVIS 1e-05, transformers $1e-06$"},
        "weights": {
            "missing": [], "unexpected": [], "dropped": {"position_ids": "why"}, "tied": {"a": "b", "c": "d"},
            "unused": {}, "roundtrip": True, "modules_equal": True, "written": 235,
            "bytes_by_kind": {
                "vision_model": {"Rename": 1_970_000_000, "FuseQueryValueBias": 30_000_000},
                "qformer": {"Rename": 420_000_000}, "query_tokens": {"Rename": 98_304},
                "language_projection": {"Rename": 7_870_000}, "language_model": {"Rename": 5_300_000_000}}},
        "pixel_values": {"max_abs": 0.0, "equal": True, "default": {"max_abs": 0.0146, "share": 0.003}},
        "logits": {"max_abs": 1e-4, "relative": 4e-6, "cosine": 1.0, "kl": 2e-10, "top1_agreement": 0.975},
        "captions": {
            "lavis": {"greedy": ours}, "huggingface": {"greedy": theirs}, "equal": not faults,
            "modes": {"greedy": {"equal": [True] * 3}, "default": {"equal": [True, False, True]}},
            "ladder": [{"lavis": steps(a), "transformers": steps(b, 1e-6)} for a, b in zip(ours, theirs, strict=True)]},
        "fusion": {"block": 0, "key_bias_effect": 1.3e-7, "query_bias_effect": 0.31},
        "sequences": sequences(kind),
        "examined": {"stage": (first or stages[8])["name"], "heads": 4, "channels": 48, "channel_step": 1},
        "provenance": {
            "weights_hash": "d726e8b8d6416a2c", "dtype": "auto", "prompt": "a photo of", "image_size": 224,
            "language_model": "facebook/opt-2.7b", "checkpoints": ["blip2_pretrained_opt2.7b.pth"],
            "files": [{"name": "eva_vit_g.pth", "bytes": 2_000_000_000}], "state": "0316b2de",
            "reference": {"source_hash": "d726e8b8d6416a2c", "inputs_hash": "f1b493bd", "device": "cpu",
                          "texts": {"text_input": ["a photo of"]}, "versions": {"torch": "2.14.1"}}},
        "top_tokens": [" cup", " plate", "\n", "中", "$x", "a$", " chair", "</s>", " tree", " https://example.org"],
    }  # fmt: skip
    return json.loads(json.dumps(value))


def steps(caption: str, shift: float = 0.0) -> list[list[Any]]:
    """A caption as a ladder of tokens; the third is nearly a tie."""
    words = caption.split(" ")
    return [[f" {word}", -0.3 - 0.1 * (n % 7) + shift, " other", -0.301 - 0.1 * n if n == 2 else -2.5 - 0.2 * (n % 5)]
            for n, word in enumerate(words)]  # fmt: skip


def sequences(kind: str) -> dict[str, list[str]]:
    text = ["<image>"] * 4 + ["</s>", "a", " photo", " of", " $x$", " 中", "\n"]
    return (
        {"language": text} if kind == "opt" else {"language.encoder": text, "language.decoder": ["<pad>", "a", " boat"]}
    )


def all_zero() -> dict[str, Any]:
    value = report()
    for each in value["stages"]:
        if not each["junction"]:
            each.update(drift=0.0, local_error=0.0, rounding=0.0, excess=None, bit_equal=True, arrival_error=0.0)
    return value


BROKEN = ("vision.block.04", "vision.block.05", "language.block.01")


def with_nan() -> dict[str, Any]:
    value = report()
    for number, each in enumerate(s for s in value["stages"] if s["name"] in BROKEN):
        lost = None if number else math.nan  # JSON has no NaN: a report may say either
        each.update(drift=lost, local_error=lost, rounding=lost, excess=lost)
    return value


def arrays(positions: int = 40, width: int = 24, report: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Arrays as they lie beside a report, with those by stage for the report that is given."""
    rng = np.random.default_rng(1)
    top = np.sort(rng.normal(0, 2, (positions, 50)))[:, ::-1]
    default = np.zeros((3, 224, 224), np.int8)
    default[0, 100:110, 7] = -1
    query, value = rng.normal(0, 0.5, width), rng.normal(0, 0.2, width)
    values = {
        "logits/kl": 10 ** rng.normal(-11, 0.7, positions), "logits/max_abs": 10 ** rng.normal(-4.5, 0.3, positions),
        "logits/margin": 10 ** rng.normal(0, 0.5, positions), "logits/top_ids": np.zeros((positions, 50), int),
        "logits/top_lavis": top, "logits/top_huggingface": top + rng.normal(0, 1e-5, top.shape),
        "pixels/image": rng.integers(0, 255, (60, 80, 3), dtype=np.uint8),
        "pixels/pil": np.zeros((3, 224, 224), np.int8), "pixels/default": default,
        "fusion/query": query, "fusion/value": value, "fusion/fused": np.concatenate([query, 0 * query, value]),
    }  # fmt: skip
    values["logits/kl"][3] = values["logits/max_abs"][3] = 0
    return values | (by_stage(report, rng) if report else {})


def by_stage(report: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What there is an array of for every stage, and the two sides of the one that was examined."""
    stages = report["stages"]
    sizes = np.array([[1.0, 0.01, 2.6, 9.0]]) * 10 ** np.cumsum(rng.normal(0.02, 0.06, (len(stages), 1)), axis=0)
    for number, each in enumerate(stages):
        if each["name"] in ("language.attention_mask", "language.decoder.input_ids"):
            sizes[number] = np.nan
    theirs = sizes * (1 + np.array([each.get("local_error") or 0.0 for each in stages])[:, None])
    values = {"activations/lavis": sizes.astype(np.float32), "activations/transformers": theirs.astype(np.float32)}
    sequences = report["sequences"]
    for each in stages:
        if each["junction"]:
            continue
        name, error = each["name"], each["local_error"]
        counts = {"vision": 17, "qformer": 4, "projection": 4}
        part = next((part for part in sequences if name.startswith(part)), list(sequences)[-1])
        length = counts.get(name.split(".")[0], len(sequences[part]))
        error = math.nan if error is None else error
        values[f"tokens/{name}"] = (error * 10 ** rng.normal(0, 0.2, length)).astype(np.float32)
    shape = (17, report["examined"]["channels"])
    ours = rng.normal(0, 1, shape)
    values["examined/lavis"] = ours.astype(np.float32)
    off = 1e-3 * ours if report["first_divergence"] else 1e-7 * rng.normal(0, 1, shape)
    values["examined/transformers"] = (ours + off).astype(np.float32)
    return values


def looking_at(
    ours: np.ndarray, residual: np.ndarray, fault: bool = True, **about: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A report, and its arrays, that look at these values of LAVIS and transformers' differences to them."""
    value = report(faults={"vision.block.02": 41.0} if fault else None)
    value["examined"] = {
        "stage": "vision.block.02", "heads": None, "channels": ours.shape[1], "channel_step": 1, **about
    }  # fmt: skip
    with np.errstate(invalid="ignore"):
        return value, {"examined/lavis": ours, "examined/transformers": ours + residual}


FULL = (39, 12, 32)
REPORTS = {
    "pass": report(),
    "fault": report(faults={"vision.post_layernorm": 12.7}),
    "two faults": report(faults={"vision.block.02": 41.0, "language.block.01": 1e9}),
    "zeros": all_zero(),
    "NaN": with_nan(),
    "14 stages": report(sizes=(1, 1, 1)),
    "full": report(sizes=FULL),
    "full, faults": report(
        sizes=FULL, faults={"vision.post_layernorm": 12.7, "language.block.08": 3.2, "language.block.30": 350.0}
    ),
    "full T5": report("t5", (39, 12, 24), {"language.decoder.block.22": 9000.0}),
}
ARRAYS_OF = {name: arrays(report=value) for name, value in REPORTS.items()}
ARRAYS = ARRAYS_OF["fault"]


@functools.cache
def drawn(name: str, case: str = "pass", width: float = 7.0) -> Figure:
    picture = plots.FIGURES[name](REPORTS[case], ARRAYS_OF[case], width)
    picture.set_dpi(150)
    FigureCanvasAgg(picture).draw()
    return picture


def title(picture: Figure) -> str:
    return picture.get_suptitle().replace("\n", " ")


def texts(picture: Figure) -> list[str]:
    return [text.get_text() for text in picture.findobj(Text) if text.get_text()]


def marked(axes: Axes, *labels: str, shapes: str = "oD>^v<s") -> dict[float, float]:
    """x -> y of every marker drawn under one of these labels."""
    lines = [line for line in axes.lines if line.get_label() in labels and line.get_marker() in shapes]
    return {float(x): float(y) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def column(case: str, key: str) -> dict[float, float]:
    """place -> value of the stages that have a number there."""
    found = {float(n): each[key] for n, each in enumerate(REPORTS[case]["stages"])}
    return {n: value for n, value in found.items() if value is not None and not math.isnan(value)}
