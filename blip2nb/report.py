"""A report: everything a verification found, as plain values, with the arrays that a number cannot hold beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.whole import write_whole

if TYPE_CHECKING:
    import numpy as np

INFINITE = 1e9
"""What stands for infinity in report.json, which has no word for it."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of report.json and of arrays.safetensors. Shows its verdict in a notebook."""

    content: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    drawn: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """Figures that are drawn already, by name. `figure` hands out each once and draws a new one from then on."""

    @property
    def verdict(self) -> str:
        """match, explained, diverges or weights_only."""
        return self.content["verdict"]

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    def __repr__(self) -> str:
        more = f"\nTo complete the proof: {self['complete_with']}" if self.content.get("complete_with") else ""
        return f"Report({self['model_name']}: {self.verdict})\n{self['summary']}{more}"

    def _repr_html_(self) -> str:
        from blip2nb.display.text import verdict_html

        return verdict_html(self.content)

    def figure(self, name: str, width: float = 7.0) -> Any:
        """One of the figures (`plots.FIGURES` lists them), or a note where this report has no data for it.

        Raises:
            RequestError: there is no figure of that name.
        """
        from blip2nb.display import plots

        if name not in plots.FIGURES:
            raise RequestError(f"There is no figure {name!r}; there are {', '.join(plots.FIGURES)}.")
        if name not in plots.available(self.content, self.arrays):
            return Note(f"No picture of this ({name}): the report has nothing to draw it from. {self['summary']}")
        if width == 7.0 and name in self.drawn:
            return self.drawn.pop(name)
        return plots.FIGURES[name](self.content, self.arrays, width=width)

    def save(self, folder: Path) -> Path:
        """Write report.json and arrays.safetensors into `folder`, each whole or not at all, and never one without the
        other. Returns the former."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays, text = folder / "arrays.safetensors", folder / "report.json"
        save_file(dict(self.arrays), f"{arrays}.partial")
        content = json.dumps(finite(self.content), indent=1, allow_nan=False) + "\n"
        text.unlink(missing_ok=True)  # killed before the end, there is no report, and never one beside another's arrays
        os.replace(f"{arrays}.partial", arrays)
        write_whole(text, content)
        return text

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Read a run's report. Raises RequestError when there is none, or a damaged one."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / "report.json"
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), load_file(folder / "arrays.safetensors"))
        except FileNotFoundError as error:
            raise RequestError(
                f"{error.filename or path} does not exist: expected a run's folder under outputs/. "
                "`blip2nb verify` writes one."
            ) from error
        except (ValueError, SafetensorError, NotADirectoryError) as error:
            raise RequestError(f"{path} is damaged ({error}). Run `blip2nb verify` again.") from error


class Note(str):
    """A sentence that shows itself as text in a notebook."""

    def _repr_html_(self) -> str:
        import html

        return f"<p><em>{html.escape(self)}</em></p>"


def finite(value: Any) -> Any:
    """NaN as null and infinity as INFINITE, since JSON has neither."""
    if isinstance(value, float):
        return None if math.isnan(value) else math.copysign(INFINITE, value) if math.isinf(value) else value
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value
