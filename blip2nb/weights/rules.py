"""The kinds of rules that turn one library's tensors into the other's, with the way back of each.

A kind that writes has `forward` and `inverse`, which compute, and `parts`: where in a written file the sources' own
bytes lie, so that a file can be taken for LAVIS's without a copy. A kind whose sources' bytes are nowhere in the file,
such as a transposition, needs `revert` and a converted base to compute first.

A rule names tensors on both sides by templates; `expand` writes them out. Everything here is pure: names and shapes,
and arithmetic on the tensors that are handed in. The rules themselves stand with the models: `families`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from blip2nb.weights.stored import Stored

Tensor = Any  # a torch.Tensor; torch itself is not needed here


class MappingError(RequestError):
    """A tensor does not hold what its rule promises, so that the way back would lose something."""


def count_up(shape: tuple[int, ...]) -> list[list[int]]:
    """0, 1, 2, … as one row: what a buffer of position ids holds."""
    return [list(range(shape[-1]))]


@dataclasses.dataclass(frozen=True)
class Rename:
    """The same bytes under another name."""

    source: str
    target: str
    shape: str

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor

    def inverse(self, tensor: Tensor) -> tuple[Tensor]:
        return (tensor,)

    def parts(self, written: Stored) -> tuple[Stored, ...]:
        return (written,)


@dataclasses.dataclass(frozen=True)
class FuseQueryValueBias:
    """One bias out of two: query, zeros for the key, value. LAVIS does this in every forward pass.

    A constant added to every key's score of a query drops out of the softmax, which is why the key needs no bias,
    and why a wrong one shows in no activation: only this rule's inverse finds it.
    """

    source: str
    target: str
    shape: str

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """Two of shape (width,) and one dtype to one of shape (3 * width,). Tensors, or numpy arrays of their bits."""
        if query.dtype != value.dtype or query.shape != value.shape:
            raise MappingError(
                f"{self.source}: query and value bias should be alike, found {tuple(query.shape)} {query.dtype} and "
                f"{tuple(value.shape)} {value.dtype}. The checkpoint is damaged or was cast in part."
            )
        width = len(query)
        fused = query.repeat(3)  # of the right length in either library; every third is overwritten
        fused[:width] = query
        fused[width : 2 * width] = 0
        fused[2 * width :] = value
        return fused

    def inverse(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves again. Raises MappingError unless the key's third is exactly zero."""
        query, key, value = fused.chunk(3)
        if bool((key != 0).any()) or bool(key.signbit().any()):
            raise MappingError(
                f"{self.target}: the key's third of a fused bias should be zero, found up to {key.abs().max():.3g}. "
                "LAVIS has no key bias, so this tensor cannot go back."
            )
        return query, value

    def parts(self, written: Stored) -> tuple[Stored, ...]:
        """Query and value; what the key's third holds is the caller's to look at, as `key`."""
        width = written.shape[0] // 3
        return written.rows(0, width), written.rows(2 * width, 3 * width)

    def key(self, written: Stored) -> Stored:
        width = written.shape[0] // 3
        return written.rows(width, 2 * width)


@dataclasses.dataclass(frozen=True)
class InterpolatePositions:
    """The vision tower's position embedding for another image size than the file's, as LAVIS makes it when it builds
    the tower: patches bicubically, the class token kept (lavis/models/eva_vit.py, `interpolate_pos_embed`). Takes the
    place of a `Rename` where the numbers of positions differ."""

    source: str
    target: str
    shape: str
    tokens: int

    def forward(self, positions: Tensor) -> Tensor:
        """(1, 1 + k², width) of any dtype to (1, tokens, width) in float32."""
        from torch import cat
        from torch.nn.functional import interpolate

        positions = positions.float()
        side, new = math.isqrt(positions.shape[1] - 1), math.isqrt(self.tokens - 1)
        patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = interpolate(patches, size=(new, new), mode="bicubic", align_corners=False)
        return cat((positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    def inverse(self, positions: Tensor) -> tuple[Tensor]:
        raise MappingError(f"{self.source} was interpolated for another image size, which has no way back.")

    def parts(self, written: Stored) -> tuple[Stored, ...]:
        """As they are: what LAVIS holds once it has built the tower."""
        return (written,)


@dataclasses.dataclass(frozen=True)
class Tied:
    """A second name of one tensor, in both libraries: accounted for, checked against the original, never written."""

    source: str
    target: str
    of: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Drop:
    """A tensor transformers has no place for. `restore` rebuilds its values from its shape, and the content is
    checked against that, so that nothing is lost."""

    source: str
    why: str
    shape: str
    restore: Callable[[tuple[int, ...]], list]


@dataclasses.dataclass(frozen=True)
class Unused:
    """What a file may hold beyond what LAVIS itself builds: left out by name, reported, and with no way back.

    `{beyond}` is the number of a vision block past the last one LAVIS builds, `*` the rest of a name.
    """

    source: str
    why: str


Rule = Rename | InterpolatePositions | FuseQueryValueBias | Tied | Drop


@dataclasses.dataclass(frozen=True)
class Entry:
    """One rule applied to one tensor (or pair): `sources` in the order the rule's `forward` takes them.

    `target` is None for a dropped tensor. `shape` is the target's, or the dropped tensor's own.
    """

    rule: Any  # one of `Rule`: which methods it has, `kind` says
    sources: tuple[str, ...]
    target: str | None
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    of: str | None = None

    @property
    def kind(self) -> str:
        return type(self.rule).__name__

    def parts(self, written: Stored) -> dict[str, Stored]:
        """Source name -> where its bytes lie in the written target."""
        return dict(zip(self.sources, self.rule.parts(written), strict=True))

    @property
    def optional(self) -> bool:
        """Aliases and recomputable buffers may be missing from a file; everything else may not."""
        return isinstance(self.rule, Tied | Drop)


def entries(rules: Iterable[Rule], sizes: Mapping[str, int], counters: Mapping[str, range]) -> list[Entry]:
    """Every rule written out: the whole mapping by name and shape, without a single weight.

    Args:
        sizes: what the letters in the shapes stand for.
        counters: `{block}` and the like -> what it counts.

    Raises:
        MappingError: two rules take the same name.
    """
    out: list[Entry] = []
    for rule in rules:
        target_template = getattr(rule, "target", None)
        for source, target in _expand(rule.source, target_template, counters):
            dims = [sizes[letter] for letter in rule.shape.split()]
            if source.endswith("bias") and target is not None and target.endswith(".bias"):
                dims = dims[:1]
            if isinstance(rule, FuseQueryValueBias):
                pair = tuple(source.replace("{q,v}", letter) for letter in "qv")
                out.append(Entry(rule, pair, target, (3 * dims[0],), (dims[0],)))
            else:
                out.append(Entry(rule, (source,), target, tuple(dims), tuple(dims), of=getattr(rule, "of", None)))
    for side in (lambda entry: entry.sources, lambda entry: (entry.target,) if entry.target else ()):
        taken: dict[str, Entry] = {}
        for entry in out:
            for name in side(entry):
                if name in taken:
                    raise MappingError(f"Two rules take {name}: {taken[name].rule.source} and {entry.rule.source}.")
                taken[name] = entry
    return out


_CHOICE = re.compile(r"\{([^{}]*(?:\{n\}[^{}]*)*\|[^{}]*(?:\{n\}[^{}]*)*)\}")


def _expand(source: str, target: str | None, counters: Mapping[str, range]) -> Iterable[tuple[str, str | None]]:
    """All (source, target) pairs of a template: first the alternatives, the same on both sides, then the counters."""
    choice = _CHOICE.search(source)
    if choice:
        for word in choice.group(1).split("|"):
            yield from _expand(
                source.replace(choice.group(), word),
                target.replace(choice.group(), word) if target is not None else None,
                counters,
            )
        return
    used = [name for name in counters if name in source]
    for values in itertools.product(*(counters[name] for name in used)):
        one_source, one_target = source, target
        for name, value in zip(used, values, strict=True):
            one_source = one_source.replace(name, str(value))
            one_target = one_target.replace(name, str(value)) if one_target is not None else None
        yield one_source, one_target


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rules applied to one source's names. Every source name is in exactly one entry."""

    variant: Variant
    written: tuple[Entry, ...]
    tied: tuple[Entry, ...]
    dropped: tuple[Entry, ...]
    unused: Mapping[str, Unused]

    def __repr__(self) -> str:
        return (
            f"Plan({self.variant.name}: {len(self.written)} tensors to write, "
            f"{len(self.tied)} tied, {len(self.dropped)} dropped, {len(self.unused)} unused)"
        )
