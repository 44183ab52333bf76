"""Inside a stage: which of its modules goes wrong, when each is fed exactly what the reference's was fed.

A stage that differs is run again with every paired module's inputs and outputs put in place as the reference recorded
them, in the candidate's own precision and in float64. So each module, and each stretch of code between two modules, is
judged alone, as stages are in a whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from blip2nb.trace.metrics import FEW, THRESHOLD, exceeds, judge, judge_alone, judged
from blip2nb.trace.tape import Tape, first_tensor, sample_rows, with_first
from blip2nb.trace.vocabulary import HOLDERS, MIXED, in_attention, role_of


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """One place inside a stage: what a module gave out, or what reached it from the code before it.

    Attributes:
        key: what tells it from the others, `path:in` or `path:out` of the paired module, relative to the stage's.
        module: the candidate's module to blame if it is wrong: itself, or the one whose code lies before it.
        part: what that is called: norm, query, attention, projection, mlp, activation, residual, …
        local_error, rounding, excess: as for a stage; where the stage does not run in float64, rounding is NaN.
        expected, found, exact: the reference's values, the candidate's, and the candidate's in float64; at the sampled
            positions.
    """

    key: str
    module: str
    part: str
    local_error: float
    rounding: float
    excess: float | None
    expected: torch.Tensor = dataclasses.field(repr=False)
    found: torch.Tensor = dataclasses.field(repr=False)
    exact: torch.Tensor = dataclasses.field(repr=False)

    @property
    def path(self) -> str:
        """Of the paired module, relative to the stage's."""
        return self.key.rpartition(":")[0]

    @property
    def at(self) -> str:
        return self.key.rpartition(":")[2]

    @property
    def faulty(self) -> bool:
        """Whether more than rounding happens here. NaN is a fault."""
        return exceeds(self.excess, THRESHOLD)

    @property
    def sound(self) -> bool:
        """Whether it is known that only rounding happens here."""
        return self.excess is not None and not self.faulty


@dataclasses.dataclass(frozen=True, eq=False)
class Suspect:
    """A stage of the candidate, fed the reference's inputs, ready to be run again and again.

    Attributes:
        name: the stage's.
        path: of its module in the candidate.
        module: the candidate's own, live.
        args, kwargs: what it is called with.
        expected: the reference's output.
        parts: paths within the module -> the reference's path of the same; see `Stage.parts`.
        recorded: the reference's values by place.
        exactly: runs the module in float64, on the reference's inputs as they were recorded.
        unit, strict: what the excess is measured in; see `metrics.judge`.
    """

    name: str
    path: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    expected: torch.Tensor
    parts: Mapping[str, str]
    recorded: Tape | Mapping[str, torch.Tensor]
    exactly: Callable[[], torch.Tensor]
    unit: float = 1.0
    strict: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """What the module is called with, by name."""
        return dict(zip(parameters_of(self.module), self.args, strict=False)) | dict(self.kwargs)

    def output(self) -> torch.Tensor:
        """What the module gives out, nothing inside it forced."""
        with torch.no_grad():
            return first_tensor(self.module(*self.args, **self.kwargs))

    def judged(self) -> dict[str, Any]:
        """The stage's own output, nothing inside it forced, against the reference's; see `metrics.judge`."""
        found = self.output()
        if found.shape != self.expected.shape:
            return {"local_error": math.inf, "rounding": math.nan, "excess": math.inf}
        with torch.no_grad():
            return judged(found, self.expected, self.exactly, self.unit, self.strict)

    def looks(self) -> list[Look]:
        """Every place inside that the reference recorded, in the order of execution, and last the stage's output."""
        with torch.no_grad():
            own = _Forced(self, self.output)
            try:
                exact = _Forced(self, self.exactly)
            except Exception:  # it does not run in float64, for whatever reason
                return [own.look(key, self.path, None) for key in own.seen]
        return [own.look(key, self.path, exact.seen[key]) for key in own.seen if key in exact.seen]

    def intermediate(self) -> dict[str, torch.Tensor]:
        """What each paired module took in and gave out when all were forced, whole and in float64: `path:in`,
        `path:out`."""
        with torch.no_grad():
            try:
                return _Forced(self, self.exactly).whole
            except Exception:
                values = _Forced(self, self.output).whole
                return {key: one.double() if one.is_floating_point() else one for key, one in values.items()}


def parameters_of(module: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a module is called with. Its class's word counts where somebody has put another `forward` on it."""
    if "forward" not in vars(module):
        return inspect.signature(module.forward).parameters
    return {name: one for name, one in inspect.signature(type(module).forward).parameters.items() if name != "self"}


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    expected: torch.Tensor
    found: torch.Tensor
    before: str
    between: tuple[str, ...]


class _Forced:
    """One run of a suspect in which every paired module gets the reference's inputs and hands on its outputs.

    Attributes:
        seen: what was found at each place, and where the run had been before.
        whole: the values that went on from there.
    """

    def __init__(self, suspect: Suspect, run: Callable[[], torch.Tensor]):
        self.suspect = suspect
        self.seen: dict[str, _Seen] = {}
        self.whole: dict[str, torch.Tensor] = {}
        self._before = ""
        self._between: list[str] = []
        with self._hooks():
            output = run()
        self._note(":out", output, suspect.expected)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for path, module in self.suspect.module.named_modules():
                if path in self.suspect.parts:
                    handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leaving(path), with_kwargs=True))
                elif path and not list(module.children()):
                    handles.append(module.register_forward_pre_hook(self._passing(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _passing(self, path: str) -> Callable:
        def hook(_module: torch.nn.Module, _args: tuple) -> None:
            self._between.append(path)

        return hook

    def _entering(self, path: str) -> Callable:
        expected = self._recorded(f"{self.suspect.parts[path]}:0")

        def hook(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            key = f"{path}:in"
            name = next(iter(kwargs), "")
            arrived = args[0] if args else kwargs.get(name)
            if key in self.seen or not isinstance(arrived, torch.Tensor):
                return None
            value = self._note(key, arrived, expected)
            return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, name: value})

        return hook

    def _leaving(self, path: str) -> Callable:
        expected = self._recorded(self.suspect.parts[path])

        def hook(_module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            key, main = f"{path}:out", first_tensor(output)
            if key in self.whole or main is None:
                return None
            return with_first(output, self._note(key, main, expected))

        return hook

    def _recorded(self, place: str) -> torch.Tensor | None:
        recorded = self.suspect.recorded
        return recorded[place] if place in recorded else None  # noqa: SIM401, a tape has no get

    def _note(self, key: str, value: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
        """Keep what is found at a place, and give back what goes on from there."""
        if expected is not None:
            found, wanted = at_the_same_positions(value, expected)
            self.seen[key] = _Seen(wanted, found.detach().clone(), self._before, tuple(self._between))
            value = put_in(value, expected)
        self.whole[key] = value.detach()
        self._before = key.rpartition(":")[0]
        self._between.clear()
        return value

    def look(self, key: str, path: str, exact: _Seen | None) -> Look:
        seen = self.seen[key]
        module, part = self._blame(key, seen)
        values: dict[str, Any]
        if seen.found.shape != seen.expected.shape:
            values = {"local_error": math.inf, "rounding": math.nan, "excess": math.inf}
        else:
            values = {**judge_alone(seen.found, seen.expected, self.suspect.strict), "rounding": math.nan}
            if exact is not None:
                least = (lambda _exact: FEW / THRESHOLD) if part == "activation" else None  # as libraries differ
                values = judge(seen.found, seen.expected, exact.found, self.suspect.unit, self.suspect.strict, least)
            values.pop("bit_equal")
        whole = f"{path}.{module}" if module else path
        return Look(
            key, whole, part, **values,
            expected=seen.expected, found=seen.found, exact=seen.found.double() if exact is None else exact.found,
        )  # fmt: skip

    def _blame(self, key: str, seen: _Seen) -> tuple[str, str]:
        """The module that a place is the work of, relative to the stage's, and what it is called."""
        path, _, at = key.rpartition(":")
        modules = dict(self.suspect.module.named_modules())
        if at == "out" and path:
            part = part_of(path, modules[path])
            return (_function_in(path, self.suspect.module), part) if part == "activation" else (path, part)
        before = seen.before
        own = [name for name in seen.between if not isinstance(modules.get(name), torch.nn.Dropout | torch.nn.Identity)]
        if not before:
            return path, part_of(path or self.suspect.path, self.suspect.module)
        if role_of(before) in MIXED:
            return before.rpartition(".")[0], "attention"
        if own:
            kind = part_of(own[-1], modules[own[-1]])
            return own[-1], kind if list(modules[own[-1]].parameters()) else "activation"
        if path and all(part_of(one, modules[one]) in ("mlp", "projection") for one in (before, path)):
            return _function_in(_ancestor(before, path), self.suspect.module), "activation"
        holder = before if path.startswith(f"{before}.") else _ancestor(before, path)
        attends = any(role_of(name) in MIXED for name, _ in modules[holder].named_children())
        return holder, "attention" if attends else "residual"


def _function_in(path: str, module: torch.nn.Module) -> str:
    """The one module within a path that has no weights, such as an activation's; the path itself where there is none,
    or more than one."""
    holder = module.get_submodule(path)
    bare = [
        f"{path}.{name}".strip(".")
        for name, one in holder.named_children()
        if not list(one.parameters()) and not list(one.children()) and not isinstance(one, torch.nn.Dropout)
    ]
    return bare[0] if len(bare) == 1 else path


def part_of(path: str, module: torch.nn.Module) -> str:
    """What a module is called, by its name, its kind and its shape."""
    name, role = path.rpartition(".")[2], role_of(path)
    kind = type(module).__name__.lower()
    if role in MIXED:
        return role
    if "norm" in kind:
        return "norm"
    if isinstance(module, torch.nn.Embedding):
        return "position bias" if "bias" in name else "embedding"
    if list(module.children()):
        return next((part for word, part in HOLDERS.items() if word in name.lower()), "residual")
    weight = getattr(module, "weight", None)
    if "head" in name:
        return "logits"
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        square = weight.shape[0] == weight.shape[1]
        return "projection" if "proj" in name or (square and in_attention(path)) else "mlp"
    return name or "stage"


def at_the_same_positions(value: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both at the positions that `sample` keeps, in the reference's shape: (…, positions, channels). What does not fit
    is given back as it is."""
    laid = _laid_out(value, expected)
    if laid is None or expected.dim() < 2:
        return (value if laid is None else laid), expected
    rows = sample_rows(laid.shape[-2])
    whole = expected.shape[-2] == laid.shape[-2]
    return laid[..., rows, :], expected[..., rows, :] if whole else expected


def put_in(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The value with the reference's in place, at all positions or at the sampled ones; in its own dtype and shape."""
    laid = _laid_out(value, expected)
    if laid is None:
        return value
    expected = expected.to(value.device, value.dtype)
    if laid.shape == expected.shape:
        return expected.reshape(value.shape)
    forced = laid.clone()
    forced[..., sample_rows(laid.shape[-2]), :] = expected
    return forced.reshape(value.shape)


def _laid_out(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor | None:
    """The value with as many dimensions as the reference's: some libraries fold batch and positions into one."""
    if value.shape == expected.shape:
        return value
    if value.dim() != expected.dim() and value.dim() >= 2:
        lead = expected.shape[:-2] if expected.dim() > 2 else ()
        if math.prod(lead) and value.numel() % (math.prod(lead) * value.shape[-1]) == 0:
            value = value.reshape(*lead, -1, value.shape[-1])
    fits = value.dim() == expected.dim() and value.dim() >= 2 and value.shape[:-2] == expected.shape[:-2]
    if not fits or value.shape[-1] != expected.shape[-1]:
        return None
    return value if len(sample_rows(value.shape[-2])) == expected.shape[-2] or value.shape == expected.shape else None


def _ancestor(one: str, other: str) -> str:
    """The deepest module that holds both."""
    common = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        common.append(a)
    if common and ".".join(common) in (one, other):
        common.pop()
    return ".".join(common)


def first_not_finite(looks: Sequence[Look]) -> Look | None:
    """The first place where NaN or infinity stands and the reference has a number."""
    return next((one for one in looks if _breaks(one.found, one.expected)), None)


def _breaks(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((~found.isfinite() & expected.isfinite()).any())
