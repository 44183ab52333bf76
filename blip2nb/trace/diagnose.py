"""From a stage that differs to the module that goes wrong and the likely causes, each tried where it can be.

What a fault must do to the numbers decides, not a list of known bugs: a weight is compared with the one that should be
there (see `weights`); where the weights are right, the computation is inferred from what went in and what came out, of
both models (see `computing`); and what can be put right is put right, and the stage run again: the counter-test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from blip2nb.errors import memory_ran_out
from blip2nb.trace import computing
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.inside import Look, Suspect, first_not_finite, part_of
from blip2nb.trace.metrics import CEILING, FEW, THRESHOLD, exceeds
from blip2nb.trace.stage import Stage
from blip2nb.trace.tape import attributes, first_tensor, sample_rows, split_place
from blip2nb.trace.vocabulary import (
    BOOKKEEPING,
    FUSED,
    HEAD_WIDTH,
    HEADS,
    MIXED,
    SCALE,
    SETTINGS,
    in_attention,
    role_of,
    role_of_parameter,
)
from blip2nb.trace.weights import kind_of, what_changed

log = logging.getLogger("blip2nb")


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """One fault: where it arises, and what it may come from.

    Attributes:
        module: the candidate's module that goes wrong.
        part: what that is: norm, query, attention, projection, mlp, activation, residual, …
        arrival_error, local_error, rounding, excess: as for a stage, at the module. None where nothing was run.
        looks: what was found at every place inside the stage, in the order of execution.
        causes: the likeliest first.
    """

    stage: str
    module: str
    part: str
    arrival_error: float | None
    local_error: float | None
    rounding: float | None
    excess: float | None
    looks: tuple[Look, ...] = ()
    causes: tuple[Cause, ...] = ()

    def __str__(self) -> str:
        return f"{self.stage}: {self.part} {self.module}" + (f": {self.causes[0]}" if self.causes else "")

    def report(self) -> dict[str, Any]:
        """The same as plain values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["causes"] = [dataclasses.asdict(cause) for cause in self.causes]
        keep = ("module", "part", "at", "local_error", "rounding", "excess", "faulty")
        plain["inside"] = [{name: getattr(look, name) for name in keep} for look in plain.pop("looks")]
        return plain


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known of the reference beside its activations. Nothing of it has to be.

    Attributes:
        true: the candidate's name of a parameter -> the tensor that should be there, or None where that is not known.
        same: a parameter's name and a tensor -> whether it is the right one; None where that is not known.
        named: a tensor -> the candidate's names of the parameters that should hold exactly this.
        differences: attributes in which paired modules differ.
    """

    true: Callable[[str], torch.Tensor | None] = lambda name: None
    same: Callable[[str, torch.Tensor], bool | None] = lambda name, tensor: None
    named: Callable[[torch.Tensor], Sequence[str]] = lambda tensor: ()
    differences: Sequence[AttributeDifference] = ()

    @classmethod
    def of(cls, reference: torch.nn.Module, candidate: torch.nn.Module, stages: Iterable[Stage]) -> Known:
        """Everything, read off a reference that is at hand: paired modules hold the same parameters by name."""
        pairs = [
            (stage.name, f"{split_place(stage.reference)[0]}.{theirs}".strip("."), f"{stage.module}.{ours}".strip("."))
            for stage in stages
            for theirs, ours in (stage.modules or {"": ""}).items()
        ]
        own = dict(candidate.named_parameters(remove_duplicate=False))
        right: dict[str, torch.Tensor] = {}
        for _, theirs, ours in pairs:
            for name, tensor in reference.get_submodule(theirs).named_parameters():
                mine = f"{ours}.{name}".strip(".")
                if mine in own and own[mine].shape == tensor.shape:
                    right.setdefault(mine, tensor.data)

        return cls.of_weights(right, attribute_differences(attributes(reference), candidate, pairs))

    @classmethod
    def of_weights(cls, right: Mapping[str, torch.Tensor], differences: Sequence[AttributeDifference] = ()) -> Known:
        """What a recording cannot tell, from the weights themselves.

        Args:
            right: the candidate's name of a parameter -> the tensor that should be there.
        """

        def named(tensor: torch.Tensor) -> list[str]:
            return [name for name, one in right.items() if one.shape == tensor.shape and torch.equal(one, tensor)]

        return cls(
            true=right.get,
            same=lambda name, tensor: torch.equal(right[name], tensor.data) if name in right else None,
            named=named,
            differences=differences,
        )


ENOUGH = 3
"""So often a weight's cause is put to the counter-test; where a whole model was rounded the answer is clear by then."""


def diagnose(
    suspect: Suspect, known: Known, candidate: torch.nn.Module, tried: Counter[str] | None = None
) -> list[Finding]:
    """Every fault inside a stage that is at fault, with its causes; never empty.

    Args:
        suspect: the stage, fed the reference's inputs.
        known: what is known of the reference's weights and settings.
        candidate: the whole model the stage is in.
        tried: how often each cause was put to the counter-test at other stages; counted on.
    """
    random = _random(suspect)
    if random is not None:
        return [random]
    looks = suspect.looks()
    broken = first_not_finite(looks)
    wrong = [broken] if broken is not None else [look for look in looks if look.faulty]
    case = _Case(suspect, known, candidate, tuple(looks), Counter() if tried is None else tried)
    layer = case.another_layer()
    if layer is not None:
        return [layer]
    return _of_one_setting([case.finding(look) for look in _once(wrong) or looks[-1:]], suspect)


class _Case:
    """One stage under examination."""

    def __init__(
        self,
        suspect: Suspect,
        known: Known,
        candidate: torch.nn.Module,
        looks: tuple[Look, ...],
        tried: Counter[str],
    ):
        self.suspect, self.known, self.candidate, self.looks, self.tried = suspect, known, candidate, looks, tried
        self._values: dict[str, torch.Tensor] | None = None

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """What the modules inside take in and give out, all forced; float64."""
        if self._values is None:
            self._values = self.suspect.intermediate()
            self._values[":in"] = first_tensor(self.suspect.arguments).double()
        return self._values

    def finding(self, look: Look) -> Finding:
        weights = self.weights(look)
        coarse = [] if weights else self.coarse(look)
        hidden = None if weights or coarse else self.hidden(look)
        if hidden is not None:
            return hidden
        causes = weights or coarse or self.settings(look) + self.computation(look)
        causes = ranked(causes)
        module, part = look.module, look.part
        if weights:  # the weight tells more exactly where
            module, part = self.owner(weights[0].module, module, part)
        if not causes:
            causes = [Cause("unknown", _unexplained(look), module, "no weight and no setting that is known differs")]
        return Finding(
            self.suspect.name, module, part, None, look.local_error, look.rounding, look.excess, self.looks,
            tuple(causes),
        )  # fmt: skip

    def coarse(self, look: Look) -> list[Cause]:
        """Where the exact computation agrees with the reference and the module's own does not."""
        if not look.expected.is_floating_point() or look.exact.shape != look.expected.shape:
            return []
        theirs = computing.off(look.exact, look.expected)
        worse = max(THRESHOLD * theirs, FEW) < look.rounding
        cast = look.rounding > CEILING and theirs < 3 * look.rounding  # in the referee's run too, as autocast does
        if not self.suspect.strict or not (worse or cast) or look.rounding > _COARSEST:
            return []
        like = next((name for name, least in _LIKE.items() if look.rounding > least), "less than float32")
        words = f"it is computed in lower precision than float32: its rounding is {look.rounding:.1e}, as of {like}"
        if not worse:
            return [Cause("precision", words, look.module, "float32 rounds no module that much")]
        test = CounterTest("computed in float64", (look.local_error, theirs), (look.excess, 1.0), True)
        return [Cause("precision", words, look.module, "in float64 it agrees with the reference", test)]

    def hidden(self, look: Look) -> Finding | None:
        """A matrix that the reference applies without its module, so that nothing of it was recorded, and that gives
        something else than its own weight and bias do."""
        seen = {one.key for one in self.looks}
        root = look.module.removeprefix(self.suspect.path).removeprefix(".")
        for key, value in self.values.items():
            path, _, at = key.rpartition(":")
            if at != "out" or key in seen or path.rpartition(".")[0] != root or not path:
                continue
            module = self.suspect.module.get_submodule(path)
            x, weight = self.values.get(f"{path}:in"), getattr(module, "weight", None)
            if x is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
                continue
            bias = getattr(module, "bias", None)
            right = _product(x, weight, bias)
            error = computing.off(value, right)
            if error > computing.product_rounding(x, weight, bias, right):
                whole = f"{self.suspect.path}.{path}"
                said = _matrix_words(x, weight, bias, value) or computing.pattern(value, right, look.rounding)
                id, words = said or ("unknown", "it gives something else than its weight and bias do")
                cause = Cause(id, words, whole, "computed again from its own weight and bias")
                return Finding(
                    self.suspect.name, whole, part_of(path, module), None, error, look.rounding,
                    error / max(look.rounding, _LEAST) if math.isfinite(look.rounding) else math.inf,
                    self.looks, (cause,),
                )  # fmt: skip
        return None

    def owner(self, parameter: str, module: str, part: str) -> tuple[str, str]:
        """The module a parameter belongs to, and what it is called; the stage's own parameters are named themselves."""
        path = parameter.rpartition(".")[0]
        if path == self.suspect.path and len(list(self.suspect.module.children())):
            return path, kind_of(parameter).replace("position", "position embedding")
        return (path, part_of(path, self.candidate.get_submodule(path))) if path != module else (module, part)

    # -- weights

    def weights(self, look: Look) -> list[Cause]:
        """The parameters in the part of the stage that a look judges, where they are not the right ones."""
        wrong = {name: one for name, one in self.parameters(look) if self.known.same(name, one) is False}
        if not wrong:
            return self.absent(look)
        causes = [self.weight(name, tensor) for name, tensor in wrong.items()]
        if all(self.tried[cause.id] >= ENOUGH for cause in causes):
            return causes
        self.tried.update({cause.id for cause in causes})
        test = self.weights_put_right(look, wrong)
        return [dataclasses.replace(cause, counter_test=test) for cause in causes]

    def absent(self, look: Look) -> list[Cause]:
        """Parameters that the reference has and the module does not: a bias that was never made."""
        for path, module in self.modules(look):
            for leaf in ("bias", "weight"):
                name = f"{path}.{leaf}"
                true = self.known.true(name) if getattr(module, leaf, module) is None else None
                if true is not None:
                    made = torch.nn.Parameter(true, requires_grad=False)
                    with repaired(self.candidate, [AttributeDifference(self.suspect.name, path, leaf, made, None)]):
                        test = self._after(look, f"with the reference's {leaf}")
                    id = f"{leaf}_missing"
                    return [Cause(id, f"{path} has no {leaf}", name, "the reference has one there", test)]
        return []

    def weights_put_right(self, look: Look, wrong: Mapping[str, torch.Tensor]) -> CounterTest | None:
        right = {name: self.known.true(name) for name in wrong}
        held = [_holding(wrong[name], tensor) for name, tensor in right.items() if tensor is not None]
        if len(held) < len(wrong):
            return None
        with contextlib.ExitStack() as stack:
            for one in held:
                stack.enter_context(one)
            return self._after(look, "with the right one" if len(held) == 1 else "with the right ones")

    def parameters(self, look: Look) -> Iterator[tuple[str, torch.Tensor]]:
        """Of the module that is blamed, without what other looks judge."""
        for path, module in self.modules(look):
            for leaf, tensor in module.named_parameters(recurse=False):
                yield self.known_name(f"{path}.{leaf}", tensor), tensor

    def modules(self, look: Look) -> Iterator[tuple[str, torch.nn.Module]]:
        """The module that is blamed and those inside it, without what other looks judge; by whole path."""
        own = look.module.removeprefix(self.suspect.path).removeprefix(".")
        judged = {one.key.rpartition(":")[0] for one in self.looks if one.at == "out"} - {"", own}
        judged = {path for path in judged if not own or path.startswith(f"{own}.")}
        for name, module in self.candidate.get_submodule(look.module).named_modules():
            inner = f"{own}.{name}".strip(".")
            if not any(inner == path or inner.startswith(f"{path}.") for path in judged):
                yield f"{look.module}.{name}".strip("."), module

    def known_name(self, name: str, tensor: torch.Tensor) -> str:
        """Of a tensor that is tied under several names, one by which something is known of it."""
        if self.known.same(name, tensor) is not None:
            return name
        named = self.candidate.named_parameters(remove_duplicate=False)
        others = [other for other, one in named if one is tensor and self.known.same(other, one) is not None]
        return others[0] if others else name

    def weight(self, name: str, tensor: torch.Tensor) -> Cause:
        tied = self.tied(name, tensor)
        if tied is not None:
            return Cause("tied", f"{name} is {tied}, in one and the same memory", name, "the same parameter")
        return weight_cause(name, tensor.data, self.known, self.heads(name))

    def tied(self, name: str, tensor: torch.Tensor) -> str | None:
        """The other name of a parameter that should be two."""
        named = self.candidate.named_parameters(remove_duplicate=False)
        others = [other for other, one in named if one is tensor and other != name]
        return next((other for other in others if self.known.same(other, tensor) is not None), None)

    def heads(self, name: str) -> int | None:
        """Into how many heads a weight of this stage is divided."""
        path = name.rpartition(".")[0]
        attends = in_attention(path) or bool(role_of_parameter(name))
        while attends and path and path.startswith(self.suspect.path):
            count = _heads_of(self.candidate.get_submodule(path))
            if count:
                return count
            path = path.rpartition(".")[0]
        return next((n for n in map(_heads_of, self.suspect.module.modules()) if n), None) if attends else None

    def another_layer(self) -> Finding | None:
        """Whether the stage holds another layer's weights, all of them."""
        moved: dict[str, int] = {}
        for name, tensor in self.suspect.module.named_parameters():
            whole = f"{self.suspect.path}.{name}"
            if self.known.same(whole, tensor) is not False:
                continue
            for other in self.known.named(tensor.data):
                if other.endswith(f".{name}") and other != whole:
                    path = other[: -len(name) - 1]
                    moved[path] = moved.get(path, 0) + 1
        count = len(list(self.suspect.module.parameters()))
        path = max(moved, key=moved.__getitem__, default="")
        if not path or moved[path] < max(2, 0.6 * count):
            return None
        there = self.candidate.get_submodule(path)
        back = [f"{self.suspect.path}.{name}" in self.known.named(one.data) for name, one in there.named_parameters()]
        id = "layers_swapped" if sum(back) > 0.5 * len(back) else "layer_repeated"
        words = f"{self.suspect.path} holds the weights of {path}" + (" and the other way round" if any(back) else "")
        before = self.suspect.judged()
        with self.all_right():
            after = self.suspect.judged()
        errors, excesses = ((before[name], after[name]) for name in ("local_error", "excess"))
        passed = after["excess"] is not None and not exceeds(after["excess"], THRESHOLD)
        test = CounterTest("with its own weights", errors, excesses, passed)
        cause = Cause(id, words, self.suspect.path, f"{moved[path]} of its {count} weights, bit for bit", test)
        measured = (before["local_error"], before["rounding"], before["excess"])
        return Finding(self.suspect.name, self.suspect.path, "layer", None, *measured, self.looks, (cause,))

    @contextlib.contextmanager
    def all_right(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, tensor in self.suspect.module.named_parameters():
                true = self.known.true(f"{self.suspect.path}.{name}")
                if true is not None:
                    stack.enter_context(_holding(tensor, true))
            yield

    # -- settings

    def settings(self, look: Look) -> list[Cause]:
        """Attributes of the blamed module, or around it, that differ from the reference's: each put right and tried."""
        groups: dict[tuple[str, str], list[AttributeDifference]] = {}
        for one in self.known.differences:
            inside = one.module == look.module or one.module.startswith(f"{look.module}.")
            if inside or look.module.startswith(f"{one.module}."):
                groups.setdefault((one.module, SETTINGS.get(one.attribute, "attribute")), []).append(one)
        causes = []
        for (module, id), together in groups.items():
            change = ", ".join(f"{one.attribute} {one.reference!r}" for one in together)
            test = self.settings_put_right(look, together, f"with {change}")
            words = "; ".join(map(str, together))
            cause = Cause(id, words, module, "read off both modules", test)
            around = look.module.startswith(f"{module}.")
            if cause.proven or (not around and test is not None and _falls(test)):
                causes.append(cause)
        return causes

    def settings_put_right(
        self, look: Look, differences: Sequence[AttributeDifference], change: str
    ) -> CounterTest | None:
        """None where the module does not run with them: then they are not what is wrong, or not all of it."""
        differences = [*differences, *self._scale_with(differences)]
        with repaired(self.candidate, differences):
            try:
                return self._after(look, change)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if memory_ran_out(error):
                    raise
                return None

    def _scale_with(self, differences: Sequence[AttributeDifference]) -> list[AttributeDifference]:
        """The scale of an attention's scores, which a module computes from the width of its heads when it is built."""
        widths = [one for one in differences if one.attribute in HEAD_WIDTH]
        out = []
        for one in widths:
            plain = vars(self.candidate.get_submodule(one.module))
            for name in SCALE:
                if isinstance(plain.get(name), float) and math.isclose(plain[name], one.candidate**-0.5, rel_tol=1e-6):
                    out.append(dataclasses.replace(one, attribute=name, reference=one.reference**-0.5))
        return out

    # -- computation

    def computation(self, look: Look) -> list[Cause]:
        """What the reference computes there and what the candidate does, where both can be told."""
        if not (look.expected.is_floating_point() and look.found.shape == look.expected.shape):
            return []
        if not math.isfinite(look.rounding):
            return []
        tests = {
            "attention": self._attention, "activation": self._activation, "norm": self._norm,
            "residual": self._residual, "embedding": self._embedding,
        }  # fmt: skip
        try:
            return tests.get(look.part, self._linear)(look) or self._pattern(look)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:  # a module unlike any that was thought of
            if memory_ran_out(error):
                raise
            log.warning("%s: what it computes could not be told (%s)", look.module, error)
            return []

    def _pattern(self, look: Look) -> list[Cause]:
        """What the difference looks like, where nothing says more."""
        said = computing.pattern(look.exact, look.expected, look.rounding)
        return [] if said is None else [Cause(self._scale_of(said[0], look), said[1], look.module, "its pattern")]

    def within(self, look: Look) -> float:
        """How near an explanation comes to the reference's output if that rounds as the candidate does."""
        return THRESHOLD * max(look.rounding / self.suspect.unit, _LEAST)

    def explained(self, look: Look, change: str, value: torch.Tensor, rounding: float = 0.0) -> CounterTest:
        """The counter-test by computing the part again, on the same inputs, in float64.

        Args:
            rounding: what float32 is off when it computes the part so.
        """
        error = computing.off(value, look.expected)
        excess = THRESHOLD * error / computing.allowed(self.within(look), rounding)
        return CounterTest(change, (look.local_error, error), (look.excess, excess), not exceeds(excess, THRESHOLD))

    def _attention(self, look: Look) -> list[Cause]:
        made = self._scores(look)
        if made is None:
            return []
        scores, start = made
        within = self.within(look)
        theirs = computing.attention(scores, look.expected.double(), start, within)
        ours = computing.attention(scores, look.exact, start, within)
        if theirs is None or theirs == ours:
            return []
        if ours is None:
            ours = computing.masked(scores, look.exact, theirs, within)
        value = scores.output(theirs)
        if value is None:
            return []
        causes = []
        for id, words, change in _attention_words(ours, theirs, start):
            test = self.explained(look, change, value, scores.rounding(theirs))
            causes.append(Cause(id, words, look.module, "computed again from the same queries, keys and values", test))
        return causes

    def _scores(self, look: Look) -> tuple[computing.Scores, computing.Attention] | None:
        """The queries, keys and values before a place, and how its module says it attends."""
        root = look.module.removeprefix(self.suspect.path).removeprefix(".")
        parts: dict[str, torch.Tensor] = {}
        for key, value in self.values.items():
            path, _, at = key.rpartition(":")
            role = role_of(path)
            if at == "out" and role in MIXED and path.rpartition(".")[0] == root:
                names = FUSED.get(role, (role,))
                parts |= dict(zip(names, value.chunk(len(names), -1), strict=True))
        if len(parts) < 3:
            return None
        parts = {name: part if part.dim() == 3 else part[None] for name, part in parts.items()}
        module = self.candidate.get_submodule(look.module)
        heads = _heads_of(module) or 1
        channels = parts["query"].shape[-1]
        plain = attributes(module).get("", {})
        scale = next((plain[name] for name in SCALE if isinstance(plain.get(name), float)), None)
        own = channels % heads == 0 and (channels // heads) ** -0.5
        bias = self._handed("position_bias")
        if scale is None:
            scale = 1.0 if bias is not None or hasattr(module, "relative_attention_bias") else own or 1.0
        bias = bias if bias is not None else self._looked_up(root)
        mask = self._handed("attention_mask")
        causal = getattr(module, "is_causal", False) or getattr(module, "is_decoder", False)
        crossed = parts["key"].shape[1] != parts["query"].shape[1]
        start = computing.Attention(
            heads,
            float(scale),
            "given" if mask is not None and bias is None else "causal" if causal and not crossed else "none",
            bias is not None,
        )
        return computing.Scores(parts, sample_rows(parts["query"].shape[1]), mask, bias), start

    def _handed(self, name: str) -> torch.Tensor | None:
        """An argument of the stage that is added to the scores: a mask in its additive form, or a bias."""
        value = self.suspect.arguments.get(name)
        if not isinstance(value, torch.Tensor) or value.dim() != 4:
            return None
        if value.dtype == torch.bool:
            return torch.zeros(value.shape, dtype=torch.float64).masked_fill(~value, -math.inf)
        return value.double()

    def _looked_up(self, root: str) -> torch.Tensor | None:
        """The position bias where this module looks it up itself."""
        value = self.values.get(f"{root}.relative_attention_bias:out")
        return None if value is None else value.permute(2, 0, 1)[None]

    def _activation(self, look: Look) -> list[Cause]:
        path = look.key.rpartition(":")[0]
        keys = list(self.values)
        before = keys[: keys.index(look.key)] if look.key in keys else keys
        rows = sample_rows(self.values[look.key].shape[-2])
        pieces = [self.values[key] for key in before if key.endswith(":out") and not key.startswith(f"{path}:")]
        lead, width = look.expected.shape[:-2], look.expected.shape[-1]
        fits = [piece for piece in pieces if piece.dim() > 1 and piece.shape[-1] == width]
        laid = [piece.reshape(*lead, -1, width) for piece in fits]
        same = [one[..., rows, :] for one in laid if one.shape[-2] > max(rows)][-2:]
        within = self.within(look)
        theirs = computing.activation(same, look.expected.double(), within)
        ours = computing.activation(same, look.exact, within)
        if theirs is None or (ours is not None and ours.name == theirs.name):
            return []
        words = f"the activation is {ours.name if ours else 'none that the kit knows'}, the reference has {theirs.name}"
        return [Cause("activation", words, look.module, "both told from what goes in and what comes out",
                      self.explained(look, f"with {theirs.name}", theirs.value, theirs.rounding))]  # fmt: skip

    def _norm(self, look: Look) -> list[Cause]:
        path = look.key.rpartition(":")[0]
        x = self.values[f"{path}:in"]
        x = x[..., sample_rows(x.shape[-2]), :]
        params = self._norms(look.module)
        within = self.within(look)
        theirs = computing.norm(x, look.expected.double(), params, within)
        ours = computing.norm(x, look.exact, params, within)
        if theirs is None or theirs == ours:
            return []
        if ours is None and (seen := self._pattern(look)):
            return seen
        value = theirs.of(x, params, torch.float64)
        id, words, change = _norm_words(ours, theirs)
        return [Cause(id, words, look.module, "both told from what goes in and what comes out",
                      self.explained(look, change, value, theirs.rounding(x, params)))]  # fmt: skip

    def _norms(self, module: str) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """The weights of this norm, and of those around it, which may have been meant."""
        root = module.rpartition(".")[0]
        near = [(module, self.candidate.get_submodule(module))]
        near += [(f"{self.suspect.path}.{path}", one) for path, one in self.suspect.module.named_modules()]
        near += [(f"{root}.{path}", one) for path, one in self.candidate.get_submodule(root).named_children()]
        return {
            path: (one.weight, getattr(one, "bias", None))
            for path, one in near
            if "norm" in type(one).__name__.lower() and isinstance(getattr(one, "weight", None), torch.Tensor)
        }

    def _residual(self, look: Look) -> list[Cause]:
        pieces = {}
        for key, value in self.values.items():
            path, _, at = key.rpartition(":")
            if key == look.key:
                break
            if at == "out" or key == ":in":
                name = "what enters the block" if key == ":in" else f"what {path} gives"
                pieces[name] = self._at_rows(value, look)
        pieces["what enters the block"] = self._at_rows(self.values[":in"], look)
        for key, value in self.values.items():
            if key.endswith(":in") and "norm" in key.lower() and key != look.key:
                pieces.setdefault(f"what enters {key.rpartition(':')[0]}", self._at_rows(value, look))
        within = self.within(look)
        theirs = computing.summed(pieces, look.expected.double(), within)
        ours = computing.summed(pieces, look.exact, within)
        if theirs is None or theirs == ours:
            return []
        if ours is None and (seen := self._pattern(look)):
            return seen
        value = sum((factor * pieces[name] for name, factor in theirs.items()), torch.zeros_like(look.exact))
        words = f"it adds {_sum_words(ours)}, the reference {_sum_words(theirs)}"
        return [Cause(_sum_cause(ours, theirs), words, look.module, "by least squares over what was computed before",
                      self.explained(look, "with that sum", value))]  # fmt: skip

    def _at_rows(self, value: torch.Tensor, look: Look) -> torch.Tensor:
        if value.dim() != look.expected.dim() and value.dim() > 1:
            value = value.reshape(*look.expected.shape[:-2], -1, value.shape[-1])
        return value[..., sample_rows(value.shape[-2]), :] if value.dim() > 1 else value

    def _embedding(self, look: Look) -> list[Cause]:
        """Which row of a table stands at each position, in a look-up or in a sum of embeddings."""
        found, expected = self.suspect.output().double(), self.suspect.expected.double()
        if found.shape != expected.shape or found.dim() != 3:
            return []
        width = found.shape[-1]
        found, expected = found.reshape(-1, width), expected.reshape(-1, width)
        for path, tensor in self.candidate.get_submodule(look.module).named_parameters():
            name, table = f"{look.module}.{path}", tensor.detach().double()
            if tensor.dim() > 1 and tensor.shape[-1] == width and tensor.numel() > width:
                said = _table_rows(name, table.reshape(-1, width), found, expected)
            else:
                said = _left_out(name, table, found, expected) if table.shape == (width,) else None
            if said is not None:
                return [Cause(*said, name.rpartition(".")[0], "told from the rows that stand there")]
        return []

    def _linear(self, look: Look) -> list[Cause]:
        """What else a matrix may have been used for."""
        path = look.key.rpartition(":")[0]
        module = self.candidate.get_submodule(look.module)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        x = self.values.get(f"{path}:in")
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or x is None or x.shape[-1] != weight.shape[1]:
            return []
        x = self._at_rows(x, look)
        right = _product(x, weight, bias)
        rounding = computing.product_rounding(x, weight, bias, right)
        itself = computing.off(right, look.exact) <= rounding  # it computes what its weight and bias say
        if itself or computing.off(right, look.expected) > max(self.within(look), rounding):
            return self._exchanged(look)
        said = _matrix_words(x, weight, bias, look.exact) or computing.pattern(look.exact, look.expected, look.rounding)
        test = self.explained(look, "computed with its own weight and bias", right, rounding)
        id, words = said or ("unknown", "it gives something else than its weight and bias do")
        return [Cause(self._scale_of(id, look), words, look.module, "told from what goes in and what comes out", test)]

    def _exchanged(self, look: Look) -> list[Cause]:
        """Whether a query gives what the reference's key gives, or the like."""
        holder = look.module.rpartition(".")[0]
        for other in self.looks:
            role = role_of(other.module)
            near = (
                other.at == "out" and role in MIXED and other.module.rpartition(".")[0] == holder and other is not look
            )
            if near and computing.off(look.exact, other.expected) <= max(self.within(look), FEW):
                words = f"it gives what the reference's {role} gives"
                return [Cause("qkv_swapped", words, look.module, f"compared with the reference's {other.module}")]
        return []

    def _scale_of(self, id: str, look: Look) -> str:
        name = look.module.rpartition(".")[2]
        if id != "scale":
            return id
        return "logits_scale" if "head" in name else "embedding_scale" if "embed" in name else "scale"

    # -- counter-tests

    def _after(self, look: Look, change: str) -> CounterTest:
        after = next((one for one in self.suspect.looks() if one.key == look.key), look)
        errors, excesses = (look.local_error, after.local_error), (look.excess, after.excess)
        return CounterTest(change, errors, excesses, after.sound)


def arriving_weights(
    arrived: torch.Tensor, expected: torch.Tensor, candidate: torch.nn.Module, known: Known
) -> list[Cause]:
    """The parameters that are not the reference's and whose values arrive, as they are or row by row."""
    rows = [one.reshape(-1, one.shape[-1]) for one in (arrived, expected)] if arrived.dim() else []
    if not rows or rows[0].shape != rows[1].shape or not arrived.is_floating_point():
        return []
    wrong = rows[0][(rows[0] != rows[1]).any(-1)][:_ROWS]
    causes = []
    for name, tensor in candidate.named_parameters():
        if tensor.dim() < 2 or tensor.shape[-1] != arrived.shape[-1]:
            continue
        table = tensor.data.reshape(-1, tensor.shape[-1])
        same = [torch.isclose(table, row, rtol=0, atol=0, equal_nan=True) for row in wrong]
        stands = all(bool(one.all(-1).any()) for one in same)
        if stands and len(wrong) and known.same(name, tensor) is False:
            causes.append(weight_cause(name, tensor.data, known))
    return causes


_ROWS = 8
"""So many rows of what arrives are looked up among the parameters'."""


_COARSEST = 2.0**-4
"""No precision that models run in rounds more than this: sixteen roundings to bfloat16."""

_LIKE = {"bfloat16": 2.0**-10, "float16": 2.0**-14}
"""Below what a single rounding to each costs on average, 2⁻⁹ and 2⁻¹²: the coarsest first."""


def weight_cause(name: str, tensor: torch.Tensor, known: Known, heads: int | None = None) -> Cause:
    """What became of a parameter that is not the reference's, from the tensors alone."""
    others = [other for other in known.named(tensor) if other != name]
    if others and tensor.any():
        other = min(others, key=lambda one: _unlike(one, name))
        return Cause(_stands_for(name, other), f"{name}: {other} stands there", name, "bit for bit")
    true = known.true(name)
    if true is None:
        id = {"bias": "bias_changed"}.get(kind_of(name), "weight_changed")
        return Cause(id, f"{name} is not the reference's", name, "its hash is another")
    change = what_changed(name, tensor, true, heads)
    if change is None:
        return Cause("weight_changed", f"{name} is not the reference's", name, "its hash is another")
    return Cause(change.id, f"{name}: {change.words}", name, "compared with the tensor that should be there")


def _stands_for(name: str, other: str) -> str:
    """The cause when another parameter's values stand in a parameter's place."""
    modules = [one.rpartition(".")[0] for one in (name, other)]
    leaves = [one.rpartition(".")[2] for one in modules]
    holders = [one.rpartition(".")[0] for one in modules]
    if all(role_of(leaf) in MIXED for leaf in leaves) and holders[0] == holders[1]:
        return "qkv_swapped"
    if all("norm" in leaf.lower() for leaf in leaves) and _layer_of(name) == _layer_of(other):
        return "norms_swapped"
    if "head" in name and ("embed" in other or "shared" in other):
        return "tied"
    return "weight_swapped"


def _layer_of(name: str) -> str:
    """A parameter's name up to the number of its layer."""
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


_LEAST = 2.0**-25
"""The rounding of one float32 operation, relative and on average: what a reference's output has at least."""


def _of_one_setting(findings: list[Finding], suspect: Suspect) -> list[Finding]:
    """Several places that one setting of the whole stage puts right are one fault."""
    first = findings[0].causes[0]
    shared = [one for one in findings if one.causes[0].words == first.words and one.causes[0].module == first.module]
    if len(shared) < 2 or first.module != suspect.path:
        return findings
    one = dataclasses.replace(findings[0], module=suspect.path, part="layer")
    return [one, *(other for other in findings if other not in shared)]


def _once(wrong: Sequence[Look]) -> list[Look]:
    """Without what is only seen again: a residual carries an error past the modules whose outputs are put right."""
    kept: list[Look] = []
    for look in wrong:
        if not any(_seen_again(look, earlier) for earlier in kept):
            kept.append(look)
    return kept


def _seen_again(look: Look, earlier: Look) -> bool:
    if look.part != "residual" and look.at != "out":
        return False
    shapes = {one.shape for each in (look, earlier) for one in (each.expected, each.exact)}
    if not look.expected.is_floating_point() or len(shapes) > 1:
        return False
    new, old = look.exact - look.expected.double(), earlier.exact - earlier.expected.double()
    return computing.off(new, old) <= 1e-2 and (earlier.excess or 0.0) > 10


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + b in float64."""
    return x @ weight.detach().double().T + (0.0 if bias is None else bias.detach().double())


def _matrix_words(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, value: torch.Tensor
) -> tuple[str, str] | None:
    """What else than x·Wᵀ + b a matrix was used for to give a value: a cause's id and words."""
    w, b = weight.detach().double(), None if bias is None else bias.detach().double()
    ways = {}
    if b is not None:
        bare = x @ w.T
        ways["bias_missing", "its bias is not added"] = bare
        ways["bias_changed", "its bias is added twice"] = bare + 2 * b
        ways["bias_changed", "its bias is taken away"] = bare - b
        for shift in (1, -1):
            ways["bias_shifted", f"its bias is shifted by {shift}"] = bare + b.roll(shift)
    if w.shape[0] == w.shape[1]:
        ways["transposed", "its matrix is used transposed"] = x @ w + (0.0 if b is None else b)
    near = computing.product_rounding(x, weight, bias, value)  # of a candidate that does not run in float64
    return next((said for said, one in ways.items() if computing.off(one, value) <= near), None)


def _falls(test: CounterTest) -> bool:
    """Whether putting something right made any difference."""
    return not test.local_error[1] > 0.9 * test.local_error[0]


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """Those whose counter-test passed before the others; of one kind at one module only the first, which then says what
    the others saw as well."""
    kept: dict[str, Cause] = {}
    for cause in sorted(causes, key=lambda one: not one.proven):
        first = kept.setdefault(cause.id, cause)
        if first is not cause and cause.evidence not in first.evidence:
            kept[cause.id] = dataclasses.replace(first, evidence=f"{first.evidence}; {cause.evidence}")
    return list(kept.values())


def _random(suspect: Suspect) -> Finding | None:
    """A fault where a stage does not compute the same thing twice: dropout."""
    first = suspect.output()
    if not first.isfinite().all():
        return None
    second = next((one for one in (suspect.output() for _ in range(REPEATS)) if not repeated(first, one)), first)
    if second is first:
        return None
    looks, again = suspect.looks(), {one.key: one.found for one in suspect.looks()}
    differ = [one for one in looks if one.key not in again or not repeated(one.found, again[one.key])]
    at = differ[0] if differ else looks[-1]
    live = [(name, one) for name, one in suspect.module.named_modules() if one.training]
    drops = [name for name, one in live if isinstance(one, torch.nn.Dropout) and one.p > 0]
    module = f"{suspect.path}.{drops[0]}" if len(drops) == 1 and len(live) == 1 else at.module
    with still(suspect.module):
        calm = repeated(suspect.output(), suspect.output())
        after = next((one for one in suspect.looks() if one.key == at.key), at)
    rounding = (at.local_error, after.local_error), (math.inf, after.excess)
    test = CounterTest("with every module in eval mode", *rounding, calm and after.sound)
    named = f"{len(live)} of its modules are in training mode" if live else "no module is in training mode"
    size = computing.off(second, first)
    words = f"it gives another output each time; {named}"
    cause = Cause("dropout", words, module, f"two runs differ by {size:.1e}", test)
    return Finding(suspect.name, module, at.part, None, at.local_error, at.rounding, math.inf, tuple(looks), (cause,))


REPEATS = 4
"""So often a stage is run again to see whether it gives the same: what is left out half of the time is seen then."""


def repeated(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two runs gave the same but for rounding, which a library may do in another order the second time."""
    few = torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
    return torch.equal(first, second) or computing.off(second, first) <= max(FEW, few)


@contextlib.contextmanager
def still(module: torch.nn.Module) -> Iterator[None]:
    """A module and everything in it in eval mode."""
    before = [(one, one.training) for one in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for one, training in before:
            one.training = training


@contextlib.contextmanager
def _holding(parameter: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    """A parameter with another value for as long as the block lasts."""
    before = parameter.data
    try:
        parameter.data = value.to(before.device, before.dtype).reshape(before.shape)
        yield
    finally:
        parameter.data = before


def _heads_of(module: torch.nn.Module) -> int | None:
    plain = vars(module)
    return next((plain[name] for name in HEADS if isinstance(plain.get(name), int)), None)


def _unlike(one: str, other: str) -> int:
    return sum(a != b for a, b in zip(one.split("."), other.split("."), strict=False)) + abs(len(one) - len(other))


def _table_rows(name: str, table: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> tuple[str, str] | None:
    """Which rows of a table the candidate uses and which the reference: a cause's id and words.

    Args:
        table: (rows, channels). found, expected: (positions, channels), rows of the table or sums with them.
    """
    looked_up = [_nearest(table, one) for one in (found, expected)]
    ours, theirs = looked_up
    if (ours is None or theirs is None) and len(table) == len(found):
        rest = expected - table  # a sum, in which each position has its own row
        if computing.off(rest, found) < CEILING:
            return "position_missing", f"{name} is not added"
        order = _nearest(rest, found - table)
        if order is not None and order != list(range(len(order))):
            return "position_order", f"what {name} is added to stands in another order"
        ours, theirs = _nearest(table, found - rest), list(range(len(table)))
    if ours is None or theirs is None or ours == theirs:
        return None
    moves = {a - b for a, b in zip(ours, theirs, strict=True)}
    if len(moves) == 1:
        return "position_shifted", f"{name}: its rows are {moves.pop():+d} from the reference's"
    moved = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return "position_order", f"{name}: {moved} of {len(ours)} rows are others than the reference's"


def _left_out(name: str, bias: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> tuple[str, str] | None:
    """Whether a bias, and nothing else, is missing at most positions."""
    apart = expected - found
    near = (apart - bias).norm(dim=-1) <= 1e-3 * bias.norm()
    same = apart.norm(dim=-1) <= 1e-3 * bias.norm()
    if bool((near | same).all()) and int(near.sum()) > len(near) // 2 and name.endswith("bias"):
        return "bias_missing", f"{name} is not added"
    return None


def _nearest(table: torch.Tensor, rows: torch.Tensor) -> list[int] | None:
    """For each row the place in the table where it stands; None where one stands nowhere."""
    apart = torch.cdist(rows[None], table[None])[0]
    nearest = apart.min(1)
    fits = nearest.values <= 1e-3 * rows.norm(dim=-1).clamp_min(1e-300)
    return nearest.indices.tolist() if fits.all() else None


def _attention_words(
    ours: computing.Attention | None, theirs: computing.Attention, start: computing.Attention
) -> Iterator[tuple[str, str, str]]:
    """(cause, words, what putting it right is) for each thing in which two attentions differ."""
    own = ours or start
    if own.heads != theirs.heads:
        yield "head_count", f"{own.heads} heads, the reference has {theirs.heads}", f"with {theirs.heads} heads"
    elif not math.isclose(own.scale, theirs.scale, rel_tol=1e-6):
        words = f"scores are multiplied by {own.scale:.6g}, in the reference by {theirs.scale:.6g}"
        yield "attention_scale", words, f"with the scale {theirs.scale:.6g}"
    if own.mask != theirs.mask:
        says = {"none": "every position sees every other", "causal": "no position sees a later one"}
        says["given"] = "the mask that was handed in is used"
        said = [says.get(one, f"the mask is {one}") for one in (own.mask, theirs.mask)]
        words = f"{said[0]}, in the reference {said[1]}"
        yield "attention_mask", words, "with the reference's mask"
    if own.bias != theirs.bias:
        if theirs.bias:
            yield "position_bias_missing", "no position bias is added, the reference adds one", "with the bias"
        else:
            yield "position_bias", "a position bias is added, the reference adds none", "without the bias"
    if own.order != theirs.order:
        id = "qkv_missing" if "zeros" in own.order else "qkv_swapped"
        taken, right = ", ".join(own.order), ", ".join(theirs.order)
        words = f"{taken} are taken for query, key, value where the reference takes {right}"
        yield id, words, "with each in its place"
    if own.heads_order != theirs.heads_order:
        words = f"its heads stand in another order than the reference's: {list(theirs.heads_order or own.heads_order)}"
        yield "heads_permuted", words, "with the heads in that order"
    if ours is None and own == theirs:
        yield "unknown", "not an attention the kit knows, though the reference's is", "computed as its settings say"


def _norm_words(ours: computing.Norm | None, theirs: computing.Norm) -> tuple[str, str, str]:
    if ours is None:
        return "unknown", f"not a norm the kit knows; the reference's is one with eps {theirs.eps:g}", "with that norm"
    if ours.params != theirs.params:
        words = f"it uses the weights of {ours.params}, the reference those of {theirs.params}"
        return "norms_swapped", words, "with the others"
    if ours.kind.split()[0] == theirs.kind.split()[0] != ours.kind:
        words = f"eps {ours.eps:g} is added to the deviation, in the reference {theirs.eps:g} to the variance"
        return "eps", words, f"with eps {theirs.eps:g} in its place"
    if ours.kind != theirs.kind:
        return "norm_kind", f"a {ours.kind} norm, the reference has a {theirs.kind} norm", f"with a {theirs.kind} norm"
    if ours.bias != theirs.bias:
        return "bias_missing", "its bias is not added" if theirs.bias else "its bias is added", "as the reference does"
    return "eps", f"eps is {ours.eps:g}, the reference has {theirs.eps:g}", f"with eps {theirs.eps:g}"


def _sum_words(factors: Mapping[str, float] | None) -> str:
    if factors is None:
        return "no sum of what was computed before"
    return " and ".join(name if abs(f - 1) < 1e-5 else f"{f:.4g} × {name}" for name, f in factors.items())


def _sum_cause(ours: Mapping[str, float] | None, theirs: Mapping[str, float]) -> str:
    """Another factor on the same branches is a scale; everything else is another way of adding."""
    if ours is None or ours.keys() != theirs.keys():
        return "residual"
    factors = [ours[name] / theirs[name] for name in theirs]
    return "scale" if any(abs(one - round(one)) > 1e-5 for one in factors) else "residual"


def _unexplained(look: Look) -> str:
    return f"what it computes is not what the reference does ({look.part})"


# -- what can be read off the modules


@dataclasses.dataclass(frozen=True)
class AttributeDifference:
    """Two paired modules carry the same attribute with different values.

    Attributes:
        stage: the stage the pair belongs to.
        module: the candidate's module.
        attribute: its name, such as eps.
        reference, candidate: the two values.
    """

    stage: str
    module: str
    attribute: str
    reference: Any
    candidate: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute} is {self.candidate!r}, the reference has {self.reference!r}"


def attribute_differences(
    reference: Mapping[str, Mapping[str, Any]], candidate: torch.nn.Module, pairs: Iterable[tuple[str, str, str]]
) -> list[AttributeDifference]:
    """Compare the plain attributes (numbers, words, flags) of paired modules, without running anything.

    Args:
        reference: the reference's attributes by module path, as `tape.attributes` records them.
        pairs: (stage, path in the reference, path in the candidate).
    """
    own = attributes(candidate)
    out = []
    for stage, path, other in pairs:
        theirs, ours = reference.get(path, {}), own.get(other, {})
        for name in sorted(theirs.keys() & ours.keys() - BOOKKEEPING):  # a set's order is another in each process
            if theirs[name] != ours[name]:
                out.append(AttributeDifference(stage, other, name, theirs[name], ours[name]))
    return out


@contextlib.contextmanager
def repaired(candidate: torch.nn.Module, differences: Iterable[AttributeDifference]) -> Iterator[None]:
    """The candidate with the reference's values in place, for as long as the block lasts: the counter-test."""
    changed = []
    try:
        for difference in differences:
            module = candidate.get_submodule(difference.module)
            changed.append((module, difference.attribute, getattr(module, difference.attribute)))
            setattr(module, difference.attribute, difference.reference)
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)
