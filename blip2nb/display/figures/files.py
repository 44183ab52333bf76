"""F10, the files: what became of every byte."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.patches import Patch

from blip2nb.display.figures.axes import add_title
from blip2nb.display.figures.style import FAULT, INK, MUTED, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import byte_unit, first_few, wrap_text
from blip2nb.forms import there
from blip2nb.report.schema import Weights
from blip2nb.sizes import as_bytes

_KINDS = {"Rename": "#5B6C8F", "FuseQueryValueBias": "#F0D95B"}  # cividis: dark and light, so they part in grey too


_FALLBACK = ("#9A9A9A", "#C8C8C8", "#707070")


_WORDS = {"Rename": "renamed", "FuseQueryValueBias": "fused"}


def available(report: Report, arrays: Arrays) -> bool:
    return report.weights is not None and bool(report.weights.bytes_by_kind)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F10: the bytes of each component by what was done to them, and what was not written, in words.

    Args:
        report: `weights`, with `bytes_by_kind` by component and operation.
        arrays: not used.
        width: inches.
    """
    weights = there(report.weights)
    table = weights.bytes_by_kind
    picture = Picture(width, 2.9 if width >= 5 else 2.8, alt_text(report, arrays))
    axes = picture.add_subplot()
    add_title(picture, _files_finding(weights))
    total = max(sum(kinds.values()) for kinds in table.values()) or 1
    unit, word = byte_unit(total)
    found = {kind for kinds in table.values() for kind in kinds}
    names = [*(kind for kind in _KINDS if kind in found), *sorted(found - set(_KINDS))]
    colours = dict(zip(names, [_KINDS.get(n, _FALLBACK[i % 3]) for i, n in enumerate(names)], strict=True))
    for y, kinds in enumerate(table.values()):
        left = 0.0
        for kind in (k for k in names if kinds.get(k)):
            axes.barh(y, kinds[kind] / unit, left=left, color=colours[kind], edgecolor=INK, lw=0.4, height=0.62)
            axes.patches[-1].set_gid(kind)
            left += kinds[kind] / unit
        axes.annotate(_bar_words(kinds), (left, y), (4, 0), textcoords="offset points", va="center", size="small")
    axes.set_yticks(range(len(table)), [COMPONENTS.get(name, name) for name in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, total / unit * (1.38 if width >= 5 else 1.75))
    axes.set_xlabel(f"written, in {word}")
    picture.supxlabel(wrap_text(_account(weights), width - 0.15), x=0.01, ha="left", size="medium",
                      color=FAULT if weights.missing or weights.unexpected else MUTED)  # fmt: skip
    keys = [Patch(fc=colours[name], ec=INK, lw=0.4, label=_WORDS.get(name, name)) for name in names]
    axes.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=1.4, borderpad=0.1)
    return picture


COMPONENTS = {
    "vision_model": "vision",
    "qformer": "Q-Former",
    "query_tokens": "query tokens",
    "language_projection": "projection",
    "language_model": "language",
}


def _files_finding(weights: Weights) -> str:
    names = {"missing": weights.missing, "unexpected": weights.unexpected}
    wrong = [f"{len(some)} {what}" for what, some in names.items() if some]
    if wrong:
        return f"Not all tensors are accounted for: {' and '.join(wrong)}"
    total = sum(sum(kinds.values()) for kinds in weights.bytes_by_kind.values())
    return f"Every tensor is accounted for: {weights.written} written, {as_bytes(total)}"


def _bar_words(kinds: Mapping[str, int]) -> str:
    total = sum(kinds.values())
    fused = kinds.get("FuseQueryValueBias", 0)
    return as_bytes(total) + (f", {as_bytes(fused)} of it fused" if fused else "")


_NAMED = 2  # full names of tensors are long: so many fit under the picture; all are in the report's page


def _account(weights: Weights) -> str:
    names = {"Missing": weights.missing, "Unexpected": weights.unexpected}
    sentences = [f"{what}: {first_few(list(some), _NAMED)}." for what, some in names.items() if some]
    parts = [f"{len(getattr(weights, key))} {words}" for key, words in _NOT_WRITTEN.items()]
    sentences.append(f"Not written, by name: {', '.join(parts)}.")
    for key, (proven, refuted) in _PROOFS.items():
        if (holds := getattr(weights, key)) is not None:
            sentences.append(proven if holds else refuted)
    return " ".join(sentences)


_PROOFS = {
    "roundtrip": ("The way back is the same, bit for bit.", "THE WAY BACK DIFFERS."),
    "modules_equal": ("LAVIS's own modules hold the same weights.", "LAVIS'S OWN MODULES HOLD OTHER WEIGHTS."),
}


_NOT_WRITTEN = {"tied": "tied to another", "dropped": "dropped as a buffer", "unused": "unused by LAVIS"}


def alt_text(report: Report, arrays: Arrays) -> str:
    table = there(report.weights).bytes_by_kind
    sizes = ", ".join(f"{COMPONENTS.get(name, name)} {as_bytes(sum(kinds.values()))}" for name, kinds in table.items())
    return f"{_files_finding(there(report.weights))}. By component: {sizes}."


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each component and what was done to its bytes."""
    table = there(report.weights).bytes_by_kind
    return [
        {"component": name, "operation": _WORDS.get(kind, kind), "bytes": size}
        for name, kinds in table.items()
        for kind, size in kinds.items()
    ]
