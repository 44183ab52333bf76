"""The verdict: a pure function of what was measured, and of what is missing."""

from __future__ import annotations

import dataclasses

from blip2nb.report import schema
from blip2nb.report.schema import Content, Missing
from blip2nb.trace.results import faulty
from blip2nb.weights.convert import LOSSY

# -- what is missing


def not_proven(content: Content) -> list[Missing]:
    """Weights that there was nothing to compare with."""
    weights = _weights(content)
    names = weights.unproven
    if not names:
        return []
    if weights.dtype in LOSSY:
        words = f"The weights were cast to {weights.dtype}, and their source is not here to be compared with them."
    else:
        said = f"{names[0]} was computed anew and has no way back"
        more = f" ({len(names)} such tensors)" if len(names) > 1 else ""
        words = f"{said}{more}; neither the source nor a recording of LAVIS gave the same tensor."
    return [Missing("weights", "weights", words)]


def not_judged(content: Content) -> list[Missing]:
    """Stages, images and captions of which rounding could not be told from a fault."""
    out = []
    stages = {one.name: why for one in content.stages if (why := _why_not_judged(one)) is not None}
    if stages:
        some = ", ".join(f"{name} ({why})" for name, why in [*stages.items()][:3])
        more = f" and {len(stages) - 3} more" if len(stages) > 3 else ""
        words = f"{len(stages)} of {len(content.stages)} stages are not judged, since their float64 run failed: "
        out.append(Missing("stages", "behaviour", f"{words}{some}{more}."))
    images = content.images
    others = [one for one in images.each[1:] if one.unjudged] if images else []
    if images and others:
        words = f"On {len(others)} of {len(images.each)} images and texts a stage is not judged, since its float64"
        first = f"{others[0].unjudged[0]} on {others[0].image}"
        out.append(Missing("images", "behaviour", f"{words} run failed: {first}."))
    captions = content.captions
    if out and captions and not captions.equal and captions.equal_when_fixed is not True:
        words = "Captions differ, and while stages are not judged, nothing tells whether rounding alone chose them."
        out.append(Missing("captions", "text", words))
    return out


def _why_not_judged(stage: schema.Stage) -> str | None:
    """What ended the float64 run of a stage that is not judged, as it ships or with the known differences fixed."""
    for one in (stage, stage.fixed):
        if one and not one.refereed and one.excess is None:
            return one.referee_error
    return None


# -- the verdict


def judge(content: Content) -> Content:
    """The report with match, explained, diverges or incomplete, the causes, and the sentence a person reads. A fault
    stays one, whatever is missing; without one, what is missing counts."""
    answer = _of_what_was_compared(content)
    if answer.verdict == "diverges" or not content.incomplete:
        return answer
    first = answer.summary if content.proof == "weights" else "No fault was found, but not everything was judged."
    words = " ".join([first, *(one.words for one in content.incomplete)])
    return dataclasses.replace(answer, verdict="incomplete", summary=words)


def _of_what_was_compared(content: Content) -> Content:
    """The verdict that what was run and judged would give by itself."""
    weights = _weights(content)
    problems = (
        [f"{name} is missing" for name in weights.missing]
        + [f"{name} does not belong to the model" for name in weights.unexpected]
        + [f"{name} has another shape" for name in weights.misshapen]
        + [*weights.roundtrip_differences, *weights.modules_different]
    )
    weights_fine = not problems and weights.roundtrip is not False and weights.modules_equal is not False
    if not weights_fine:
        sentence = f"The weights are not the source's: {problems[0]} ({len(problems)} in all)."
        if "attribute" in _causes_of(content):  # nothing was compared: it does not load
            sentence = f"config.json was changed and does not fit the weights: {problems[0]} ({len(problems)} in all)."
        return _answer(content, "diverges", _causes_of(content), f"{sentence} {_first_words(content)}".strip())
    if content.proof == "weights":
        cast = f", cast to {weights.dtype} on request and so with no way back"
        back = " and go back bit for bit" if weights.roundtrip else cast
        return _answer(content, "match", [], f"All {weights.written} tensors are accounted for{back}.")
    if content.faults:
        return _answer(content, "diverges", _causes_of(content), _first_words(content))
    return _of_behaviour(content)


def _of_behaviour(content: Content) -> Content:
    """Where the weights are right and nothing known is at fault."""
    pixels, captions, logits, images = content.pixel_values, content.captions, content.logits, content.images
    if pixels is None or captions is None or logits is None:
        raise ValueError("A model without a fault was run to its end.")
    if not pixels.equal:
        words = "The pixel values differ from LAVIS's: look at the image processor first."
        return _answer(content, "diverges", [], words)
    causes = [one.id for one in content.known_differences if one.explains and one.stage != "captions"]
    if images and images.problem:
        return _answer(content, "diverges", causes, images.problem)
    faults = [one for one in content.stages if faulty(one.arrival_error, one.excess, content.threshold)]
    if content.computed_in != "float32":
        sentence = f"Every layer agrees with LAVIS's float32 to the rounding of {content.computed_in}"
        same = "the captions are the same" if captions.equal else "some captions differ, as rounding alone can do"
        return _answer(content, "explained" if faults else "match", causes, f"{sentence}; {same}.")
    cannot_tell = any(one.id == "captions" for one in content.incomplete)
    if not captions.equal and captions.equal_when_fixed is not True and not cannot_tell:
        words = "Every layer agrees, but the captions do not: look at generation's settings."
        return _answer(content, "diverges", causes, words)
    if not faults and captions.equal and not (images and images.explained):
        words = "The same model: every layer agrees with LAVIS to rounding, and so do the captions."
        return _answer(content, "match", [], words)
    agreed = [logits.top1_agreement, *(one.top1_agreement for one in (images.each if images else ()))]
    safe = captions.equal and all(one == 1.0 for one in agreed)
    effect = f"It changes the logits by {_share(logits)} of their size ({_share(logits.fixed)} without it)"
    advice = "no caption: safe to ship as it is" if safe else "and some captions: apply the fix"
    known = next((one for one in content.known_differences if one.stage != "captions"), None)
    if known is None:  # captions that nobody can judge: what is missing is said instead
        return _answer(content, "match", [], "Every layer that was judged agrees with LAVIS to rounding.")
    sentence = f"The same model but for one known cause: {cause_words(known)}. {effect} and {advice}."
    return _answer(content, "explained", causes or [known.id], sentence)


def _weights(content: Content) -> schema.Weights:
    if content.weights is None:
        raise ValueError("Every proof has one of the weights.")
    return content.weights


def _share(logits: schema.Logits | schema.Agreement | None) -> str:
    return "nan" if logits is None or logits.relative is None else f"{logits.relative:.1e}"


def cause_words(known: schema.KnownDifference) -> str:
    """A known difference with its two values."""
    return f"{known.words}: LAVIS {known.lavis}, transformers {known.transformers}"


def _causes_of(content: Content) -> list[str]:
    """The likeliest cause of each fault, each named once."""
    return list(dict.fromkeys(fault.causes[0].id for fault in content.faults if fault.causes))


def _first_words(content: Content) -> str:
    """Where it first goes wrong and why, and how many faults there are; "" where none was looked for."""
    first, count = content.first_divergence, len(content.faults)
    if first is None or not count:
        return ""
    more = f" ({count} faults in all)" if count > 1 else ""
    return f"First wrong at {first.stage}, in {first.module}: {first.cause}{more}."


def _answer(content: Content, verdict: str, causes: list[str], summary: str) -> Content:
    return dataclasses.replace(content, verdict=verdict, causes=tuple(causes), summary=summary)
