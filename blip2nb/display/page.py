"""report.html: all that a run found on one page, for whoever was not there. Needs no network, names no place on a disk.

The words and the order are the template's (page.html.j2); what is computed for it is here.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2nb.display import captions, faults, plots, templates, text
from blip2nb.display.figures.depth import Depth
from blip2nb.display.figures.style import Arrays, Report, rasterise
from blip2nb.display.figures.words import as_count, as_number, as_percent, as_times
from blip2nb.forms import there
from blip2nb.report import schema
from blip2nb.sizes import as_bytes
from blip2nb.whole import write_whole

MOST_ROWS = 200
"""So many rows of a figure's data are on the page; where there are more, it says so. Chosen: every stage has its
row, of which the largest models have 112."""

_WIDE, _NARROW = 7.0, 3.4  # inches: what a desk and a phone are shown


def save(
    report: Report,
    arrays: Arrays,
    path: Path,
    drawn: Mapping[str, Image.Image] | None = None,
    phone: Mapping[str, Shown] | None = None,
) -> Path:
    """Write the page, whole or not at all. Arguments as for `render`. Returns the path."""
    write_whole(path, render(report, arrays, drawn, phone))
    return path


def render(
    report: Report,
    arrays: Arrays,
    drawn: Mapping[str, Image.Image] | None = None,
    phone: Mapping[str, Shown] | None = None,
) -> str:
    """The page as HTML.

    Args:
        report: as in report.json.
        arrays: as in arrays.safetensors.
        drawn: figures that `plots.save_all` has drawn, by name. The others are drawn.
        phone: what `narrow` has made of them already, by name.
    """
    template = templates.template("page.html.j2", number=as_number, bytes=as_bytes, count=as_count, cell=_cell)
    return template.render(
        report=report,
        words=text.VERDICTS[report.verdict],
        behaviour=report.proof == "both",
        meaning=meaning(report),
        problems=problems(there(report.weights)),
        usage=text.program(report),
        completion=text.completion(report),
        numbers=text.numbers(report),
        captions=captions.pairs(report),
        figures=list(_figures(report, arrays, drawn or {}, phone or {})),
        faults=[_fault(group) for group in faults.Faults(report).groups],
        stages=_stages(report) if report.stages else [],
        names=_names(there(report.weights).names),
        files=_files(there(report.provenance).files),
        packages=sorted({package for found in report.versions.values() for package in found}),
        commands=text.commands(report),
        most_rows=MOST_ROWS,
    )


# -- what it means


def meaning(report: Report) -> list[tuple[str, str]]:
    """Answers to what its owner asks first, as (question, answer)."""
    answers = [("Is it safe to ship?", _safe(report))]
    if report.proof == "both":
        answers += [
            ("What about my logits?", _about_logits(there(report.logits))),
            ("What about my captions?", _about_captions(report)),
            ("What about my images?", _about_pixels(there(report.pixel_values))),
        ]
    return answers


def _safe(report: Report) -> str:
    if report.verdict == "match":
        return "Yes. It is the model that LAVIS runs."
    if report.verdict == "incomplete" and any(one.proof == "weights" for one in report.incomplete):
        return "Not proven. What the weights could be compared with is missing, as is said below."
    if report.verdict == "incomplete" and report.proof == "weights":
        return (
            "The weights are LAVIS's. Whether the model also computes with them what LAVIS computes was not looked at: "
            "layers, logits and captions are not proven."
        )
    if report.verdict == "incomplete":
        return "Not proven in full. No fault was found in what was judged; what was not judged is listed below."
    if report.verdict == "diverges":
        return "No, not before what is said below is understood."
    if there(report.captions).equal and there(report.logits).top1_agreement == 1:
        return "Yes, as it is. With the line below, set after loading, the difference is gone too."
    return "Yes, with the line below, set after loading. Without it, some of its words are not LAVIS's."


def _about_logits(logits: schema.Logits) -> str:
    words = (
        f"On the same image and text they differ from LAVIS's by {as_number(logits.relative)} of their size, at "
        f"most by {as_number(logits.max_abs)}. The likeliest next token is the same at "
        f"{as_percent(logits.top1_agreement)} of the positions."
    )
    if logits.fixed is not None:
        words += f" With the remedy below they differ by {as_number(logits.fixed.relative)}."
    return words


def _about_captions(report: Report) -> str:
    said = there(report.captions)
    equal = {mode: sum(found.equal) for mode, found in said.modes.items()}
    count = len(said.modes["greedy"].equal)
    words = (
        f"Of {as_count(count, 'image')}, {equal['greedy']} get the same caption in every token when decoded greedily, "
        f"{equal['beams']} with five beams, {equal['default']} with LAVIS's own settings."
    )
    reasons = [one.words for one in report.known_differences if "captions.default" in one.explains]
    if reasons:
        words += f" The last differ for a known reason, {reasons[0]}; see below."
    if report.random_weights:
        words += " The weights are random, so the captions are noise on purpose."
    return words


def _about_pixels(pixels: schema.Pixels) -> str:
    if not pixels.equal:
        return f"Their pixel values differ from LAVIS's by up to {as_number(pixels.max_abs)}."
    words = 'With the processor loaded as below (backend="pil") their pixel values are LAVIS\'s, bit for bit.'
    if pixels.default.share:
        words += f" The default one gives other values for {as_percent(pixels.default.share)} of them."
    return words


def problems(weights: schema.Weights) -> list[str]:
    """What is wrong with the weights, a line each."""
    whole = {"missing": "is missing", "unexpected": "does not belong to the model", "misshapen": "has another shape"}
    found = [f"{name} {words}" for key, words in whole.items() for name in getattr(weights, key)]
    back = [f"{name} does not go back to what was read" for name in weights.roundtrip_differences]
    return found + back + list(weights.modules_different)


def _files(files: Sequence[schema.ReadFile]) -> list[tuple[str, str]]:
    return [(one.name, as_bytes(one.bytes)) for one in files]


# -- what goes wrong


def _fault(group: faults.Group) -> dict[str, Any]:
    """What the page says of faults of one cause: of the first all that was found, of the others where they are."""
    first = group.first
    opened = next((fault for fault in group.faults if len(fault.inside) > 1), None)
    return {
        "part": first.part,
        "module": first.module,
        "where": faults.where(first),
        "size": faults.size(first),
        "words": group.words_with_more,
        "tested": faults.outcome(group.cause),
        "evidence": group.cause.evidence,
        "others": [(faults.said(first, one), one.evidence, faults.outcome(one)) for one in group.others],
        "opened": opened and faults.where(opened),
        "inside": [_look(place) for place in opened.inside] if opened else [],
        "places": [_place(fault) for fault in group.faults],
    }


def _look(place: schema.Place) -> dict[str, Any]:
    """A row for one place inside a stage."""
    still = place.local_error == 0
    handed_on = still and place.rounding == 0
    return {
        "what": f"{place.part}, on the way" if place.at == "in" else place.part,
        "module": place.module,
        "error": faults.number(place.local_error, ".1e"),
        "times": "–" if handed_on else faults.number(place.excess, ".3g"),
        "wrong": place.faulty,
        "finding": "FAULT" if place.faulty else "bit-equal" if still else "rounding alone",
    }


def _place(fault: schema.Fault) -> tuple[str, ...]:
    """A row for one of many faults of one cause."""
    cause = fault.causes[0]
    named = (faults.where(fault), fault.part, fault.module)
    return (*named, faults.size(fault), faults.said(fault, cause), faults.outcome(cause) or "–")


# -- the figures


@dataclasses.dataclass(frozen=True)
class Shown:
    """A palette PNG as a data URL, with its size in pixels."""

    source: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class _Figure:
    """A figure as the page shows it. `rows` are at most MOST_ROWS of the `total` in `table`."""

    name: str
    title: str
    reading: str
    alt: str
    wide: Shown
    narrow: Shown
    columns: list[str]
    rows: list[list[Any]]
    total: int


_READING = {
    "stage_map": (
        "The network, place by place",
        "From the image at one end to the logits at the other. Each box is a place that was compared, with its name in "
        "LAVIS and in transformers; what is wrong is lit.",
    ),
    "files": (
        "What was written",
        "The length of a bar is the size of that part of the model; its pattern says what was done to the tensors.",
    ),
    "fusion": (
        "Query and value bias become one",
        "LAVIS keeps two biases for each attention of the vision tower, transformers one for query, key and value. "
        "The key's is zero, and no output depends on it.",
    ),
    "pixels": (
        "What the model sees",
        "Each picture shows by how many grey levels a processor's pixels differ from LAVIS's. Blank is no difference.",
    ),
    "depth_trace": (
        "Where errors arise",
        "Follow the network from left to right. Above, how far each place is from LAVIS; below, how many times its own "
        "rounding that is. About 1 is rounding alone; what is above the dashed line is something else.",
    ),
    "before_and_after": (
        "What the remedy does",
        "Each line leads from the error as shipped to the error with the remedy, in multiples of the place's own "
        "rounding. It should end near 1.",
    ),
    "activations": (
        "The values themselves",
        "How large the values are at each place, in both models: where the two lie on each other, the models agree.",
    ),
    "logits": (
        "What the model says next",
        "How far the two models' logits are apart at each position, and whether that could change the likeliest token: "
        "it could only where the difference is more than half the lead of the first over the second.",
    ),
    "captions": (
        "One caption, token by token",
        "A row for each token. The filled mark is how sure a model was of it, the hollow one how likely it found the "
        "runner-up: where the two are close, little was needed for another word. The row that counts is tinted.",
    ),
    "worst_image": (
        "The image they agree on least",
        "Of all images that were shown to both, the one where the predictions are furthest apart: token by token, and "
        "beside all the others.",
    ),
    "stage_by_token": (
        "The error of each token",
        "A row for each place in the network, a column for each token. A single bright column is one token's trouble, "
        "a bright row the layer's.",
    ),
    "token_by_channel": (
        "One place from close by",
        "LAVIS's values and transformers' at one place, subtracted: a row for each token, a column for each channel. "
        "A pattern tells what kind of difference it is.",
    ),
    "signature": (
        "The signature of the difference",
        "The difference against LAVIS's own value. A level line off zero is a bias, a slope is a scale, a curve is "
        "another function; a shapeless cloud is rounding.",
    ),
    "inside": (
        "Inside the place that goes wrong",
        "The modules of one place in the order in which they run, each fed what LAVIS's was fed. What is above the "
        "dashed line goes wrong by itself; an arrow leads to where it is once the likely cause is put right.",
    ),
}  # fmt: skip
"""Name -> (title, how to read it), in the order of the page."""


def _figures(
    report: Report, arrays: Arrays, drawn: Mapping[str, Image.Image], phone: Mapping[str, Shown]
) -> Iterator[_Figure]:
    there = plots.available(report, arrays)
    for name in [*(one for one in _READING if one in there), *(one for one in there if one not in _READING)]:
        title, reading = _READING.get(name, (name.replace("_", " ").capitalize(), ""))
        rows = plots.table(name, report, arrays)
        wide = drawn[name] if name in drawn else _raster(name, report, arrays, _WIDE)
        yield _Figure(
            name=name,
            title=title,
            reading=reading,
            alt=plots.alt_text(name, report, arrays),
            wide=_shown(wide),
            narrow=phone[name] if name in phone else narrow(name, report, arrays),
            columns=[_COLUMNS.get(key, key.replace("_", " ")) for key in (rows[0] if rows else {})],
            rows=[list(row.values()) for row in rows[:MOST_ROWS]],
            total=len(rows),
        )


_COLUMNS = {
    "excess": "error ÷ its own rounding",
    "excess_fixed": "the same with the remedy",
    "local_error": "error alone",
    "kl": "KL divergence",
    "max_abs": "largest difference",
    "lavis": "LAVIS",
}


def _raster(name: str, report: Report, arrays: Arrays, width: float) -> Image.Image:
    """Sharp where it is shown: at least two pixels of the file for each of the page's, of which an inch has 96; a phone
    shows more, and gets 256 to the inch."""
    return rasterise(plots.FIGURES[name](report, arrays, width), plots.DPI if width == _WIDE else 256)


def narrow(name: str, report: Report, arrays: Arrays) -> Shown:
    """What a phone is shown of a figure."""
    return _shown(_raster(name, report, arrays, _NARROW))


def _shown(image: Image.Image) -> Shown:
    """With 256 colours, a palette's most and all that the figures need: a third of the size, and half of the SVG's."""
    small, buffer = with_few_colours(image), io.BytesIO()
    small.save(buffer, "PNG", compress_level=6)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Shown(f"data:image/png;base64,{data}", *small.size)


def with_few_colours(image: Image.Image) -> Image.Image:
    """RGB to a palette. Only the first dot of each stretch of one colour is looked at, which is a tenth of them."""
    dots = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    starts = np.flatnonzero(np.diff(dots, prepend=~dots[:1]))
    firsts = Image.frombytes("RGB", (len(starts), 1), dots[starts].tobytes(), "raw", "RGBX")
    firsts = firsts.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    places = np.repeat(np.asarray(firsts)[0], np.diff(starts, append=dots.size))
    small = Image.frombytes("P", image.size, places.tobytes())
    small.putpalette(firsts.getpalette() or [])
    return small


def _cell(value: Any) -> str:
    """A value of a figure's data in a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- the tables


def _stages(report: Report) -> list[dict[str, Any]]:
    """A row for each stage, numbers as text, what it comes to in words."""
    depth, rows = Depth.of(report), []
    for place, stage in enumerate(report.stages):
        error = stage.arrival_error if depth.junction[place] else stage.local_error
        rows.append(
            {
                "name": stage.name,
                "reference": stage.reference,
                "module": stage.module,
                "drift": as_number(stage.drift),
                "error": as_number(error) + (" on arrival" if depth.junction[place] else ""),
                "times": "–" if math.isnan(depth.excess[place]) else as_times(depth.excess[place]),
                "wrong": bool(depth.wrong[place] or depth.broken[place]),
                "finding": _finding(report, depth, place),
            }
        )
    return rows


def _finding(report: Report, depth: Depth, place: int) -> str:
    name = depth.names[place]
    causes = [one.words for one in report.known_differences if name in one.explains]
    if depth.broken[place]:
        return "FAULT: not a number"
    if depth.wrong[place]:
        what = "does not arrive as in LAVIS" if depth.junction[place] else "more than rounding"
        return f"FAULT: {what}{f' ({causes[0]})' if causes else ''}"
    if depth.unjudged[place]:
        return f"NOT JUDGED: its float64 run failed ({report.stages[place].referee_error})"
    own = depth.arrival_error if depth.junction[place] else depth.local_error
    return "bit-equal" if own[place] == 0 else "rounding alone"


_DONE = {
    "Rename": "renamed",
    "FuseQueryValueBias": "fused",
    "InterpolatePositions": "interpolated",
    "Tied": "tied",
    "Drop": "left out",
    "Unused": "not used",
}


def _names(rows: Sequence[tuple[tuple[str, ...], str, str, tuple[int, ...], str]]) -> dict[str, Any]:
    """The rows of the table of names, and how many there are of each operation."""
    shown = [
        (sources, target or "–", _DONE.get(kind, kind), " × ".join(map(str, shape)) or "–", file or "–")
        for sources, target, kind, shape, file in rows
    ]
    done = [row[2] for row in shown]
    return {"rows": shown, "operations": {word: done.count(word) for word in dict.fromkeys(done)}}
