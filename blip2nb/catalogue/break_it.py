"""Faults in a converted BLIP-2: planting those of the catalogue and its own, and marking what the kit says of them.

    from blip2nb.catalogue import break_it

    bench = break_it.Bench(run.model, tape)
    case = bench.case("head_count", "vision.block.02")
    answer = bench.ask(case)                                      # planted, measured, asked for, taken back
    answer.findings, answer.shows, answer.marks                   # what was said, where it shows, what of it is right

    with case.planted(bench, scratch, seed=0) as broken:          # by hand: broken.folder, broken.loaded, broken.inputs
        trace.compare(tape, broken.loaded.model, bench.stages, broken.inputs)

The converted directory itself is never touched: faults of files and configuration are put into a copy. A recording
holds one text at a time, so that nothing in it is padded: padding can be added to what transformers is called with, but
padding at the wrong side of a shorter text cannot be told from that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import html
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip2nb.catalogue import any_model
from blip2nb.catalogue.anatomy import ACTIVATIONS, activations, attentions, norms
from blip2nb.catalogue.any_model import Fault, Target, catalogue
from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.configuration import IMAGE_MEAN, IMAGE_STD
from blip2nb.families.captioners.stages import module_pairs, stages
from blip2nb.forms import settled
from blip2nb.handles import Report
from blip2nb.proof.behaviour import tape_images
from blip2nb.proof.findings import findings
from blip2nb.proof.rows import of_comparison
from blip2nb.proof.subject import Subject
from blip2nb.report.manifest import Manifest
from blip2nb.trace.causes import CAUSES
from blip2nb.trace.comparison import compare
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.known import attribute_differences
from blip2nb.trace.diagnosis.repairs import repaired
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE, distance, exceeds
from blip2nb.trace.results import Comparison
from blip2nb.trace.tape import Tape

if TYPE_CHECKING:
    from PIL.Image import Image

    from blip2nb.conversion.files import Opened

log = logging.getLogger("blip2nb")


@dataclasses.dataclass(frozen=True)
class Broken:
    """A model with a fault in it.

    Attributes:
        folder: the converted directory; the original, unless the fault is in a file.
        loaded: the model, as loaded from there.
        inputs: what it is called with.
    """

    folder: Path
    loaded: huggingface.Loaded
    inputs: dict[str, Any]


class Bench:
    """A converted directory and LAVIS's recording of it: what faults are put into.

    Attributes:
        folder, tape: as given.
        source: opens what the directory was converted from, once, or gives None; asked for the right weights.
        variant, stages: what the directory holds, and the places to compare.
        loaded, image, inputs: the model as it is, the image it is shown, and what it is called with.
        known: where the modules of today's transformers differ from LAVIS's; put right wherever something is measured.
    """

    def __init__(self, folder: Path, tape: Tape, source: Callable[[], Opened | None] = lambda: None):
        self.folder, self.tape, self.source = folder, tape, functools.cache(source)
        self.variant = Manifest.read(folder).variant
        self.stages = stages(self.variant)
        self.loaded = huggingface.load(folder)
        self.image: Image = tape_images(tape)[0]
        self.texts: dict[str, list[str]] = tape.metadata["texts"]
        self.inputs = self.prepared(self.loaded)
        pairs = [(pair.stage, pair.reference, pair.candidate) for pair in module_pairs(self.variant)]
        self.known = attribute_differences(tape.metadata["attributes"], self.loaded.model, pairs)

    def prepared(self, loaded: huggingface.Loaded) -> dict[str, Any]:
        """What a model is called with, by its own processor."""
        return huggingface.forward_inputs(loaded, self.variant, self.image, self.texts)

    @functools.cached_property
    def healthy(self) -> Comparison:
        """Every stage of the model as it is."""
        return self.measure(self.loaded, self.inputs)

    def measure(self, loaded: huggingface.Loaded, inputs: Mapping[str, Any]) -> Comparison:
        """Every stage fed LAVIS's values, with the known differences put right, and no diagnosis."""
        with repaired(loaded.model, self.known):
            try:
                return compare(self.tape, loaded.model, self.stages, inputs, explain=False)
            except Exception as error:  # as it may for a text of another length: keep what was seen before it stopped
                if memory_ran_out(error):
                    raise
                log.debug("the comparison stopped; once more, with what was seen before", exc_info=True)
                return compare(self.tape, loaded.model, self.stages, inputs)

    def ask(self, case: Case, seed: int = 0) -> Answer:
        """Plant a case, measure where it shows, ask the kit what is wrong, take it back, and mark what was said.

        Args:
            seed: of the random values that the case takes, and of dropout.

        Raises:
            ValueError: a fault changes nothing there.
        """
        healthy = self.healthy  # measured before anything is planted
        with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with case.planted(self, Path(scratch) / "model", seed) as broken:
                seen = self.measure(broken.loaded, broken.inputs)
                found, error = self._findings(broken)
        shown = tuple(stage for stage in case.stages if shows(stage, healthy, seen))
        expected = tuple(_expected(one, shown) for one in case.faults)
        visible = all(one.must for one in expected)
        marks = judge(expected, found, [stage.name for stage in self.stages]) if visible else None
        return Answer(case, found, shown, expected, marks, dataclasses.replace(seen, findings=found), error)

    def _findings(self, broken: Broken) -> tuple[tuple[Finding, ...], str]:
        """What the kit says, and what it raised instead."""
        live: dict[str, Any] = {"loaded": broken.loaded, "inputs": broken.inputs}
        try:
            return tuple(findings(Subject(broken.folder, self.tape, self.source), **live)), ""
        except Exception as error:  # no answer is a wrong one, and says why
            if memory_ran_out(error):
                raise
            log.debug("no answer", exc_info=True)
            return (), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def case(self, fault: str, where: str = "") -> Case:
        """A fault of the catalogue, by name, midway among the places where it fits.

        Args:
            where: only at this stage, or in this module.

        Raises:
            RequestError: there is no such fault, it cannot be made in this model, or does not fit there. The message
                names what is nearest.
        """
        if fault not in CATALOGUE:
            near = _nearest(fault, CATALOGUE)
            raise RequestError(f"There is no fault {fault!r}.{near} `blip2nb.faults()` lists all {len(CATALOGUE)}.")
        cases = self.cases(CATALOGUE[fault])
        if not cases:
            raise RequestError(f"{fault} cannot be made in {self.variant.name}: it fits nowhere there.")
        found = [case for case in cases if where in ("", *case.stages, *case.faults[0].target.modules)]
        if not found:
            at = list(dict.fromkeys(stage for case in cases for stage in case.stages))
            some = ", ".join(at if len(at) < 7 else [*at[:3], "…", *at[-2:]])
            raise RequestError(f"{fault} does not fit at {where!r}.{_nearest(where, at)} It fits at {some}.")
        return found[len(found) // 2]

    def catalogue(self) -> Listing:
        """The catalogue, with the number of places where each fault fits."""
        return Listing({name: len(self.cases(fault)) for name, fault in CATALOGUE.items()})

    def cases(self, fault: Fault) -> list[Case]:
        """Everywhere the fault fits, at every depth."""
        targets = fault.targets(self if fault.kind == "inputs" else self.loaded.model)  # type: ignore[arg-type]
        found = [Case((Placed(fault, target, self._stages_of(fault, target)),)) for target in targets]
        return [case for case in found if case.stages]  # a whole stack in training mode leaves nothing out itself

    def _stages_of(self, fault: Fault, target: Target) -> tuple[str, ...]:
        """The stages where a target's fault arises, in the order of the network."""
        if target.stages:
            return target.stages
        found = {stage for module in target.modules for stage in self._stages_at(module, fault.kind == "code")}
        return tuple(stage.name for stage in self.stages if stage.name in found)

    def _stages_at(self, module: str, code: bool) -> Sequence[str]:
        outside = _OUTSIDE[self.variant.language.kind].get(module)
        if outside is not None:
            return outside[:1] if code and module.endswith(_TABLES) else self._named(outside)
        holders = [one for one in self.stages if not one.is_junction and f"{module}.".startswith(f"{one.module}.")]
        return [max(holders, key=lambda one: len(one.module)).name] if holders else []

    def _named(self, patterns: Sequence[str]) -> list[str]:
        return [one.name for one in self.stages if any(fnmatch.fnmatchcase(one.name, each) for each in patterns)]


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


# Modules that no stage holds, and the stages at which what they give arrives
_OUTSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "opt": {
        "query_tokens": ("qformer.embeddings",),
        "qformer.dropout": ("qformer.layer.00",),
        "language_model.model.decoder.embed_tokens": ("language.inputs_embeds", "logits"),
    },
    "t5": {
        "query_tokens": ("qformer.embeddings",),
        "qformer.dropout": ("qformer.layer.00",),
        "language_model.shared": ("language.inputs_embeds", "language.decoder.block.00"),
        "language_model.encoder.embed_tokens": ("language.inputs_embeds",),
        "language_model.decoder.embed_tokens": ("language.decoder.block.00",),
        "language_model.encoder.dropout": ("language.encoder.block.00", "language.decoder.block.*"),
        "language_model.decoder.dropout": ("language.decoder.block.00", "logits"),
    },
}
_TABLES = ("embed_tokens", "shared")  # shared with the last layer or the other stack as weights, not as modules


@dataclasses.dataclass(frozen=True)
class Placed:
    """A fault at one place, and the stages where it arises, in the order of the network."""

    fault: Fault
    target: Target
    stages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fault.name} at {self.target}"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planted at once: one fault, or several."""

    faults: tuple[Placed, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Where they arise: a right answer names these, and no other."""
        return tuple(dict.fromkeys(stage for one in self.faults for stage in one.stages))

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))

    def __add__(self, other: Case) -> Case:
        """Both at once."""
        return Case((*self.faults, *other.faults))

    @contextlib.contextmanager
    def planted(self, bench: Bench, scratch: Path, seed: int = 0) -> Iterator[Broken]:
        """The model with the fault, for as long as the block lasts.

        Args:
            scratch: an empty or missing folder, for a copy of the directory where one is needed; removed afterwards.

        Raises:
            ValueError: a fault changes nothing there.
        """
        stored = [one for one in self.faults if one.fault.kind in ("files", "configuration")]
        try:
            if stored:
                shutil.copytree(bench.folder, scratch, dirs_exist_ok=True)
            for one in stored:
                write(one.fault, scratch, one.target, seed)
            folder = scratch if stored else bench.folder
            loaded = huggingface.load(folder) if stored else bench.loaded
            with contextlib.ExitStack() as stack:
                inputs = bench.prepared(loaded) if stored else dict(bench.inputs)
                for one in self.faults:
                    if one.fault.kind == "inputs":
                        inputs = one.fault.how(bench, loaded, one.target)
                    elif one.fault.kind == "code":
                        stack.enter_context(one.fault.planted(loaded.model, one.target, seed))
                yield Broken(folder, loaded, inputs)
        finally:
            if stored:
                shutil.rmtree(scratch, ignore_errors=True)


def write(fault: Fault, folder: Path, target: Target, seed: int = 0) -> None:
    """Put a fault of files or configuration into a converted directory, for good.

    Raises:
        ValueError: it changes nothing there.
    """
    if fault.kind == "configuration":
        fault.how(folder, target)
        return
    shards = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
    before: dict[str, torch.Tensor] = {}
    for path in sorted({shards[name] for name in target.names}):
        with safe_open(path, framework="pt") as file:
            before |= {name: file.get_tensor(name) for name in target.names if shards[name] == path}
    changed = fault.changed(before, target, seed)
    if not changed:
        raise ValueError(f"{fault.name} changes nothing at {target}.")
    for path in {shards[name] for name in changed}:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors |= {name: tensor.contiguous() for name, tensor in changed.items() if shards[name] == path}
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)  # a new file: what other directories link to stays as it is


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _edit(path: Path, setting: str, value: Any) -> None:
    """Set one value in a JSON file, by its dotted path. Raises ValueError where it is that already."""
    content = json.loads(path.read_text(encoding="utf-8"))
    *parents, name = setting.split(".")
    part = functools.reduce(lambda inner, key: inner[key], parents, content)
    if part.get(name) == value:
        raise ValueError(f"{setting} is {value!r} already.")
    part[name] = value
    path.unlink()  # not written through a link
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- what is said of a case, and whether it is right


VISIBLE = 3.0
"""A stage shows a fault where its output moves by more than this times its own rounding.

A fault of f roundings gives an excess of √(1 + f²) where both sides round alike, 3.16 for 3. They need not: the
roundings themselves give at least 0.64 of that (see `blip2nb.trace.metrics.THRESHOLD`), so that only from 4.6 roundings
on it is above the threshold of 3 for certain. What lies between and is missed counts as missed.
"""


def shows(stage: str, before: Comparison, after: Comparison) -> bool:
    """Whether a stage shows what was done to a model: by what it gives, or by what arrives there.

    Args:
        before, after: every stage fed LAVIS's values, without the fault and with it.
    """
    if after.stopped or exceeds(after[stage].arrival_error, ARRIVAL_TOLERANCE):
        return True
    rounding = before[stage].rounding
    if rounding is None:  # a place between stages computes nothing, and one that was not refereed has no measure
        return False
    found = after.local_outputs.get(stage)
    moved = math.inf if found is None else distance(found, before.local_outputs[stage])
    return exceeds(moved, VISIBLE * rounding)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a right answer says of one fault.

    Attributes:
        stages: where it arises; to find it at any of these is no mistake.
        must: those of them where it shows, so that it has to be found at the first at the latest; none where it cannot
            be seen. A wrong weight is there to be found whether or not it shows.
        target: its place.
        causes: what it may be called.
    """

    stages: tuple[str, ...]
    must: tuple[str, ...]
    target: Target
    causes: frozenset[str]


def _expected(placed: Placed, shown: Sequence[str]) -> Expected:
    fault, stages = placed.fault, placed.stages
    must = tuple(stage for stage in stages if stage in shown)
    if fault.kind == "files" and len(placed.target.names) > 1:
        must = stages
    elif fault.kind == "files":  # a table that serves two stages: a row of it may be used at one of them
        must = must or stages
    return Expected(stages, must, placed.target, fault.also | {fault.cause})


@dataclasses.dataclass(frozen=True)
class Marks:
    """Which questions were answered right, of one fault or of all that were planted together.

    Attributes:
        detected: something is found at one of its stages.
        stage: at the first where it must be, or before, and nothing that is right is blamed earlier.
        module: what is named there is a module at fault, the one that holds it, or, where all of it is, one in it.
        first, three: the cause named first there, or one of the first three, is right.
        extra: stages that are blamed and have no fault.
    """

    detected: bool
    stage: bool
    module: bool
    first: bool
    three: bool
    extra: int = 0

    @property
    def right(self) -> bool:
        return self.detected and self.stage and self.module and self.first and not self.extra


def judge(expected: Sequence[Expected], findings: Sequence[Finding], order: Sequence[str]) -> Marks:
    """Mark what was said of one fault, or of several at once: then all must be right.

    Args:
        order: the names of all stages.
    """
    each = [_mark(one, findings) for one in expected]
    at_fault = {stage for one in expected for stage in one.stages}
    blamed = [stage for stage in order if any(finding.stage == stage for finding in findings)]
    return Marks(
        detected=all(one.detected for one in each),
        stage=all(one.stage for one in each) and at_fault.issuperset(blamed[:1]),
        module=all(one.module for one in each),
        first=all(one.first for one in each),
        three=all(one.three for one in each),
        extra=len(set(blamed) - at_fault),
    )


def _mark(one: Expected, findings: Sequence[Finding]) -> Marks:
    finding = _said_of(one, findings)
    if finding is None:
        return Marks(False, False, False, False, False)
    ids = [cause.id for cause in finding.causes]
    in_time = one.stages.index(finding.stage) <= one.stages.index(one.must[0])
    first, three = (not one.causes.isdisjoint(ids[:count]) for count in (1, 3))
    return Marks(True, in_time, one.target.names_module(finding.module), first, three)


def _said_of(one: Expected, findings: Sequence[Finding]) -> Finding | None:
    """What is found at the first of a fault's stages where something is."""
    return next((each for stage in one.stages for each in findings if each.stage == stage), None)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the kit said of a case, beside what is right. Shows both in a notebook.

    Attributes:
        case: what was planted.
        findings: what was said, in the order of the network.
        shows: those of the case's stages that show it, measured on the model before and after, without the diagnosis.
        expected: what a right answer says, of each fault.
        marks: which of it was said; None where a fault cannot be seen, and need not be found.
        comparison: every stage of the model with the fault in it, and the findings.
        error: what the kit raised instead of an answer.
    """

    case: Case
    findings: tuple[Finding, ...]
    shows: tuple[str, ...]
    expected: tuple[Expected, ...]
    marks: Marks | None
    comparison: Comparison
    error: str = ""

    @property
    def visible(self) -> bool:
        """Whether it can be seen at all: it changes a weight, or what a stage gives or gets."""
        return self.marks is not None

    @property
    def first(self) -> Finding | None:
        """What was said of the fault, or of the first of several."""
        return _said_of(self.expected[0], self.findings)

    @property
    def report(self) -> Report:
        """What the figures need: `answer.report.figure("depth_trace")`."""
        return Report(settled(of_comparison(self.comparison, self.summary)), {})

    @property
    def summary(self) -> str:
        """Whether the answer is right, in a sentence."""
        marks = self.marks
        if self.error:
            return f"There is no answer: {self.error}"
        if marks is None:
            found = "It was found all the same." if self.findings else "Nothing is said of it, which is right."
            return (
                f"It changes no weight, and no output by more than rounding may: it cannot be seen for certain. {found}"
            )
        if not marks.detected:
            return "It was not found."
        wrong = [what for what in ("stage", "module") if not getattr(marks, what)]
        wrong += [] if marks.first else ["cause (a right one comes later)" if marks.three else "cause"]
        extra = f" Stages that are right were blamed, too: {marks.extra}." if marks.extra else ""
        return (
            f"Found, but not the right {', '.join(wrong)}." if wrong else "Stage, module and cause are right."
        ) + extra

    def rows(self) -> list[tuple[str, str, str]]:
        """Stage, module and cause of each fault: which it is, what it should be, what was said."""
        rows = []
        for one in self.expected if self.visible else ():
            said = _said_of(one, self.findings)
            causes = ", ".join(cause.id for cause in said.causes[:3]) if said else ""
            rows += [
                ("stage", one.must[0], said.stage if said else "nothing"),
                ("module", one.target.modules[0], (said.module or "the model itself") if said else ""),
                ("cause", " or ".join(sorted(one.causes)), causes),
            ]
        return rows

    def _head(self) -> str:
        words = " ".join(dict.fromkeys(one.fault.words for one in self.case.faults))
        return f"{self.case}. {words} It shows at {', '.join(self.shows) or 'no stage'}."

    def __repr__(self) -> str:
        width = max((len(should) for _, should, _ in self.rows()), default=0)
        rows = [f"  {what:8}should be {should:{width}}  said {said}" for what, should, said in self.rows()]
        return "\n".join([self._head(), *rows, self.summary])

    def _repr_html_(self) -> str:
        said = [str(finding) for finding in self.findings[:_MOST]]
        said += [f"and {len(self.findings) - _MOST} more"] if len(self.findings) > _MOST else []
        table = _table(("", "should be", "said"), self.rows()) if self.visible else ""
        items = "".join(f"<li>{html.escape(one)}</li>" for one in said)
        return f"<p>{html.escape(self._head())}</p>{table}<p>{html.escape(self.summary)}</p><ul>{items}</ul>"


_MOST = 5


@dataclasses.dataclass(frozen=True)
class Listing:
    """The catalogue as a table.

    Attributes:
        places: name -> the number of places where the fault fits a model, where one was looked at.
    """

    places: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[tuple[str, ...]]:
        """Name, kind, places if they were counted, what was done wrong, and what the likely answer is called."""
        return [
            (name, one.kind, *([str(self.places[name])] if self.places else []), one.words, CAUSES[one.cause])
            for name, one in CATALOGUE.items()
        ]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        counted = ["places"] if self.places else []
        return _table(("fault", "kind", *counted, "what is done wrong", "likely cause"), self.rows())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return (
            "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        )

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


# -- faults in the configuration


def _configured(folder: Path, target: Target) -> None:
    """Targets name the file's settings as `setting=value`, the value in JSON."""
    for name in target.names:
        setting, _, value = name.partition("=")
        path = folder / ("processor_config.json" if setting.startswith("image_processor.") else "config.json")
        _edit(path, setting, json.loads(value))


_TOWERS = {
    "vision_model": "vision_config",
    "qformer": "qformer_config",
    "language_model": "text_config",
}


_ENCODERS = ("vision_model", "qformer")


def _tower(path: str) -> str:
    return path.split(".")[0]


def _settings_of(model: Any, found: Sequence[str], setting: Callable[[str], str | None]) -> Iterator[tuple[str, tuple]]:
    """For each tower that has it: the setting's dotted path, and the modules that it configures."""
    for tower, config in _TOWERS.items():
        modules = tuple(path for path in found if _tower(path) == tower)
        name = setting(tower)
        if modules and name is not None and hasattr(model.get_submodule(tower).config, name):
            yield f"{config}.{name}", modules


def _eps_settings(model: Any) -> Iterator[Target]:
    eps = {path: getattr(module, attribute) for path, module, attribute in norms(model)}
    for name in ("layer_norm_eps", "layer_norm_epsilon"):
        for setting, modules in _settings_of(model, list(eps), lambda tower, name=name: name):  # type: ignore[misc]
            for value in (1e-5, 1e-6, 1e-12):
                if eps[modules[0]] != value:
                    # with LAVIS's own eps in all of the tower, the post layer norm is right at last
                    wrong = tuple(one for one in modules if not (one.endswith("post_layernorm") and value == 1e-5))
                    yield Target(wrong, (f"{setting}={value}",), f"{value:g}")


def _activation_settings(model: Any) -> Iterator[Target]:
    kinds = dict(activations(model))
    for name in ("hidden_act", "activation_function", "dense_act_fn"):
        for setting, modules in _settings_of(model, list(kinds), lambda tower, name=name: name):  # type: ignore[misc]
            for other in ACTIVATIONS:
                if other != kinds[modules[0]]:
                    yield Target(modules, (f'{setting}="{other}"',), f"{kinds[modules[0]]} → {other}")


def _head_settings(model: Any) -> Iterator[Target]:
    # T5's would need another table of relative positions too, and is refused when it is loaded
    heads = {one.path: one.heads for one in attentions(model) if not _seq2seq(model) or _tower(one.path) in _ENCODERS}
    for setting, modules in _settings_of(model, list(heads), lambda tower: "num_attention_heads"):
        for form, value in (("half as many", heads[modules[0]] // 2), ("twice as many", heads[modules[0]] * 2)):
            width = model.get_submodule(_tower(modules[0])).config.hidden_size
            if value and width % value == 0:
                yield Target(modules, (f"{setting}={value}",), form)


def _seq2seq(model: Any) -> bool:
    return bool(model.language_model.config.is_encoder_decoder)


def _tie_setting(model: Any) -> Iterator[Target]:
    if _seq2seq(model):
        yield Target(("language_model.lm_head",), ("text_config.tie_word_embeddings=true",))


def _distance_setting(model: Any) -> Iterator[Target]:
    if _seq2seq(model):
        paths = tuple(
            f"language_model.{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
            for stack in ("encoder", "decoder")
        )
        names = ("text_config.relative_attention_max_distance=32",)
        yield Target(paths, names, stages=("language.encoder.position_bias",))


def _start_setting(model: Any) -> Iterator[Target]:
    if _seq2seq(model):
        names = ("text_config.decoder_start_token_id=1",)
        yield Target(("language_model.decoder",), names, stages=("language.decoder.input_ids",))


def _image_token_setting(model: Any) -> Iterator[Target]:
    # one that is not in the text: nothing is replaced by the image
    names = (f"image_token_index={model.config.image_token_id + 1}",)
    yield Target(("language_model",), names, stages=("language.inputs_embeds",))


_STATISTICS = (
    "image_mean=[0.485, 0.456, 0.406]; image_std=[0.229, 0.224, 0.225]",  # ImageNet's
    "image_mean=[0.5, 0.5, 0.5]; image_std=[0.5, 0.5, 0.5]",  # many vision transformers'
    f"image_mean={list(IMAGE_STD)}; image_std={list(IMAGE_MEAN)}",  # one for the other
)


def _pixels(*settings: str) -> Callable[[Any], Iterator[Target]]:
    """Each setting of the image processor is a target of its own."""

    def where(_: Any) -> Iterator[Target]:
        for setting in settings:
            names = tuple(f"image_processor.{one}" for one in setting.split("; "))
            yield Target(("vision_model",), names, setting, stages=("pixels",))

    return where


# -- faults in the inputs


def _pixel_input(*forms: str) -> Callable[[Any], Iterator[Target]]:
    return lambda bench: (Target(("vision_model",), ("images",), form, ("pixels",)) for form in forms or ("",))


_EMBEDS = ("language.inputs_embeds",)
_ANSWER = ("language.decoder.input_ids",)


def _text_input(*forms: str, kind: str = "", stages: tuple[str, ...] = _EMBEDS) -> Callable[[Any], list[Target]]:
    """A mistake in the text shows where the language model takes it in."""

    def where(bench: Bench) -> list[Target]:
        if kind and bench.variant.language.kind != kind:
            return []
        module = "language_model.decoder" if stages is _ANSWER else "language_model"
        return [Target((module,), ("text",), form, stages) for form in forms or ("",)]

    return where


# More tokens or fewer: the mask has another length too
_longer = functools.partial(_text_input, stages=(*_EMBEDS, "language.attention_mask"))


Inputs = dict[str, Any]
Change = Callable[[Bench, huggingface.Loaded, Target], Inputs]


def _shown(change: Callable[[Image, Target], Any], **settings: Any) -> Change:
    """Another image, or the processor called in another way."""

    def how(bench: Bench, loaded: huggingface.Loaded, target: Target) -> Inputs:
        image = change(bench.image, target)
        pixels = loaded.processor.image_processor([image], return_tensors="pt", **settings)["pixel_values"]
        return {**bench.prepared(loaded), "pixel_values": pixels.expand_as(bench.inputs["pixel_values"]).contiguous()}

    return how


def _blue_first(image: Image, _: Target) -> Image:
    """As OpenCV reads it."""
    from PIL import Image as PIL

    return PIL.merge("RGB", image.split()[::-1])


def _default_processor(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
    """The image processor that transformers takes unless it is asked for PIL's."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(bench.folder, local_files_only=True)
    pixels = processor([bench.image] * len(bench.texts["text_input"]), return_tensors="pt")["pixel_values"]
    return {**bench.prepared(loaded), "pixel_values": pixels}


def _mirrored(image: Image, _: Target) -> Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _rescaled_already(image: Image, _: Target) -> Any:
    import numpy as np

    return np.asarray(image, dtype=np.float32) / 255


def _said(change: Callable[[str], str]) -> Change:
    """Another text where LAVIS's was meant."""

    def how(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
        texts = {**bench.texts, "text_input": [change(text) for text in bench.texts["text_input"]]}
        return huggingface.forward_inputs(loaded, bench.variant, bench.image, texts)

    return how


def _tokens(change: Callable[[torch.Tensor, Bench], torch.Tensor]) -> Change:
    """Other token ids, (batch, positions), than the processor gives; all of them are attended to."""

    def how(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
        inputs = bench.prepared(loaded)
        ids = change(inputs["input_ids"], bench)
        mask = inputs["attention_mask"]
        if ids.shape != mask.shape:
            mask = torch.ones_like(ids)
        return {**inputs, "input_ids": ids, "attention_mask": mask}

    return how


def _without(column: Callable[[torch.Tensor, Bench], torch.Tensor]) -> Change:
    """Leave out the tokens of a column: the same one of each row."""

    def change(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
        keep = ~column(ids, bench)
        return torch.stack([row[kept] for row, kept in zip(ids, keep, strict=True)])

    return _tokens(change)


def _first_text(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
    """The first token that is not the image's, of each row: OPT's beginning of a sequence."""
    text = ids != bench.loaded.model.config.image_token_id
    return text & (text.cumsum(-1) == 1)


def _last(ids: torch.Tensor, _: Bench) -> torch.Tensor:
    """The last column. OPT's texts end in a line break, T5's in the end of the sequence."""
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    return last


def _text_first(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
    token = bench.loaded.model.config.image_token_id
    rows = [torch.cat([row[row != token], row[row == token]]) for row in ids]
    return torch.stack(rows)


def _one_more(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
    """An end of the sequence behind the text, as tokenizers of other families add."""
    end = bench.loaded.processor.tokenizer.eos_token_id
    return torch.cat([ids, torch.full((len(ids), 1), end)], dim=1)


_PADS = ("left", "right", "left and seen", "right and seen")


def _padded(bench: Bench, loaded: huggingface.Loaded, target: Target) -> Inputs:
    """Padded to four tokens more than needed, with a mask that hides them or with none."""
    inputs = bench.prepared(loaded)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pads = torch.full((len(ids), 4), loaded.processor.tokenizer.pad_token_id)
    none = torch.ones_like(pads) if "seen" in target.form else torch.zeros_like(pads)
    left = target.form.startswith("left")
    return {
        **inputs,
        "input_ids": torch.cat([pads, ids] if left else [ids, pads], dim=1),
        "attention_mask": torch.cat([none, mask] if left else [mask, none], dim=1),
    }


def _mask_forms(bench: Bench) -> list[Target]:
    # OPT counts its positions by the mask
    stages = ("language.attention_mask", *(["language.positions"] if bench.variant.language.kind == "opt" else []))
    forms = ("image tokens hidden", "last token hidden")
    return [Target(("language_model",), ("attention_mask",), form, stages) for form in forms]


def _masked(bench: Bench, loaded: huggingface.Loaded, target: Target) -> Inputs:
    inputs = bench.prepared(loaded)
    mask = inputs["attention_mask"].clone()
    if target.form == "last token hidden":
        mask[:, -1] = 0
    else:
        mask[inputs["input_ids"] == loaded.model.config.image_token_id] = 0
    return {**inputs, "attention_mask": mask}


def _answered(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Another answer than the one that T5's decoder was shown."""

    def how(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
        inputs = bench.prepared(loaded)
        return {**inputs, "labels": change(inputs["labels"])}

    return how


def _exchange_words(text: str) -> str:
    """A prompt of as many tokens that asks something else."""
    return text.replace("photo", "picture") if "photo" in text else f"{text} of"


def _configuration(name: str, words: str, cause: str, where: Callable, *also: str) -> Fault:
    return Fault(name, words, "configuration", cause, where, _configured, frozenset(also))


def _input(name: str, words: str, cause: str, where: Callable, how: Change, *also: str) -> Fault:
    return Fault(name, words, "inputs", cause, where, how, frozenset(also))


_LENGTH = ("tokens",)

# fmt: off
CATALOGUE: Mapping[str, Fault] = any_model.CATALOGUE | catalogue([
    _configuration("eps_configured", "A tower's eps is another.",
                   "eps", _eps_settings),
    _configuration("activation_configured", "A tower's activation function is another.",
                   "activation", _activation_settings),
    _configuration("heads_configured", "A tower has another number of heads.",
                   "head_count", _head_settings, "attention_scale"),
    _configuration("tie_configured", "T5's configuration says that its embedding is tied, which scales the logits too.",
                   "logits_scale", _tie_setting, "scale", "tied"),
    _configuration("distance_configured", "T5's relative positions end at another distance.",
                   "position_bias", _distance_setting),
    _configuration("start_configured", "T5's decoder starts with another token.",
                   "tokens", _start_setting, "bos_missing"),
    _configuration("image_token", "The image is put where another token stands, which is nowhere.",
                   "tokens", _image_token_setting, "sequence_order"),
    _configuration("image_mean", "Images are normalised with other statistics than CLIP's.",
                   "image_mean_std", _pixels(*_STATISTICS, "do_normalize=false")),
    _configuration("image_resample", "Images are resized otherwise than bicubically.",
                   "interpolation", _pixels("resample=0", "resample=1", "resample=2")),
    _configuration("image_rescale", "Pixel values are not brought to between 0 and 1, or not by 1/255.",
                   "pixels", _pixels("do_rescale=false", "rescale_factor=0.00390625"), "image_mean_std"),
    _input("channel_order", "Images come with blue first.",
           "channel_order", _pixel_input(), _shown(_blue_first)),
    _input("rescaled_twice", "Images come with values between 0 and 1, and are divided by 255 again.",
           "pixels", _pixel_input(), _shown(_rescaled_already), "image_mean_std"),
    _input("image_mirrored", "Images are mirrored.",
           "pixels", _pixel_input(), _shown(_mirrored)),
    _input("default_processor", "The image processor that is the default resizes with another library.",
           "interpolation", _pixel_input(), _default_processor, "pixels"),
    _input("prompt", "The text is another.",
           "prompt", _text_input(), _said(_exchange_words), *_LENGTH),
    _input("prompt_missing", "There is no text at all.",
           "prompt", _longer(), _said(lambda text: ""), *_LENGTH),
    _input("bos_missing", "OPT's text does not begin with the beginning of a sequence.",
           "bos_missing", _longer(kind="opt"), _without(_first_text)),
    _input("newline_missing", "OPT's text does not end in a line break.",
           "newline_missing", _longer(kind="opt"), _without(_last)),
    _input("eos_missing", "T5's text does not end in the end of the sequence.",
           "tokens", _longer(kind="t5"), _without(_last)),
    _input("token_too_many", "An end of the sequence is put behind the text.",
           "tokens", _longer(), _tokens(_one_more)),
    _input("padded", "The text is padded to a fixed length.",
           "tokens", _longer(*_PADS), _padded, "padding_side", "attention_mask"),
    _input("text_first", "The text comes before the image.",
           "sequence_order", _text_input(), _tokens(_text_first)),
    _input("input_mask", "The mask hides tokens that should be seen, or shows what should be hidden.",
           "attention_mask", _mask_forms, _masked),
    _input("answer_shifted", "T5's answer is shifted by hand, and again by the model.",
           "tokens", _text_input(kind="t5", stages=_ANSWER), _answered(lambda ids: ids.roll(1, dims=1)), "bos_missing"),
    _input("answer_short", "T5's answer lacks its last token.",
           "tokens", _text_input(kind="t5", stages=_ANSWER), _answered(lambda ids: ids[:, :-1])),
])
# fmt: on
