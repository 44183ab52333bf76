"""Numbers, sizes and tokens as people write them, and text that is measured and wrapped before it is drawn."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

from blip2nb.forms import INFINITE


def to_floats(values: Any) -> np.ndarray:
    """None, NaN and infinities of a report as floats."""
    return np.array([math.nan if value is None else float(value) for value in values], dtype=float)


def text_inches(text: str, size: str | float = "medium", weight: str = "normal") -> float:
    """How wide the text is drawn; a little more than its outlines, since hinting moves letters to whole dots."""
    return 1.02 * _ems(text, weight) * font_manager.FontProperties(size=size).get_size_in_points() / 72


@functools.lru_cache(maxsize=16384)
def _ems(text: str, weight: str) -> float:
    """The text's width at a size of one point. A figure asks for the same words at every width that it is drawn at."""
    font = font_manager.FontProperties(size=1, weight=weight)
    points: float = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
    return points


def wrap_text(text: str, room: float, setting: Any = "font.size", weight: str = "normal") -> str:
    """The text in lines of at most `room` inches, at a size of the style; too long a word is cut."""
    size = matplotlib.rcParams[setting]
    lines: list[str] = [""]
    for word in re.split(" (?![×%])", text):  # a number stays with its unit
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if text_inches(longer, size, weight) <= room:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and text_inches(lines[-1] + letter, size, weight) > room:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def as_number(value: float | None) -> str:
    """Two digits, as people write them: 9.3e-7, 0.3, 12."""
    if value is None or math.isnan(value):
        return "NaN"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def tick_label(value: float) -> str:
    return f"{value:g}" if 0.01 <= value < 1e4 else f"1e{round(math.log10(value))}"


def as_plain_times(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if value >= INFINITE:
        return "∞"
    return f"{value:.1f}" if value < 100 else (f"{value:.0f}" if value < 1e5 else as_number(value))


def as_times(value: float) -> str:
    return f"{as_plain_times(value)} ×"


def as_percent(share: float | None) -> str:
    if share is None or math.isnan(share):
        return "NaN %"
    percent = 100 * share
    # 99.96 % must not read as all of them, nor 0.04 % as none.
    if 99 < percent < 100:
        return f"{math.floor(percent * 100) / 100:g} %"
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def as_count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def first_few(names: list[str], most: int) -> str:
    """The first few, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def byte_unit(number: float) -> tuple[float, str]:
    return next(((u, w) for u, w in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= u), (1.0, "bytes"))


def as_token(text: str, spaces: bool = True) -> str:
    """A token as it can be drawn: spaces and line ends made visible, letters that the font lacks by their code."""
    drawn = text.replace("\n", "⏎").replace("\t", "⇥")
    if spaces:
        drawn = drawn.replace(" ", "␣")
    letters = _letters()
    return "".join(c if ord(c) in letters else f"\\u{ord(c):04x}" for c in drawn) or "(empty)"


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(FT2Font(path).get_charmap()) | {ord(" ")}
