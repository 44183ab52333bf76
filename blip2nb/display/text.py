"""A run in words, for terminals and notebooks. Plain language: the terms are those of the README's glossary."""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.display import captions
from blip2nb.display.faults import Faults, number
from blip2nb.forms import there
from blip2nb.report.schema import Content, Stage
from blip2nb.variants import variant

if TYPE_CHECKING:
    from blip2nb.report.runs import RunPaths

VERDICTS = {
    "match": "the same model",
    "explained": "the same model, but for a known difference",
    "diverges": "not the same model",
    "incomplete": "not proven in full",
}


def describe(run: RunPaths) -> str:
    """The verdict, the numbers behind it, and where things are. Raises RequestError when there is no report."""
    report = run.report.content
    lines = [f"{report.model_name}: {report.verdict} ({VERDICTS[report.verdict]})", "", report.summary, ""]
    lines += [f"  {label:<22}{value}" for label, value in numbers(report)]
    if report.faults:
        lines += ["", f"What goes wrong, and the likely cause ({len(report.faults)} in all)"]
        lines += [f"  {line}" for line in Faults(report).lines()]
    if parted := captions.parted_lines(report):
        lines += ["", "Where the captions part, decoded greedily", *(f"  {line}" for line in parted)]
    here = run.model.is_dir()
    again = "" if here else ", once it is converted again (the converted model was removed)"
    if report.incomplete:
        lines += ["", "What is missing", *(f"  {one.words}" for one in report.incomplete)]
    if report.complete_with:
        lines += ["", f"To complete the proof{where(report)}{again}:", f"  {report.complete_with}"]
    for known in report.known_differences:
        lines += ["", f"{known.words} ({known.id})", f"  {known.why}", f"  remedy: {known.fix}"]
    lines += ["", f"To caption as LAVIS does{again}"]
    lines += [f"  {line}" for line in usage(there(report.provenance).prompt, run.model)]
    lines += ["", "Where things are"]
    lines += [f"  {label:<10}{path}" for label, path in run.left().items()]
    lines += [] if here else [f"  {'model':<10}removed from {run.model}"]
    return "\n".join(lines)


def usage(prompt: str, folder: Path) -> list[str]:
    """The lines of Python that caption an image with LAVIS's own settings.

    `generate` hands on to the language model, which does not see generation_config.json: the settings are passed.

    Args:
        prompt: what LAVIS puts before the caption of this model.
        folder: the converted directory.
    """
    return [
        f"model = Blip2ForConditionalGeneration.from_pretrained({str(folder)!r})",
        f'processor = AutoProcessor.from_pretrained({str(folder)!r}, backend="pil")',
        f'inputs = processor(images=image, text={prompt!r}, return_tensors="pt")',
        "model.generate(**inputs, num_beams=5, max_new_tokens=30)",
    ]


def program(report: Content) -> str:
    """Python that captions an image with LAVIS's settings, with the known remedies. The folder is named neutrally."""
    load, *rest = usage(there(report.provenance).prompt, Path("model"))
    fixes = [f"{one.fix}  # {one.words}" for one in report.known_differences if one.stage != "captions"]
    head = ["from PIL import Image", "from transformers import AutoProcessor, Blip2ForConditionalGeneration", ""]
    last = [f"ids = {rest[-1]}", "print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())"]
    return "\n".join(
        [*head, load, *fixes, *rest[:-2], 'image = Image.open("photo.jpg").convert("RGB")', rest[-2], *last]
    )


def where(report: Content) -> str:
    """Where the command that completes a proof can run."""
    return ", where LAVIS is installed (`make lavis`)" if report.proof == "weights" else ""


def completion(report: Content) -> str:
    """The commands that complete a proof, without the paths that `complete_with` has; "" where there are none."""
    given = shlex.split(report.complete_with)
    if not given:
        return ""
    named = "".join(f" {option} {value}" for option, value in _GIVEN.items() if option in given)
    if "capture" not in given:
        return f"blip2nb verify RUN --proof both{named}"
    lines = [f"blip2nb capture {report.model_name}{named} --output tape.safetensors",
             "blip2nb verify RUN --tape tape.safetensors"]  # fmt: skip
    return "\n".join(lines)


_GIVEN = {"--source": "YOUR_FILES", "--base": "WHAT_THEY_WERE_TRAINED_FROM"}


def commands(report: Content) -> str:
    """What makes the same model and the same proof from the same files."""
    model, made = variant(report.model_name), there(report.provenance)
    trained = [name for name in made.checkpoints if name != model.checkpoint]
    source = f" --source {shlex.quote(trained[-1])}" if trained else ""
    run = f"{model.name}--{Path(trained[-1]).stem}" if trained else model.name
    dtype = "" if made.dtype == "auto" else f" --dtype {made.dtype}"
    proof = "" if made.reference else " --proof weights"
    return f"blip2nb convert {model.name}{source}{dtype}\nblip2nb verify {shlex.quote(run)}{proof}"


def numbers(report: Content) -> list[tuple[str, str]]:
    """The figures that a reader of the verdict asks for next, as (label, value)."""
    weights = there(report.weights)
    out = [
        (
            "tensors written",
            f"{weights.written}, missing {len(weights.missing)}, unexpected {len(weights.unexpected)}",
        ),
        (
            "way back",
            {True: "bit for bit", False: "NOT the source", None: "lossy, since the weights were cast"}[
                weights.roundtrip
            ],
        ),
    ]
    if report.proof == "weights":
        return out
    logits, pixels, said = there(report.logits), there(report.pixel_values), there(report.captions)
    stages = report.stages
    excess = [stage for stage in stages if stage.excess is not None]
    worst = max(excess, key=lambda stage: stage.excess or 0.0, default=None)
    unjudged = [stage.name for stage in stages if is_unjudged(stage)]
    fixed = [value for stage in excess if stage.fixed and (value := stage.fixed.excess) is not None]
    out += [
        (
            "LAVIS's modules",
            f"{weights.modules_checked} parameters, {'all' if weights.modules_equal else 'NOT'} equal by hash",
        ),
        (
            "pixel values",
            "equal" if pixels.equal else f"differ by {number(pixels.max_abs, '.3g')}",
        ),
    ]
    if worst is not None:
        most = f"{worst.excess:.3g} ({worst.name})"
        out.append(("layers", f"{len(stages)} places, error ÷ its own rounding at most {most}"))
    if unjudged:
        named = ", ".join(unjudged[:3]) + (" …" if len(unjudged) > 3 else "")
        out.append(("layers, not judged", f"{len(unjudged)} of {len(stages)}: {named}"))
    if fixed and not report.faults:
        out.append(("layers, with remedy", f"error ÷ its own rounding between {min(fixed):.2f} and {max(fixed):.2f}"))
    out.append(
        (
            "logits",
            f"relative error {number(logits.relative, '.1e')}, same first token at {logits.top1_agreement:.0%}",
        )
    )
    if logits.fixed is not None:
        out.append(("logits, with remedy", f"relative error {number(logits.fixed.relative, '.1e')}"))
    modes = said.modes
    for mode, label in (
        ("greedy", "captions, greedy"),
        ("beams", "captions, 5 beams"),
        ("default", "LAVIS's own beams"),
    ):
        equal = modes[mode].equal
        out.append((label, f"{sum(equal)} of {len(equal)} equal in every token"))
    return out


def is_unjudged(stage: Stage) -> bool:
    """Check whether a stage could not be judged, since its float64 run failed."""
    return not stage.refereed and stage.excess is None and not stage.bit_equal


def verdict_html(report: Content) -> str:
    """The verdict as a notebook shows it: a heading, the sentence, the faults, the numbers."""
    colour = {"diverges": "#D55E00", "incomplete": "#666666"}.get(report.verdict, "#0072B2")
    rows = "".join(
        f"<tr><th align='left'>{html.escape(label)}</th><td align='left'>{html.escape(value)}</td></tr>"
        for label, value in numbers(report)
    )
    faults = Faults(report)._repr_html_() if report.faults else ""
    completion = ""
    if report.incomplete:
        items = "".join(f"<li>{html.escape(one.words)}</li>" for one in report.incomplete)
        completion = f"<p>What is missing:</p><ul>{items}</ul>"
    if report.complete_with:
        command = html.escape(report.complete_with)
        completion += f"<p>To complete the proof{html.escape(where(report))}:</p><pre>{command}</pre>"
    return (
        f"<div style='border-left:4px solid {colour};padding-left:12px'><strong>{html.escape(report.model_name)}: "
        f"{html.escape(report.verdict)}</strong> ({VERDICTS[report.verdict]})"
        f"<p>{html.escape(report.summary)}</p>{faults}<table>{rows}</table>{captions.as_html(report)}{completion}</div>"
    )


class Note(str):
    """A sentence that shows itself as text in a notebook."""

    def _repr_html_(self) -> str:
        return f"<p><em>{html.escape(self)}</em></p>"
