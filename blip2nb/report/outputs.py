"""The forms of what commands print with --json."""

from __future__ import annotations

from collections.abc import Mapping

from blip2nb.forms import record
from blip2nb.report.schema import Content, Number
from blip2nb.report.sweep import Index


@record
class VariantRow:
    """A line of `blip2nb variants`.

    Attributes:
        lavis: LAVIS's class and model type.
        checkpoint: the released file of what was trained.
        prompt: what LAVIS puts before a caption.
        twin: it is a small one with random weights.
    """

    model: str
    lavis: str
    image_size: int
    language_model: str
    checkpoint: str
    prompt: str
    parameters: int
    twin: bool


@record
class KeyRow:
    """A line of `blip2nb keys`: names in LAVIS, name in transformers (null: it is dropped), kind of rule, shape."""

    source: tuple[str, ...]
    target: str | None
    rule: str
    shape: tuple[int, ...]


@record
class Reading:
    """A file or folder that would be read. `size` is in bytes; an estimate where the server could not be asked."""

    name: str
    path: str
    where: str
    size: int
    here: bool
    estimated: bool = False


@record
class Plan:
    """What a conversion would do: `blip2nb plan`. Sizes in bytes.

    Attributes:
        exact: everything is at hand and was looked into; else the sizes are those the released files should have.
        shards: how many files the weights would be written to.
        disk_free, fetch_free: where the model would be written, and where downloads would be kept; `one_disk` when
            these are the same.
        memory_float32, memory_half: what loading the converted model takes, its weights alone.
        memory_proving: what comparing its behaviour with LAVIS's takes.
        problems: what stands in the way, a sentence each.
    """

    model: str
    output: str
    dtype: str
    exact: bool
    reads: tuple[Reading, ...]
    writes: int
    shards: int
    disk_free: int
    fetch_bytes: int
    fetch_free: int
    one_disk: bool
    memory_converting: int
    memory_float32: int
    memory_half: int
    memory_proving: int
    memory_here: int
    problems: tuple[str, ...] = ()


@record
class Converted:
    """`blip2nb convert`: the model as it was named, and the directory."""

    model: str
    output: str


@record
class Checked:
    """`blip2nb convert --check`: a sentence for each thing that is not as it was written."""

    output: str
    source_checked: bool
    wrong: tuple[str, ...]


@record
class RevertedFile:
    """`blip2nb revert`: the file, its tensors, and what has no place in it with what was done about it."""

    output: str
    tensors: int
    no_way_back: Mapping[str, str]


@record
class Recorded:
    """`blip2nb capture`: the recording, and what it is of."""

    tape: str
    model: str
    weights_hash: str
    versions: Mapping[str, str]


@record
class Pushed:
    """`blip2nb push`: the repository's address."""

    repository: str


@record
class Change:
    """A parameter or version that is not the same in two runs; "none" where a run has no such thing."""

    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


@record
class CaptionChange:
    """What transformers said of one image, counted from 1, in both runs, where it is not the same."""

    mode: str
    image: int
    before: str
    after: str


@record
class StageMove:
    """A stage's error ÷ its own rounding in both runs: null for no number, 0 for bit-equal."""

    stage: str
    before: Number
    after: Number


@record
class RunsCompared:
    """`blip2nb diff`: a pair is always (A's, B's).

    Attributes:
        first_wrong: the stage at which each first goes wrong; "" for none.
        moved: the stages that moved, in the order of the network.
        still: how many stages are in both and did not move.
        only: the names of the stages that are in one run alone.
        logits: measure -> its two values; empty where a run has none.
        captions: those of transformers that changed, of so many compared.
        same_weights: whether both were converted from the same tensors, by hash.
        changes: the parameters and versions in which the runs differ.
        finding: the first stage that moved, in a sentence.
    """

    names: tuple[str, str]
    verdicts: tuple[str, str]
    first_wrong: tuple[str, str]
    moved: tuple[StageMove, ...]
    still: int
    only: tuple[tuple[str, ...], tuple[str, ...]]
    logits: Mapping[str, tuple[Number, Number]]
    captions: tuple[CaptionChange, ...]
    captions_compared: int
    same_weights: bool
    changes: tuple[Change, ...]
    finding: str


@record
class MachineFinding:
    """A line of `blip2nb doctor`. `required` ones decide the exit status; the others only limit what can be done."""

    what: str
    found: str
    fine: bool
    required: bool = False
    advice: str = ""


@record
class ItemRow:
    """Something that takes space; `kept` says why it is never removed, "" for what may be."""

    name: str
    what: str
    bytes: int
    paths: tuple[str, ...]
    kept: str


@record
class Listed:
    """`blip2nb clean`: what takes space."""

    items: tuple[ItemRow, ...]
    bytes: int


@record
class Removed:
    """`blip2nb clean NAME`: what was removed."""

    removed: tuple[ItemRow, ...]
    bytes: int


OUTPUTS: Mapping[str, object] = {
    "variants": tuple[VariantRow, ...],
    "keys": tuple[KeyRow, ...],
    "plan": Plan,
    "convert": Converted,
    "convert-check": Checked,
    "revert": RevertedFile,
    "capture": Recorded,
    "verify": Content,
    "show": Content,
    "push": Pushed,
    "figures": tuple[str, ...],
    "diff": RunsCompared,
    "sweep": Index,
    "doctor": tuple[MachineFinding, ...],
    "clean": Listed,
    "clean-name": Removed,
}
"""Command -> the form of what it prints with --json. The schemas in docs/schemas are made of these."""
