"""Many images and texts: each stage on every take, and what all of them say together: the median, the worst, and whose.

A *take* is one image with one text. A recording of the demo's inputs has one take that is recorded and several images
that are captioned; one of chosen inputs has every take recorded. The first take is the one that a report's other parts
are about.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blip2nb.families.captioners import configuration, huggingface
from blip2nb.families.captioners.lavis import in_batches
from blip2nb.families.captioners.recording import Captioned, ShownTake, Step, recording
from blip2nb.proof import evidence
from blip2nb.report import schema
from blip2nb.trace.comparison import compare
from blip2nb.trace.diagnosis.known import AttributeDifference
from blip2nb.trace.diagnosis.repairs import repaired
from blip2nb.trace.metrics import FEW, compare_logits, kl_per_position
from blip2nb.trace.results import Comparison, StageResult
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image

    from blip2nb.trace.stage import Stage
    from blip2nb.trace.tape import Tape

Arrays = dict[str, np.ndarray]


# -- what is shown


def shown(tape: Tape, images: Sequence[Image]) -> tuple[list[Image], list[str]]:
    """The image and the prompt of every caption in a recording.

    Args:
        images: the recording's, each once.
    """
    told = recording(tape)
    takes = told.get("takes")
    if takes is None:
        return list(images), [told["prompt"]] * len(images)
    return [images[take["picture"]] for take in takes], [take["prompt"] for take in takes]


def caption(loaded: huggingface.Loaded, images: Sequence[Image], prompts: Sequence[str], **options: Any) -> Captioned:
    """`huggingface.caption` of each image behind its own prompt, a few at a time, as LAVIS's were made."""

    def made(prompt: str, numbers: list[int]) -> Captioned:
        return huggingface.caption(loaded, [images[number] for number in numbers], prompt, **options)

    captions: Captioned = in_batches(prompts, made)
    return captions


def _image(tape: Tape, number: int) -> Image:
    from PIL import Image as PIL

    return PIL.open(io.BytesIO(tape[f"image.{number}"].numpy().tobytes())).convert("RGB")


# -- what is measured


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model on one take.

    Attributes:
        stages: in the order of the network.
        faults: names of those where more than rounding happens.
        unjudged: names of those that could not be judged, since their float64 run failed.
        logits: as `compare_logits` gives them.
        rounding: what the logits are off in any case, where the two models' happen to be equal.
        kl, max_abs, same: of each position's next token: KL divergence in nats, the largest difference of a logit, and
            whether the likeliest is the same. (positions,) each.
    """

    stages: tuple[StageResult, ...]
    faults: tuple[str, ...]
    unjudged: tuple[str, ...]
    logits: Mapping[str, float]
    kl: np.ndarray
    max_abs: np.ndarray
    same: np.ndarray
    rounding: float = 0.0

    @classmethod
    def of(cls, found: Comparison, expected: torch.Tensor) -> Measured:
        """Of a comparison, with the reference's logits: (1, positions, vocabulary)."""
        ours = found.outputs["logits"]
        positions = np.full(expected.shape[1], np.nan, np.float32)
        each = (positions,) * 3
        if ours.shape == expected.shape:
            same = ours[0].argmax(-1) == expected[0].argmax(-1)
            apart = (ours - expected)[0].abs().amax(-1)
            each = (kl_per_position(ours, expected).float().numpy(), apart.numpy(), same.float().numpy())
        faults = tuple(stage.name for stage in found.faults)
        unjudged = tuple(stage.name for stage in found.unjudged)
        rounding = FEW * expected.abs().max().item()
        return cls(found.stages, faults, unjudged, compare_logits(ours, expected), *each, rounding)

    @property
    def error(self) -> float | None:
        """How far the logits are off by rounding alone; None where that is not known, or not a number."""
        largest = self.logits["max_abs"]
        known = not self.faults and not self.unjudged and math.isfinite(largest)
        return max(largest, self.rounding) if known else None


@dataclasses.dataclass(frozen=True)
class Take:
    """What was measured on one take.

    Attributes:
        shipped: the model as it is.
        fixed: with the known differences taken out; None where there was no fault to take out.
        pixels_equal: whether both models were shown the same pixels, bit for bit.
    """

    shipped: Measured
    fixed: Measured | None
    pixels_equal: bool

    @property
    def left(self) -> tuple[str, ...]:
        """Stages at fault that no known difference explains."""
        return (self.fixed or self.shipped).faults

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Stages that could not be judged, as shipped or with the known differences taken out."""
        again = self.fixed.unjudged if self.fixed else ()
        return tuple(dict.fromkeys(self.shipped.unjudged + again))


def measure(
    loaded: huggingface.Loaded,
    variant: Variant,
    tape: Tape,
    table: Sequence[Stage],
    differences: Sequence[AttributeDifference],
    first: tuple[Comparison, Comparison | None],
    say: Callable[[str], None],
) -> list[Take]:
    """Compare every take that was recorded, one in memory at a time.

    Args:
        differences: the known ones, which are taken out to see whether a fault goes with them.
        first: the first take's comparisons, as shipped and with these taken out, made already.
        say: told which take is on.
    """
    expected = tape[table[-1].reference]
    shipped = [Measured.of(first[0], expected)]
    fixed = [None if first[1] is None else Measured.of(first[1], expected)]
    equal = [_pixels_equal(loaded, variant, tape, 0)]
    count = tape.takes
    for number in range(1, count):
        say(f"take {number + 1} of {count}")
        shipped.append(_run(loaded, variant, tape, table, number))
        equal.append(_pixels_equal(loaded, variant, tape, number))
    with repaired(loaded.model, list(differences)):
        for number in range(1, count):
            again = differences and shipped[number].faults
            say(f"counter-test of take {number + 1}" if again else f"take {number + 1}")
            fixed.append(_run(loaded, variant, tape, table, number) if again else None)
    return [Take(*one) for one in zip(shipped, fixed, equal, strict=True)]


def _run(loaded: huggingface.Loaded, variant: Variant, tape: Tape, table: Sequence[Stage], number: int) -> Measured:
    recorded = tape.take(number)
    inputs = _inputs(loaded, variant, tape, number)
    found = compare(recorded, loaded.model, table, inputs, explain=False)
    return Measured.of(found, recorded[table[-1].reference])


def _inputs(loaded: huggingface.Loaded, variant: Variant, tape: Tape, number: int) -> dict[str, Any]:
    told = recording(tape)
    shown = [(take["picture"], take["texts"]) for take in told.get("takes", [])] or [(0, told["texts"])]
    picture, texts = shown[number]
    return huggingface.forward_inputs(loaded, variant, _image(tape, picture), texts)


def _pixels(tape: Tape, number: int) -> torch.Tensor:
    return tape[f"take.{number}/pixel_values" if number else "pixel_values"]


def _pixels_equal(loaded: huggingface.Loaded, variant: Variant, tape: Tape, number: int) -> bool:
    ours = _inputs(loaded, variant, tape, number)["pixel_values"]
    return torch.equal(ours.cpu(), _pixels(tape, number))


# -- captions that part where nothing can be told


def errors(takes: Sequence[Take], tape: Tape, fixed: bool = False) -> list[float | None]:
    """How far rounding alone moves the logits of each caption's take; None where there is more than rounding.

    Those of images that were only captioned go by the first take.

    Args:
        fixed: of the model with the known differences taken out.
    """
    captions = len(recording(tape)["captions"]["greedy"]["ids"])
    own = [((take.fixed if fixed else None) or take.shipped).error for take in takes]
    return own if len(own) == captions else own[:1] * captions


def ties(
    loaded: huggingface.Loaded,
    images: Sequence[Image],
    prompts: Sequence[str],
    theirs: Captioned,
    ours: Captioned,
    errors: Sequence[float | None],
) -> list[bool]:
    """Which captions differ only because two were as good as one another, so that rounding chose.

    Greedily: at the first token that differs each model's choice is the other's runner-up, and for both the margin is
    less than twice the error of the logits, so that either could have chosen either. That error is of the forward
    pass, and not of the step itself: there it is always large enough to account for the choice, also where it is no
    rounding. With beams, whose scores the recording does not hold, both captions are scored by the model at hand: a
    token's log-probability is off by twice the logits' error at most, and captions closer than that, over all their
    tokens, cannot be ranked. A caption that a beam lost half way, by a tie there, is not found so and stays different.

    Args:
        theirs, ours: captions, greedy ones with their `steps`.
        errors: per caption, from `errors`. Where it is None nothing is a tie.
    """
    found = []
    for number, (a, b, error) in enumerate(zip(theirs["ids"], ours["ids"], errors, strict=True)):
        if a == b or error is None:
            found.append(False)
        elif "steps" in ours:
            found.append(_even(theirs["steps"][number], ours["steps"][number], 2 * error))
        else:
            given = loaded, images[number], prompts[number]
            found.append(abs(score(*given, a) - score(*given, b)) < 2 * error * (len(a) + len(b)))
    return found


def _even(theirs: Sequence[Step], ours: Sequence[Step], margin: float) -> bool:
    """Whether two ladders part where, for both models, the other's choice was as likely to within a margin in nats."""
    for (token, chosen, second, least), (other, ours_chosen, ours_second, ours_least) in zip(
        theirs, ours, strict=False
    ):
        if token != other:
            swapped = second == other and ours_second == token
            return swapped and chosen - least < margin and ours_chosen - ours_least < margin
    return False


def score(loaded: huggingface.Loaded, image: Image, prompt: str, ids: Sequence[int]) -> float:
    """The log-probability, in nats, that the model gives a caption behind a prompt: of all its tokens together."""
    inputs = dict(loaded.processor(images=image, text=prompt, return_tensors="pt").to(loaded.model.device))
    said = torch.tensor([list(ids)], device=loaded.model.device)
    if loaded.model.language_model.config.is_encoder_decoder:
        inputs["labels"] = said
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], said[:, :-1]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = loaded.model(**inputs, use_cache=False).logits[:, -len(ids) :]
    return logits.double().log_softmax(-1).gather(-1, said[..., None]).sum().item()


# -- what all of them say


def summary(
    loaded: huggingface.Loaded, variant: Variant, tape: Tape, takes: Sequence[Take], captions: schema.Captions
) -> tuple[schema.Images, Arrays]:
    """report.json's `images`, and the arrays that go with it.

    Args:
        tape: of chosen inputs.
        captions: the report's own.
    """
    about = recording(tape)
    told = [_told(take) for take in about["takes"]]
    skipped = tuple(schema.Skipped(**one) for one in about["skipped"])
    content = dataclasses.replace(aggregate(told, takes, captions.modes), skipped=skipped)
    number = content.worst.take
    recorded = tape.take(number)
    tokens = evidence.sequences(loaded, variant, recorded, _inputs(loaded, variant, tape, number))
    worst = dataclasses.replace(
        content.worst,
        lavis=captions.lavis["greedy"][number],
        transformers=captions.huggingface["greedy"][number],
        tokens=list(tokens.values())[-1],
    )
    content = dataclasses.replace(content, worst=worst)
    return content, _arrays(takes) | {"images/worst": _visible(recorded["pixel_values"])}


@dataclasses.dataclass(frozen=True)
class Told:
    """What a take is of: image and text, the caption's prompt, and what the image's file is."""

    image: str
    text: str
    prompt: str
    size: tuple[int, ...]
    mode: str


def _told(take: ShownTake) -> Told:
    name = PurePath(take["image"]).name
    return Told(name, take["texts"]["text_input"][0], take["prompt"], tuple(take["size"]), take["mode"])


def aggregate(told: Sequence[Told], takes: Sequence[Take], modes: Mapping[str, schema.Decoding]) -> schema.Images:
    """What is said of all takes: for each stage and each measure of the logits the median, the worst and whose it is.

    Args:
        told: what each take is of.
    """
    each = [_each(*one, modes, number) for number, one in enumerate(zip(told, takes, strict=True))]
    names = [one.image for one in each]
    worst = max(range(len(takes)), key=lambda number: _rank(each[number]))

    def logits(what: str) -> schema.Spread | None:
        return spread([take.shipped.logits[what] for take in takes], names, least=what == "top1_agreement")

    return schema.Images(
        skipped=(),
        count=len(set(names)),
        names=tuple(dict.fromkeys(names)),
        texts=tuple(dict.fromkeys(one.text for one in each)),
        each=tuple(each),
        stages=_stages(takes, names),
        logits=schema.LogitSpreads(
            logits("max_abs"), logits("relative"), logits("kl"), top1_agreement=logits("top1_agreement")
        ),
        captions={mode: _agreement(said) for mode, said in modes.items()},
        explained=tuple(name for name in _in_order(takes) if not any(name in take.left for take in takes)),
        left=tuple(name for name in _in_order(takes) if any(name in take.left for take in takes)),
        problem=_problem(each),
        worst=schema.Worst(worst, names[worst], each[worst].text, _why(each[worst]), "", "", ()),
    )


def _each(told: Told, take: Take, modes: Mapping[str, schema.Decoding], number: int) -> schema.Take:
    logits = take.shipped.logits
    return schema.Take(
        image=told.image,
        text=told.text,
        prompt=told.prompt,
        size=told.size,
        mode=told.mode,
        pixels_equal=take.pixels_equal,
        faults=take.shipped.faults,
        left=take.left,
        unjudged=take.unjudged,
        max_abs=logits["max_abs"],
        relative=logits["relative"],
        kl=logits["kl"],
        top1_agreement=logits["top1_agreement"],
        kl_largest=max((_badness(value) for value in take.shipped.kl.tolist()), default=0.0),
        captions_equal={mode: said.equal[number] for mode, said in modes.items()},
        ties=tuple(mode for mode, said in modes.items() if said.ties[number]),
    )


def _badness(value: float | None) -> float:
    """A distance for ranking: what is not a number is worse than any."""
    return math.inf if value is None or math.isnan(value) else abs(value)


def _rank(one: schema.Take) -> tuple[bool, bool, bool, float]:
    parted = not one.captions_equal["greedy"] and "greedy" not in one.ties
    return not one.pixels_equal, bool(one.left), parted, _badness(one.kl)


def _why(one: schema.Take) -> str:
    unequal, left, parted, _ = _rank(one)
    if unequal:
        return "its pixels differ"
    if left:
        return f"first wrong at {one.left[0]}"
    return "its captions differ" if parted else "its logits are furthest apart"


def _problem(each: Sequence[schema.Take]) -> str | None:
    """The sentence for a verdict where some take is wrong in a way that no known difference explains."""
    unequal = [one for one in each if not one.pixels_equal]
    left = [one for one in each if one.left]
    if unequal:
        return f"The pixel values of {unequal[0].image} differ from LAVIS's ({_of(unequal, each)})."
    return f"First wrong at {left[0].left[0]} on {left[0].image} ({_of(left, each)})." if left else None


def _of(some: Sequence, each: Sequence) -> str:
    return f"{len(some)} of {len(each)} images and texts"


def _in_order(takes: Sequence[Take]) -> list[str]:
    """The stages that are at fault on some take, in the order of the network."""
    wrong = {name for take in takes for name in take.shipped.faults + take.left}
    return [stage.name for stage in takes[0].shipped.stages if stage.name in wrong]


def _stages(takes: Sequence[Take], names: Sequence[str]) -> dict[str, schema.StageSpread]:
    out: dict[str, schema.StageSpread] = {}
    for number, stage in enumerate(takes[0].shipped.stages):
        shipped = _spreads([take.shipped.stages[number] for take in takes], names)
        again = _spreads([take.fixed.stages[number] if take.fixed else None for take in takes], names)
        out[stage.name] = schema.StageSpread(
            shipped.arrival_error,
            shipped.drift,
            shipped.local_error,
            shipped.excess,
            faulty=sum(stage.name in take.shipped.faults for take in takes),
            left=sum(stage.name in take.left for take in takes),
            fixed=again,
        )
    return out


def _spreads(results: Sequence[StageResult | None], names: Sequence[str]) -> schema.Spreads:
    def of(what: str) -> schema.Spread | None:
        return spread([getattr(one, what, None) for one in results], names)

    return schema.Spreads(of("arrival_error"), of("drift"), of("local_error"), of("excess"))


def spread(values: Sequence[float | None], names: Sequence[str], least: bool = False) -> schema.Spread | None:
    """The median of what was measured, the worst of it, and whose that is; None where nothing was.

    Args:
        names: the image of each value.
        least: the smallest is the worst, not the largest. What is not a number is worse than either.
    """
    measured = [(number, value) for number, value in enumerate(values) if value is not None]
    if not measured:
        return None
    bad = {number: math.inf if math.isnan(value) else -value if least else value for number, value in measured}
    worst = max(bad, key=lambda number: bad[number])
    middle = float(np.median(list(bad.values())))
    return schema.Spread(-middle if least else middle, values[worst], worst, names[worst])


def _agreement(said: schema.Decoding) -> schema.CaptionCount:
    different = [number for number, equal in enumerate(said.equal) if not equal]
    return schema.CaptionCount(
        of=len(said.equal),
        equal=len(said.equal) - len(different),
        different=tuple(different),
        ties=tuple(number for number in different if said.ties[number]),
    )


def _arrays(takes: Sequence[Take]) -> Arrays:
    """`images/kl`, `images/max_abs`, `images/same`: (takes, positions), NaN behind the end of a shorter text; and
    `images/excess`, `images/drift`: (takes, stages), NaN where nothing is measured."""
    longest = max(len(take.shipped.kl) for take in takes)
    out = {}
    for name in ("kl", "max_abs", "same"):
        rows = [getattr(take.shipped, name) for take in takes]
        out[f"images/{name}"] = np.stack([np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows])
    for name in ("excess", "drift"):
        rows = [[getattr(stage, name) for stage in take.shipped.stages] for take in takes]
        out[f"images/{name}"] = np.array(rows, dtype=np.float32)
    return out


def _visible(pixels: torch.Tensor) -> np.ndarray:
    """What both models saw, as an image again: (1, 3, side, side) to (side, side, 3) uint8."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (configuration.IMAGE_STD, configuration.IMAGE_MEAN))
    return ((pixels[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy().copy()
