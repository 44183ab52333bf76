"""README.md of a converted directory: what the hub shows of it, with the verdict once there is one.

The words and the order are the template's (card.md.j2); what is computed for it is here.
"""

from __future__ import annotations

import contextlib
import io
import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.conversion.hub import FIGURE, README, is_edited, sign
from blip2nb.display import text
from blip2nb.forms import there
from blip2nb.report.manifest import Manifest
from blip2nb.report.schema import Content, Reference
from blip2nb.variants import Variant, variant
from blip2nb.whole import whole_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from blip2nb.display.figures.style import Picture
    from blip2nb.report.runs import RunPaths
    from blip2nb.report.store import ReportData

log = logging.getLogger("blip2nb")

_MOST_PROBLEMS = 10  # chosen: a card is read by people who want the model; the report has them all
_ACROSS = 896  # dots. Chosen: about as wide as the hub shows a card; the file grows with it


def write(run: RunPaths, figure: Picture | None = None, report: ReportData | None = None) -> bool:
    """Write the card of a run's model, and its figure where its report has one: whole, or not at all.

    Args:
        figure: the report's depth trace, if it is drawn already.
        report: the run's, if it is in memory already.

    Returns:
        Whether it was. A card that was edited stays as it is, and a directory that cannot be written to does too.
    """
    manifest = Manifest.read(run.model)
    if is_edited(run.model):
        log.info("%s was edited and stays as it is", run.model / README)
        return False
    if report is None and (run.folder / "report.json").is_file():
        report = run.report
    if report is not None and there(report.content.provenance).weights_hash != manifest.weights_hash:
        report = None  # of another model
    wanted = {README: render(manifest, report).encode()}
    if report is not None and (picture := _figure(report, figure)) is not None:
        wanted[FIGURE] = picture
    try:
        _put(run.model, wanted)
        if FIGURE not in wanted:
            (run.model / FIGURE).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s was not written (%s); the model is as it was", run.model / README, error.strerror or error)
        return False
    return True


def _put(folder: Path, wanted: dict[str, bytes]) -> None:
    with contextlib.ExitStack() as files:  # all are written before one of them replaces anything
        for name, content in reversed(wanted.items()):  # left in the other order: the card is the first in its place
            files.enter_context(whole_file(folder / name)).write_bytes(content)


def _figure(report: ReportData, picture: Picture | None) -> bytes | None:
    """The depth trace as a PNG of few colours; None where there is nothing to draw."""
    from PIL import Image

    from blip2nb.display import plots

    if "depth_trace" not in plots.available(report.content, report.arrays):
        return None
    drawn = picture or plots.FIGURES["depth_trace"](report.content, report.arrays)
    with Image.open(io.BytesIO(drawn._repr_png_()[0])) as image:
        small = image.resize((_ACROSS, round(_ACROSS * image.height / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # 256: all that a palette of PNG holds
    small.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def render(manifest: Manifest, report: ReportData | None = None) -> str:
    """The card as Markdown with its metadata, signed.

    Args:
        manifest: of the converted directory.
        report: of its verification; without one the card says that there was none, and how to make it.
    """
    from huggingface_hub import ModelCard

    found = report.content if report is not None else None
    template = (resources.files("blip2nb.display") / "card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(metadata(manifest), template_str=template, **_content(manifest, found, report))
    return sign(str(card).rstrip("\n") + "\n")


def metadata(manifest: Manifest) -> ModelCardData:
    """The card's metadata. The licence is left to the owner: it depends on what the model was trained on."""
    from huggingface_hub import ModelCardData

    released, tuned = variant(manifest.model), bool(_trained(manifest))
    tags = ["blip-2", "image-captioning", "lavis", "blip2nb", *(["random-weights"] if released.twin else [])]
    derived = tuned and not released.twin
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language=None if tuned or released.twin else "en",
        tags=tags,
        base_model=f"Salesforce/{released.name}" if derived else None,
        base_model_relation="finetune" if derived else None,
    )


def _trained(manifest: Manifest) -> list[str]:
    """The checkpoints that are not the released one: what somebody fine-tuned."""
    return [name for name in manifest.checkpoints if name != variant(manifest.model).checkpoint]


def _content(manifest: Manifest, found: Content | None, report: ReportData | None) -> dict[str, Any]:
    """What the template asks for. Names and hashes only: a card travels, and paths of this machine do not."""
    model, trained = manifest.variant, _trained(manifest)
    told = found or _untold(manifest)
    behaviour = found is not None and found.proof == "both"
    return {
        "model": model,
        "title": f"{model.name}, fine-tuned (`{_cell(trained[-1])}`)" if trained else model.name,
        "trained": bool(trained),
        "dtype": manifest.dtype,
        "report": found,
        "behaviour": behaviour,
        "verdict_words": text.VERDICTS[found.verdict] if found else "",
        "faults": _lines_of_faults(found) if found else [],
        "usage": text.program(told),
        "fixes": [one for one in told.known_differences if one.stage != "captions"],
        "known": told.known_differences,
        "commands": text.commands(told),
        "completion": text.completion(found) if found else "",
        "made_from": _made_from(manifest, model),
        "files": _files(manifest),
        "written": [(_cell(name), one.bytes, one.hash) for name, one in manifest.shards.items()],
        "weights_hash": manifest.weights_hash,
        "numbers": [(label, _cell(value)) for label, value in text.numbers(found)] if found else [],
        "versions": _versions(manifest, found),
        "licence": _LICENCES[model.language.kind],
        **_seen(report),
    }


def _seen(report: ReportData | None) -> dict[str, Any]:
    """What needs the figures' modules, which an unverified card does without."""
    if report is None:
        return {"alt": "", "figure": FIGURE, "meaning": [], "problems": []}
    from blip2nb.display import page, plots

    alt = ""
    if "depth_trace" in plots.available(report.content, report.arrays):
        alt = " ".join(plots.alt_text("depth_trace", report.content, report.arrays).translate(_PLAIN).split())
    problems = page.problems(there(report.content.weights))[:_MOST_PROBLEMS]
    return {"alt": alt, "figure": FIGURE, "meaning": page.meaning(report.content), "problems": problems}


_PLAIN = str.maketrans({"[": "(", "]": ")", "\\": "/"})
"""What would end or change the text of a picture in Markdown."""


def _untold(manifest: Manifest) -> Content:
    """What a report would say of the conversion alone, for the parts of it that the card shares with report.html."""
    made = manifest.provenance("", Reference("", "", "", {}, {}))  # so that the command is the whole proof
    return Content(model_name=manifest.variant.name, provenance=made)


def _lines_of_faults(found: Content) -> list[str]:
    from blip2nb.display.faults import Faults

    return Faults(found).lines() if found.faults else []


def _made_from(manifest: Manifest, model: Variant) -> list[tuple[str, str]]:
    dtype = {"auto": "each tensor's own, as in LAVIS's files"}.get(manifest.dtype, f"cast to {manifest.dtype}")
    return [
        ("released model", f"`{model.name}`: LAVIS's `{model.lavis_class}`, `{model.lavis_type}`"),
        ("checkpoint", ", over ".join(f"`{_cell(name)}`" for name in reversed(manifest.checkpoints)) or "–"),
        ("language model", f"`{model.language_model}`"),
        ("image size", f"{model.image_size} × {model.image_size} pixels"),
        ("prompt", f"`{model.prompt}`" if model.prompt else "none: LAVIS captions without one"),
        ("dtype", dtype),
        ("parameters read", f"{len(manifest.parameters)}"),
        ("hash of the weights", f"`{manifest.weights_hash}`"),
    ]


def _files(manifest: Manifest) -> list[tuple[str, int, int]]:
    """(name, bytes, parameters read from it) of every file that the conversion read."""
    origins = list(manifest.origins.values())
    return [(_cell(one.name), one.size, origins.count(one.name)) for one in manifest.files]


def _versions(manifest: Manifest, found: Content | None) -> list[tuple[str, str]]:
    """(what was done, with what)."""
    kit = {name: manifest.recipe[name] for name in ("blip2nb", "transformers") if name in manifest.recipe}
    done = {"converted with": {**kit, **manifest.versions}}
    names = {"checked with": "checked with", "reference": "LAVIS recorded with"}
    for key, words in names.items():
        if found is not None and key in found.versions:
            done[words] = dict(found.versions[key])
    return [(words, ", ".join(f"{name} {version}" for name, version in found.items())) for words, found in done.items()]


def _cell(value: Any) -> str:
    """A text in a table of Markdown, or in code within one."""
    return " ".join(str(value).split()).replace("|", "¦").replace("`", "'")


_LICENCES = {"opt": "other", "t5": "apache-2.0"}
"""The hub's names for what the language models come under."""
