"""What people hold in a notebook: a run, and its report. They show themselves, and lead to values, figures and models.

What they are made of is plain: `report.runs.RunPaths` and `report.store.ReportData`.
"""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.display.difference import ReportDifference
from blip2nb.errors import RequestError
from blip2nb.report.runs import RunPaths
from blip2nb.report.store import ReportData

if TYPE_CHECKING:
    from blip2nb.display.figures.style import Picture
    from blip2nb.display.text import Note
    from blip2nb.lavis_env.workbench import Sides
    from blip2nb.trace.step import Step
    from blip2nb.trace.tape import Tape


@dataclasses.dataclass(frozen=True)
class Report(ReportData):
    """The content of report.json and of arrays.safetensors. Shows its verdict in a notebook."""

    drawn: dict[str, Picture] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """Figures that are drawn already, by name. `figure` hands out each once and draws a new one from then on."""

    def __repr__(self) -> str:
        command = self.content.complete_with
        more = f"\nTo complete the proof: {command}" if command else ""
        return f"Report({self.content.model_name}: {self.verdict})\n{self.content.summary}{more}"

    def _repr_html_(self) -> str:
        from blip2nb.display.text import verdict_html

        return verdict_html(self.content)

    def figure(self, name: str, width: float = 7.0) -> Picture | Note:
        """One of the figures (`plots.FIGURES` lists them), or a note where this report has no data for it.

        Raises:
            RequestError: there is no figure of that name.
        """
        from blip2nb.display import plots
        from blip2nb.display.text import Note

        if name not in plots.FIGURES:
            raise RequestError(f"There is no figure {name!r}; there are {', '.join(plots.FIGURES)}.")
        if name not in plots.available(self.content, self.arrays):
            return Note(f"No picture of this ({name}): the report has nothing to draw it from. {self.content.summary}")
        if width == 7.0 and name in self.drawn:
            return self.drawn.pop(name)
        return plots.FIGURES[name](self.content, self.arrays, width=width)


@dataclasses.dataclass(frozen=True)
class Run(RunPaths):
    """A run: its places, and what lies there.

    Attributes:
        folder: holds tape.safetensors, report.json, arrays.safetensors, report.html and figures/.
        model: the converted directory, which `from_pretrained` loads.
    """

    @property
    def report(self) -> Report:
        """Raises RequestError when the run was not verified yet."""
        return Report.load(self.folder)

    @property
    def tape(self) -> Tape:
        """The run's own recording. Raises FileNotFoundError when it has none (a shipped one may fit)."""
        from blip2nb.trace.tape import Tape  # which needs torch

        return Tape(self.tape_path)

    def tensor(self, stage: str, fed: str = "own") -> Sides:
        """Both models' values at a stage, as arrays: `lavis, transformers = run.tensor("vision.block.02")`.

        Args:
            stage: its name, as in the report and the figures.
            fed: "own" for what transformers' stage gives as the model runs, "lavis" for what it gives when it is fed
                exactly what LAVIS's stage was fed.

        Returns:
            `Sides`, with `.lavis`, `.transformers`, `.difference` and `.error`. The first call runs the model and
            keeps what it found in the run's folder.

        Raises:
            RequestError: there is no such stage, no converted model, or no recording of LAVIS.
        """
        from blip2nb.lavis_env import workbench

        return workbench.tensor(self, stage, fed)

    def step(self, stage: str, lavis_python: str | Path = "") -> Step:
        """Stand at a stage with both models live: `step = run.step("vision.post_layernorm")`, then `step()` runs both
        on the same inputs; `step.candidate` is transformers' module and `step.reference` LAVIS's, each with the inputs
        it is called with, ready to be changed and run again.

        Args:
            stage: its name.
            lavis_python: the python of an environment with LAVIS, where it is not the one that is found by itself.
                Where there is none, the recording stands in for LAVIS.

        Raises:
            RequestError: there is no such stage, or nothing is computed there.
        """
        from blip2nb.lavis_env import workbench

        return workbench.step(self, stage, lavis_python)

    def release(self) -> None:
        """Let go of the models that `tensor` and `step` hold in memory, and with them of every change made to them.
        Looking at another run does so too."""
        from blip2nb.lavis_env import workbench

        workbench.release()

    def __repr__(self) -> str:
        lines = [f"  {word:8s} {path}" for word, path in ({"model": self.model} | self.left()).items()]
        return "\n".join([f"Run {self.folder.name}", *lines])

    def _repr_html_(self) -> str:
        places = {"model": self.model} | self.left()
        rows = "".join(
            f"<tr><th align='left'>{word}</th><td align='left'><code>{html.escape(str(path))}</code></td></tr>"
            for word, path in places.items()
        )
        return f"<strong>Run {html.escape(self.folder.name)}</strong><table>{rows}</table>"


_PICTURES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True, repr=False)
class Difference(ReportDifference):
    """What is different between two runs, A and B, with a picture of it."""

    def figure(self, width: float = 7.0) -> Picture | Note:
        """The comparison as a picture, or a note where a run's behaviour was not compared.

        Args:
            width: inches.
        """
        from blip2nb.display.figures import two_runs
        from blip2nb.display.text import Note

        if not two_runs.available(self):
            return Note(f"No picture of this: {self.finding}.")
        return two_runs.draw(self, width)

    def draw(self, path: str | Path, width: float = 7.0) -> Path:
        """Write the picture to a .png, .svg or .pdf file, with its alt text in it, and return the path.

        Raises:
            RequestError: the name ends otherwise, its folder is not there, or there is nothing to draw.
        """
        from blip2nb.display.plots import save_picture
        from blip2nb.display.text import Note

        path = Path(path).expanduser()
        if path.suffix not in _PICTURES:
            raise RequestError(f"A picture's file should end with {', '.join(_PICTURES)}, found {path.name!r}.")
        if not path.parent.is_dir():
            raise RequestError(f"{path.parent} is no folder: make it first, or give another place for the picture.")
        picture = self.figure(width)
        if isinstance(picture, Note):
            raise RequestError(f"{picture} {path} was not written.")
        return save_picture(picture, path, "two_runs", picture.alt)
