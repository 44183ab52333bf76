"""Captions: what both models say of the same images, in three ways of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.recording import Step, recording
from blip2nb.proof import evidence, takes
from blip2nb.report import schema
from blip2nb.trace.tape import Tape

if TYPE_CHECKING:
    from PIL.Image import Image

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 5, "length_penalty": 0.0},
    "default": {"num_beams": 5, "length_penalty": 1.0},
}
"""What is captioned, in transformers' words; the same modes as in the recording. Old and new transformers divide a
beam's score by different lengths, so only the first two must agree."""

LONGEST = 30
"""New tokens of a caption at most: what LAVIS's own `generate` has as its default."""


def compare(
    loaded: huggingface.Loaded, tape: Tape, images: Sequence[Image], errors: Sequence[float | None] = ()
) -> schema.Captions:
    """Caption every image in every mode and compare token ids with LAVIS's.

    Args:
        errors: how far rounding moves the logits of each caption's image: `takes.errors`. With it, captions that part
            at a tie are told from those that differ.
    """
    shown, prompts = takes.shown(tape, images)
    recorded = recording(tape)["captions"]
    said: dict[str, tuple[str, ...]] = {}
    modes: dict[str, schema.Decoding] = {}
    steps: list[list[Step]] = []
    for mode, options in MODES.items():
        theirs = recorded[mode]
        ours = takes.caption(loaded, shown, prompts, max_new_tokens=LONGEST, **options)
        judged = errors if errors and mode != "default" else [None] * len(shown)
        steps = ours.get("steps", steps)
        said[mode] = tuple(ours["text"])
        modes[mode] = schema.Decoding(
            equal=tuple(a == b for a, b in zip(ours["ids"], theirs["ids"], strict=True)),
            ties=tuple(takes.ties(loaded, shown, prompts, theirs, ours, judged)),
            lavis_ids=tuple(map(tuple, theirs["ids"])),
            huggingface_ids=tuple(map(tuple, ours["ids"])),
        )
    return schema.Captions(
        prompt=recording(tape)["prompt"],
        lavis={mode: tuple(recorded[mode]["text"]) for mode in MODES},
        huggingface=said,
        modes=modes,
        ladder=evidence.ladder(loaded, recorded["greedy"]["steps"], steps),
        equal=all(
            same or tied
            for one in (modes["greedy"], modes["beams"])
            for same, tied in zip(one.equal, one.ties, strict=True)
        ),
    )


def beam_search(tape: Tape, captions: schema.Captions) -> list[schema.KnownDifference]:
    """The known difference that is in `generate` and not in any module: listed whatever its effect."""
    import transformers

    old, new = recording(tape)["versions"]["transformers"], transformers.__version__
    if int(old.split(".")[0]) >= int(new.split(".")[0]):
        return []
    different = captions.modes["default"].equal.count(False)
    return [
        schema.KnownDifference(
            id="beam_length_normalisation",
            stage="captions",
            module="generate",
            attribute="length_penalty",
            lavis=f"transformers {old}: a beam is scored by the length of prompt and caption, without its end",
            transformers=f"transformers {new}: by the length of the caption alone",
            words="beam search's length normalisation",
            why="LAVIS runs on an old transformers, whose beam search counts the prompt as part of the caption.",
            fix="model.generate(**inputs, num_beams=5, length_penalty=0.0) is the same search in both",
            explains=("captions.default",) if different else (),
            captions_that_differ=different,
        )
    ]
