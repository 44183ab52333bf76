"""Reports as a verification would write them, made up so that every case a figure has to draw is there, and what reads
off a figure what was drawn."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from records import content

from blip2nb.display import plots
from blip2nb.report.schema import Content

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
        return {**where, "junction": True, "arrival_error": 0.0, "drift": 0.0, "bit_equal": True,
                **REFEREED, **empty}  # fmt: skip
    rounding = float(10 ** rng.normal(-6.8, 0.1))
    right = float(np.exp(rng.normal(0, 0.05)))
    values = {"drift": drift, "local_error": rounding * (excess or right), "rounding": rounding}
    values["excess"] = excess or right
    values |= REFEREED
    fixed = {**values, "local_error": rounding, "excess": right}
    return {**where, "junction": False, "arrival_error": drift, "bit_equal": False, "fixed": fixed, **values}


REFEREED = {"refereed": True, "referee_error": ""}


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
        "incomplete": [],
        "faults": [fault_at(each) for each in stages if each["name"] in faults],
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
        "images": several_images(kind, ours[1], theirs[1]) if faults else None,
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


PLACES = (
    ("layer_norm1", "residual", "in"), ("layer_norm1", "norm", "out"), ("self_attn", "attention", "in"),
    ("self_attn.projection", "projection", "out"), ("self_attn", "attention", "out"), ("", "residual", "in"),
    ("layer_norm2", "norm", "out"), ("mlp", "mlp", "in"), ("mlp.fc1", "mlp", "out"),
    ("mlp.activation_fn", "activation", "in"), ("mlp.fc2", "mlp", "out"), ("", "residual", "out"),
)  # fmt: skip
"""Inside a block: module, part, and whether it is what reaches a module or what that gives out."""


def fault_at(stage: dict[str, Any], part: str = "norm") -> dict[str, Any]:
    """The fault of a stage, in its second norm unless told, with three causes: one passes its counter-test, one fails
    it, one could not be tried."""
    inside, measured = [], {key: stage[key] for key in ("local_error", "rounding", "excess")}
    for name, kind, at in PLACES:
        empty = (name, at) == ("self_attn", "out") or (at == "in" and kind in ("residual", "mlp"))
        right = {"local_error": 0.0, "rounding": 0.0 if empty else 1e-7, "excess": 1.0}
        wrong = (kind, at) == (part, "out") and name != "layer_norm1"
        module = f"{stage['module']}.{name}".removesuffix(".")
        inside.append({"module": module, "part": kind, "at": at, **(measured if wrong else right), "faulty": wrong})
    module = next(one["module"] for one in inside if one["faulty"])
    test = {"change": "with eps 1e-06", "local_error": [stage["local_error"], 0.0], "excess": [stage["excess"], 1.0],
            "passed": True}  # fmt: skip
    failed = {"change": "with gelu", "local_error": [stage["local_error"]] * 2, "excess": [stage["excess"]] * 2,
              "passed": False}  # fmt: skip
    causes = [
        ("eps", f"{module}.eps is 1e-05, the reference has 1e-06", "read off both modules", test),
        ("activation", "the activation is relu, the reference has gelu", "told from what goes in", failed),
        ("attribute", f"{module}.mode is 'a', the reference has 'b'", "read off both modules", None),
    ]
    named = [
        {"id": id, "words": words, "module": module, "evidence": evidence, "counter_test": tried}
        for id, words, evidence, tried in causes
    ]
    return {"stage": stage["name"], "module": module, "part": part, "arrival_error": None, **measured,
            "inside": inside, "causes": named}  # fmt: skip


def several_images(kind: str, ours: str, theirs: str) -> dict[str, Any]:
    """What was found on seven images, of which the fourth is the worst."""
    kl = [2e-11, 0.0, 3e-10, 5e-7, 1e-10, math.nan, 4e-11]
    names = [f"photo-{n}.jpg" for n in range(3)] + ["$x$ 中 " + "a rather long name " * 4 + ".png", "d", "e", "f"]
    each = [
        {"image": name, "text": "a photo of", "kl": value, "max_abs": 1e-4, "top1_agreement": 1.0,
         "captions_equal": {"greedy": n != 3}}
        for n, (name, value) in enumerate(zip(names, kl, strict=True))
    ]  # fmt: skip
    worst = {"take": 3, "image": names[3], "text": "a photo of", "why": "its captions differ", "lavis": ours,
             "transformers": theirs, "tokens": list(sequences(kind).values())[-1]}  # fmt: skip
    return {"count": len(names), "names": names, "texts": ["a photo of"], "each": each, "worst": worst}


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
    if report and report["images"]:
        values |= of_images(report["images"])
    return values | (by_stage(report, rng) if report else {})


def of_images(images: dict[str, Any]) -> dict[str, np.ndarray]:
    """What there is an array of for every image. The worst has a token that is bit-equal, one that is no number, and
    one that would be another."""
    rng, shape, worst = (
        np.random.default_rng(3),
        (images["count"], len(images["worst"]["tokens"])),
        images["worst"]["take"],
    )
    kl, same = 10 ** rng.normal(-9, 1, shape), np.ones(shape)
    kl[worst, :2], same[worst, -1] = (0, math.nan), 0
    return {"images/worst": rng.integers(0, 255, (224, 224, 3), dtype=np.uint8), "images/kl": kl, "images/same": same}


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
) -> tuple[Content, dict[str, np.ndarray]]:
    """A report, and its arrays, that look at these values of LAVIS and transformers' differences to them."""
    value = report(faults={"vision.block.02": 41.0} if fault else None)
    value["examined"] = {
        "stage": "vision.block.02", "heads": None, "channels": ours.shape[1], "channel_step": 1, **about
    }  # fmt: skip
    with np.errstate(invalid="ignore"):
        return content(value), {"examined/lavis": ours, "examined/transformers": ours + residual}


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
    picture = plots.FIGURES[name](content(REPORTS[case]), ARRAYS_OF[case], width)
    picture.set_dpi(150)
    FigureCanvasAgg(picture).draw()
    return picture


def title(picture: Figure) -> str:
    return picture.get_suptitle().replace("\n", " ")


def texts(picture: Figure) -> list[str]:
    return [text.get_text() for text in picture.findobj(Text) if text.get_text()]


def text_boxes(picture: Figure) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """Every text that is seen, and where: left, bottom, right, top."""
    renderer = picture.canvas.get_renderer()  # type: ignore[attr-defined]
    hidden = set()
    for axes in picture.axes:
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib keeps ticks beyond the limits, and does not draw them
            low, high = sorted(axis.get_view_interval())
            hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    for text in picture.findobj(Text):
        box = text.get_window_extent(renderer)
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            empty = text.get_text().startswith("\n")  # an empty first line is room, not words
            yield text.get_text(), (box.x0, box.y0, box.x1, box.y0 + box.height / 2 if empty else box.y1)


def collisions(picture: Figure) -> list[str]:
    """Where words run into each other or off the page."""
    boxes, page, found = list(text_boxes(picture)), picture.bbox, []
    for words, (left, bottom, right, top) in boxes:
        if not (left > -1 and bottom > -1 and right < page.width + 1 and top < page.height + 1):
            found.append(f"{words!r} runs off the page")
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        if across >= 2 and down >= 3:
            found.append(f"{one!r} runs into {other!r}")
    return found


def marked(axes: Axes, *labels: str, shapes: str = "oD>^v<s") -> dict[float, float]:
    """x -> y of every marker drawn under one of these labels."""
    lines = [line for line in axes.lines if line.get_label() in labels and line.get_marker() in shapes]
    return {float(x): float(y) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def column(case: str, key: str) -> dict[float, float]:
    """place -> value of the stages that have a number there."""
    found = {float(n): each[key] for n, each in enumerate(REPORTS[case]["stages"])}
    return {n: value for n, value in found.items() if value is not None and not math.isnan(value)}
