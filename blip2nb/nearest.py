"""The name that was probably meant by one that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_ALIKE = 0.4
"""difflib's own 0.6 misses names that somebody shortened: "flant5" is like "blip2-flan-t5-xl" by 0.55, "hub" like
"push_to_hub" by 0.43."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Of some names the one most like `name`; None where none is much like it."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=_ALIKE)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The question to put behind the sentence of an error, with a space before it; "" where nothing is like `name`."""
    found = nearest(name, names)
    return "" if found is None else f" Did you mean {found!r}?"
