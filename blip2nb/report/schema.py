"""The form of report.json: all that a verification measured, and what it comes to.

Errors are relative to the norm of LAVIS's value. A number is null where nothing was measured, or what was measured is
not a number, and INFINITE where it is infinite; see `forms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from blip2nb.forms import record

FORMAT = 3
"""The version of report.json. 1 had the verdict weights_only, 2 left out what was not measured."""

Number = float | None
Setting = bool | int | float | str | None | tuple[float, ...]
"""The value of a module's attribute."""


# -- what is missing, and what goes wrong


@record
class Missing:
    """Something that belongs to the proof and was not run, or could not be judged.

    Attributes:
        id: not_asked, no_lavis, no_memory, does_not_load, weights, stages, images or captions.
        proof: the proof that lacks it: weights, behaviour or text.
        words: what is missing and why, as a sentence.
    """

    id: str
    proof: str
    words: str


@record
class CounterTest:
    """What became of the errors at a stage when a cause was put right: each before and after.

    Attributes:
        change: what was done, as the end of a sentence: "with eps 1e-05".
        passed: after it only rounding is left.
    """

    change: str
    local_error: tuple[Number, Number]
    excess: tuple[Number, Number]
    passed: bool


@record
class Cause:
    """One likely reason of a fault.

    Attributes:
        id: one of `trace.causes.CAUSES`.
        words: what is wrong, in a sentence's half.
        module: transformers' module or parameter.
        evidence: what the numbers show.
        counter_test: null where that was not tried.
    """

    id: str
    words: str
    module: str
    evidence: str
    counter_test: CounterTest | None


@record
class Place:
    """One place inside a stage that is at fault.

    Attributes:
        module: transformers' module to blame if it is wrong.
        part: what that is: norm, query, attention, projection, mlp, activation, residual, …
        at: "out" for what the module gives out, "in" for what reaches it from the code before it.
        faulty: more than rounding happens here.
    """

    module: str
    part: str
    at: str
    local_error: Number
    rounding: Number
    excess: Number
    faulty: bool


@record
class Fault:
    """One fault: where it arises, and what it may come from.

    Attributes:
        stage: "" where no stage holds the module.
        module, part: as of a `Place`.
        inside: every place in the stage, in the order of execution; empty where it was not looked into.
        causes: the likeliest first.
    """

    stage: str
    module: str
    part: str
    arrival_error: Number
    local_error: Number
    rounding: Number
    excess: Number
    causes: tuple[Cause, ...]
    inside: tuple[Place, ...]


@record
class FirstDivergence:
    """Where the two models first differ by more than rounding.

    Attributes:
        cause: in words; "" where none is known.
    """

    stage: str
    module: str
    part: str
    arrival_error: Number
    local_error: Number
    excess: Number
    cause: str


# -- the weights


@record
class Weights:
    """The first proof: the tensors, by hash and round trip.

    Attributes:
        written: how many tensors the directory holds.
        missing, unexpected, misshapen: names in which it differs from what transformers' own class expects.
        dropped, tied, unused, no_way_back: LAVIS's names -> why.
        origins: LAVIS's name -> the file it was read from.
        unproven: names that there was nothing to compare with.
        roundtrip: whether the inverse rules give the source bit for bit; null after a cast that loses bits.
        modules_equal: whether LAVIS's own modules held the same; null where neither a recording nor the source says.
        modules_checked: how many parameters that is.
        dtype: as asked for when it was converted.
        bytes_by_kind: part of the model -> kind of rule -> bytes written.
        names: the whole mapping: names in LAVIS, name in transformers, kind of rule, shape, file.
    """

    written: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    dropped: Mapping[str, str]
    tied: Mapping[str, str]
    unused: Mapping[str, str]
    no_way_back: Mapping[str, str]
    origins: Mapping[str, str]
    unproven: tuple[str, ...]
    roundtrip: bool | None
    roundtrip_differences: tuple[str, ...]
    modules_equal: bool | None
    modules_different: tuple[str, ...]
    modules_checked: int
    weights_hash: str
    dtype: str
    bytes_by_kind: Mapping[str, Mapping[str, int]]
    names: tuple[tuple[tuple[str, ...], str, str, tuple[int, ...], str], ...]


# -- the stages


@record
class Again:
    """A stage measured once more, with the known differences put right; see `Stage`."""

    arrival_error: Number
    drift: Number
    local_error: Number
    rounding: Number
    excess: Number
    refereed: bool
    referee_error: str


@record
class Stage:
    """What was measured at one stage, in the order of the network; see `trace.StageResult`.

    Attributes:
        module, reference: its place in transformers and in LAVIS.
        junction: nothing is computed there, and only what arrives is compared.
        excess: LAVIS's distance to float64 over transformers'. About 1 for rounding alone.
        refereed: the float64 run came to its end; else `referee_error` says what ended it.
        fixed: with the known differences put right; null where there are none.
    """

    name: str
    module: str
    junction: bool
    arrival_error: Number
    drift: Number
    local_error: Number
    rounding: Number
    excess: Number
    bit_equal: bool | None
    refereed: bool
    referee_error: str
    reference: str
    fixed: Again | None


@record
class Effect:
    """The errors at a stage before and after a known difference was put right."""

    local_error: tuple[Number, Number]
    excess: tuple[Number, Number]


@record
class KnownDifference:
    """A difference in code that today's transformers is known to have.

    Attributes:
        lavis, transformers: the two values of the attribute.
        words, why, fix: what it is called, where it comes from, and code that takes it away.
        explains: the stages whose errors it accounts for, or "captions.default".
        counter_test: null for one that shows in no module.
        captions_that_differ: of one that shows in captions.
    """

    id: str
    stage: str
    module: str
    attribute: str
    lavis: Setting
    transformers: Setting
    words: str
    why: str
    fix: str
    explains: tuple[str, ...]
    counter_test: Effect | None = None
    captions_that_differ: int | None = None


# -- pixels, logits, captions


@record
class DefaultPixels:
    """How far the pixels of transformers' default image processor are from LAVIS's.

    Attributes:
        max_abs: as the model sees them.
        share: of the values that differ.
        grey_levels: the largest difference, of 256.
    """

    processor: str
    max_abs: Number
    share: float
    grey_levels: int


@record
class Pixels:
    """The pixels of transformers' PIL processor, which should be LAVIS's."""

    max_abs: Number
    equal: bool
    default: DefaultPixels


@record
class Agreement:
    """How far two models' logits are apart; see `trace.metrics.compare_logits`."""

    max_abs: Number
    relative: Number
    cosine: Number
    kl: Number
    top1_agreement: float


@record
class Logits:
    """The same, and once more with the known differences put right; null where there are none."""

    max_abs: Number
    relative: Number
    cosine: Number
    kl: Number
    top1_agreement: float
    fixed: Agreement | None = None


@record
class Decoding:
    """The captions of one way of decoding, an item an image.

    Attributes:
        ties: those that differ where two were as good as one another.
        lavis_ids, huggingface_ids: from the first new token to the end of the sequence.
    """

    equal: tuple[bool, ...]
    ties: tuple[bool, ...]
    lavis_ids: tuple[tuple[int, ...], ...]
    huggingface_ids: tuple[tuple[int, ...], ...]


Step = tuple[str, Number, str, Number]
"""A token of a caption, its log-probability, the runner-up, its log-probability; in nats."""


@record
class Ladder:
    """Both models' greedy captions of one image, token by token."""

    lavis: tuple[Step, ...]
    transformers: tuple[Step, ...]


@record
class Captions:
    """What both models say of the images.

    Attributes:
        lavis, huggingface: way of decoding -> one text an image.
        modes: way of decoding -> how they compare.
        equal: greedy ones and those with beams are the same, or part at a tie.
        equal_when_fixed: with the known differences put right; null where there are none.
    """

    prompt: str
    lavis: Mapping[str, tuple[str, ...]]
    huggingface: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, Decoding]
    ladder: tuple[Ladder, ...]
    equal: bool
    equal_when_fixed: bool | None = None


# -- many images


@record
class Skipped:
    """A file that was given as an image, and why it is none."""

    name: str
    why: str


@record
class Spread:
    """The median and the worst of what was measured, and whose the worst is."""

    median: Number
    worst: Number
    take: int
    image: str


@record
class Spreads:
    """Of each error of a stage; null where nothing was measured."""

    arrival_error: Spread | None
    drift: Spread | None
    local_error: Spread | None
    excess: Spread | None


@record
class StageSpread:
    """A stage on all images and texts.

    Attributes:
        faulty: on how many more than rounding happens.
        left: on how many that no known difference explains it.
        fixed: with the known differences put right.
    """

    arrival_error: Spread | None
    drift: Spread | None
    local_error: Spread | None
    excess: Spread | None
    faulty: int
    left: int
    fixed: Spreads


@record
class LogitSpreads:
    """Of each measure of the logits."""

    max_abs: Spread | None
    relative: Spread | None
    kl: Spread | None
    top1_agreement: Spread | None


@record
class Take:
    """One image with one text.

    Attributes:
        mode: of the image's file, as pillow calls it.
        faults, left, unjudged: stages: at fault, at fault and not explained, not judged.
        kl_largest: of all positions; `kl` is their mean.
        captions_equal: way of decoding -> whether the captions are the same.
        ties: ways of decoding whose captions part at a tie.
    """

    image: str
    text: str
    prompt: str
    size: tuple[int, ...]
    mode: str
    pixels_equal: bool
    faults: tuple[str, ...]
    left: tuple[str, ...]
    unjudged: tuple[str, ...]
    max_abs: Number
    relative: Number
    kl: Number
    top1_agreement: float
    kl_largest: Number
    captions_equal: Mapping[str, bool]
    ties: tuple[str, ...]


@record
class CaptionCount:
    """Of one way of decoding: how many captions there are and how many are equal; which are not, and which are ties."""

    of: int
    equal: int
    different: tuple[int, ...]
    ties: tuple[int, ...]


@record
class Worst:
    """The image and text on which the two models are furthest apart.

    Attributes:
        why: it is that one, in words.
        lavis, transformers: the greedy captions.
        tokens: of the text, as it stands at the positions.
    """

    take: int
    image: str
    text: str
    why: str
    lavis: str
    transformers: str
    tokens: tuple[str, ...]


@record
class Images:
    """What all images and texts say together.

    Attributes:
        count: of different images.
        explained, left: stages at fault on some take: all by a known difference, and not all.
        problem: the sentence for the verdict where something is left; null where nothing is.
    """

    skipped: tuple[Skipped, ...]
    count: int
    names: tuple[str, ...]
    texts: tuple[str, ...]
    each: tuple[Take, ...]
    stages: Mapping[str, StageSpread]
    logits: LogitSpreads
    captions: Mapping[str, CaptionCount]
    explained: tuple[str, ...]
    left: tuple[str, ...]
    problem: str | None
    worst: Worst


# -- what the figures need beside


@record
class Examined:
    """The stage whose values are kept: `examined/lavis` and `examined/transformers` in arrays.safetensors.

    Attributes:
        heads: that share its channels; null where there are none.
        channel_step: every how many-th channel is kept.
    """

    stage: str
    heads: int | None
    channels: int
    channel_step: int


@record
class Fusion:
    """What a key bias does to a vision block's attention, and what a query bias of the same size does."""

    block: int
    key_bias_effect: Number
    query_bias_effect: Number


# -- what was compared with what


@record
class ReadFile:
    """A file that was read for the conversion."""

    name: str
    bytes: int


@record
class Reference:
    """LAVIS's recording.

    Attributes:
        source_hash, inputs_hash: of the weights it was made of, and of what the model was shown.
        device: LAVIS ran on.
        texts: argument of LAVIS's `forward` -> its texts.
    """

    source_hash: str
    inputs_hash: str
    device: str
    texts: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, str]


@record
class Provenance:
    """What was compared with what. Names and hashes alone: a report travels, and paths of this machine do not.

    Attributes:
        state: a hash over names, sizes and times of the directory's files; see `proof.provenance.state`.
        checkpoints: the files that were trained.
        reference: null where the weights alone were proven.
    """

    state: str
    files: tuple[ReadFile, ...]
    checkpoints: tuple[str, ...]
    weights_hash: str
    dtype: str
    prompt: str
    image_size: int
    language_model: str
    reference: Reference | None


@record
class Content:
    """All of report.json.

    Attributes:
        random_weights: it is a twin, whose captions are noise.
        computed_in: the dtype that transformers ran in.
        proof: what was made: weights, or both.
        verdict: match, explained, diverges or incomplete.
        causes: ids of what accounts for the verdict.
        summary: the verdict in a sentence.
        incomplete: what was not run or could not be judged; `complete_with` is the command for it, or "".
        threshold: an excess above it is a fault.
        attribute_differences: settings in which paired modules differ and that nobody knows of, in words.
        sequences: part of the network -> what stands at each position.
        top_tokens: LAVIS's likeliest ten at the last position.
        versions: "converted with", "checked with" and "reference" -> library -> version.
        seconds: that the verification took.
    """

    format: int = FORMAT
    model_name: str = ""
    random_weights: bool = False
    computed_in: str = "float32"
    proof: str = "weights"
    verdict: str = ""
    causes: tuple[str, ...] = ()
    summary: str = ""
    incomplete: tuple[Missing, ...] = ()
    complete_with: str = ""
    weights: Weights | None = None
    pixel_values: Pixels | None = None
    logits: Logits | None = None
    threshold: float = 0.0
    stages: tuple[Stage, ...] = ()
    known_differences: tuple[KnownDifference, ...] = ()
    attribute_differences: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    first_divergence: FirstDivergence | None = None
    captions: Captions | None = None
    images: Images | None = None
    sequences: Mapping[str, tuple[str, ...]] | None = None
    examined: Examined | None = None
    fusion: Fusion | None = None
    top_tokens: tuple[str, ...] = ()
    versions: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    provenance: Provenance | None = None
    seconds: float = 0.0

    @property
    def first_stage(self) -> str:
        """The stage at which the two models first differ by more than rounding; "" for none."""
        return self.first_divergence.stage if self.first_divergence else ""
