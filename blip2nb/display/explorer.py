"""A widget over a run: choose a stage, a token, an image and what to see, and the figure and the numbers follow."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import ipywidgets as widgets
import numpy as np

from blip2nb.display import plots
from blip2nb.display.faults import Faults
from blip2nb.display.figures import inside, one_position
from blip2nb.display.figures.style import Picture
from blip2nb.forms import there
from blip2nb.lavis_env import workbench
from blip2nb.lavis_env.workbench import Sides
from blip2nb.proof.evidence import heads_of
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import RunPaths
from blip2nb.report.schema import Captions, Content, Examined, FirstDivergence
from blip2nb.report.store import ReportData

_VIEWS = {
    "errors over depth": "depth_trace",
    "both models' magnitudes over depth": "activations",
    "errors by stage and token": "stage_by_token",
    "this stage: token × channel": "token_by_channel",
    "this stage: difference against value": "signature",
    "this stage, this token: every channel": "one_position",
    "the logits": "logits",
    "this image: the caption": "captions",
}
_OF_STAGE = ("token_by_channel", "signature", "one_position")
_TOOLTIPS = {
    "show": "which figure",
    "stage": "a place in the network, by its name on both sides",
    "transformers": "what transformers' stage was fed",
    "token": "a position of the stage, from 0 on",
    "image": "which image's caption, from 1 on",
}
# A widget's line is as high as a control, which tears prose apart; a long path is broken, so that its neighbours fit.
_WIDTH = 96 * 7  # a page's dots: the figures are 7 inches wide
_MOST = 5  # channels in the table; chosen by eye, the figure above has them all
_PROSE = "<div style='line-height: 1.4; overflow-wrap: anywhere; white-space: normal'>{}</div>"
_FED = {"as the model runs (drift)": "own", "fed what LAVIS's stage was fed (local error)": "lavis"}


class Explorer:
    """Shows itself in a notebook. Where there is nobody to move it, as in an executed notebook, it is its first figure.
    A new stage is looked at where the two models differ most; one that has a fault is opened, with its causes.

    Attributes:
        stage, view, fed, token, image: the controls, whose `.value` can be set from code as well.
        next_fault: the button that goes on to the next stage with a fault, and from the last to the first.
        tensors: both models' values at the chosen stage.
    """

    def __init__(self, run: RunPaths):
        """Raises RequestError: the run has no report, or its behaviour was not compared."""
        self.run, self.report = run, run.report
        self._content = self.report.content
        self._variant = Manifest.read(run.model).variant
        stages = [stage.name for stage in self._content.stages]
        first = self._content.first_stage or (stages[0] if stages else None)
        images = len(self._content.captions.ladder) if self._content.captions else 1
        self.view = widgets.Dropdown(options=_VIEWS, description="show")
        self.stage = widgets.Dropdown(options=stages, value=first, description="stage")
        self.fed = widgets.Dropdown(options=_FED, value="lavis", description="transformers")
        self.token = widgets.BoundedIntText(min=0, max=0, description="token")
        self.image = widgets.BoundedIntText(value=1, min=1, max=images, description="image")
        self._picture = widgets.Image(format="png", width=_WIDTH, layout=widgets.Layout(max_width="100%"))
        self._words = widgets.HTML()
        self.tensors: Sides | None = None
        for control in (self.view, self.stage, self.fed, self.token, self.image):
            control.layout.width = "32em" if isinstance(control, widgets.Dropdown) else "14em"
            control.style.description_width = "7em"
            control.tooltip = _TOOLTIPS[control.description]
            control.observe(self._changed, "value")
        places = [fault.stage for fault in self._content.faults]
        self._faulty = [name for name in stages if name in places]
        self.next_fault = widgets.Button(description="next fault", disabled=not self._faulty)
        self.next_fault.layout.margin = "2px 2px 2px 1em"
        self.next_fault.on_click(lambda _: self._go_on())
        self._causes = widgets.HTML()
        self._inside = widgets.Image(format="png", width=_WIDTH, layout={"max_width": "100%", "display": "none"})
        rows = ((self.view,), (self.stage, self.next_fault), (self.fed,), (self.token, self.image))
        top = [widgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]
        self._box = widgets.VBox([*top, self._picture, self._words, self._causes, self._inside])
        self._changed(None)

    def inside(self) -> Picture | None:
        """The chosen stage from inside; None where it has no fault, or nothing in it was looked at."""
        return inside.draw(self._here, {}) if inside.available(self._here, {}) else None

    @property
    def _here(self) -> Content:
        """The report with the faults of the chosen stage alone."""
        faults = tuple(one for one in self._content.faults if one.stage == self.stage.value)
        return dataclasses.replace(self._content, faults=faults)

    def _go_on(self) -> None:
        stages = list(self.stage.options)
        here = stages.index(self.stage.value)
        self.stage.value = next((one for one in self._faulty if stages.index(one) > here), self._faulty[0])

    def figure(self) -> Picture | None:
        """The figure for the controls as they are; None where there is none of such values."""
        name = self.view.value
        if not self._content.stages:
            return None
        report, arrays = self._content, self.report.arrays
        if name in _OF_STAGE:
            report, arrays = self._examining(), {**arrays, **self._examined()}
        if name == "captions":
            report = self._of_image(there(report.captions))
        if name == "one_position":
            return one_position.draw(report, arrays, position=self.token.value)
        return plots.FIGURES[name](report, arrays) if name in plots.available(report, arrays) else None

    def _examining(self) -> Content:
        """The report as if the chosen stage were the one that was looked at closely."""
        name, first = self.stage.value, self._content.first_divergence
        fault = next(iter(self._here.faults), None)
        here = first if first and first.stage == name else None
        if here is None and fault is not None:
            cause = fault.causes[0].words if fault.causes else ""
            errors = (fault.arrival_error, fault.local_error, fault.excess)
            here = FirstDivergence(fault.stage, fault.module, fault.part, *errors, cause)
        channels = _flat(there(self.tensors).lavis).shape[1]
        about = Examined(name, heads_of(self._variant, name), channels=channels, channel_step=1)
        return dataclasses.replace(self._content, first_divergence=here, examined=about)

    def _examined(self) -> dict[str, np.ndarray]:
        sides = there(self.tensors)
        return {"examined/lavis": _flat(sides.lavis), "examined/transformers": _flat(sides.transformers)}

    def _of_image(self, said: Captions) -> Content:
        """The report with the captions of the chosen image alone."""
        at = slice(self.image.value - 1, self.image.value)
        alone = dataclasses.replace(
            said,
            lavis={mode: texts[at] for mode, texts in said.lavis.items()},
            huggingface={mode: texts[at] for mode, texts in said.huggingface.items()},
            modes={mode: dataclasses.replace(one, equal=one.equal[at]) for mode, one in said.modes.items()},
            ladder=said.ladder[at],
        )
        return dataclasses.replace(self._content, captions=alone)

    def _changed(self, change: Any) -> None:
        if not self._content.stages:
            self._words.value = html.escape(self._content.summary)
            return
        if change is None or change["owner"] is self.stage:
            self._open_fault()
        if change is None or change["owner"] in (self.stage, self.fed):
            self.tensors = workbench.tensor(self.run, self.stage.value, self.fed.value)
            self.token.unobserve(self._changed, "value")  # drawn once, below
            self.token.max = len(_flat(self.tensors.lavis)) - 1
            self.token.value = _worst_position(self.tensors)
            self.token.observe(self._changed, "value")
        picture = self.figure()
        self._picture.layout.display = "none" if picture is None else None
        if picture is not None:
            self._picture.value = picture._repr_png_()[0]
        missing = f"<p>No picture of this: {self.view.label} of {self.stage.value}.</p>" if picture is None else ""
        self._words.value = _PROSE.format(missing + self._describe())

    def _open_fault(self) -> None:
        """The chosen stage's causes and its inside, where it has a fault; nothing where it has none."""
        faults, picture = Faults(self._here), self.inside()
        self._causes.value = _PROSE.format(faults._repr_html_()) if faults.groups else ""
        self._inside.layout.display = "none" if picture is None else None
        if picture is not None:
            self._inside.value = picture._repr_png_()[0]

    def _describe(self) -> str:
        """The chosen stage and token in numbers: what is behind the figure."""
        sides = there(self.tensors)
        stage = next(one for one in self._content.stages if one.name == self.stage.value)
        ours, theirs = (_flat(values)[self.token.value] for values in sides)
        difference = theirs.astype(float) - ours.astype(float)
        most = np.argsort(-np.abs(difference))[:_MOST]
        rows = "".join(
            _row("td", channel, f"{ours[channel]:.6g}", f"{theirs[channel]:.6g}", f"{difference[channel]:.2e}")
            for channel in most.tolist()
        )
        text = html.escape(_token(self.report, self.stage.value, self.token.value))
        return (
            f"<p><b>{html.escape(repr(sides))}</b><br>LAVIS <code>{html.escape(stage.reference)}</code>, "
            f"transformers <code>{html.escape(stage.module)}</code><br>"
            f"The same arrays: <code>run.tensor({stage.name!r}, fed={self.fed.value!r})</code></p>"
            f"<p>Token {self.token.value}{text}, the channels where they differ most:</p>"
            f"<table>{_row('th', 'channel', 'LAVIS', 'transformers', 'difference')}{rows}</table>"
            "<p>Activations are recorded for the first image; the others have captions alone. On the keyboard, Alt+↓ "
            "opens a list: JupyterLab takes the arrows alone for its cells.</p>"
        )

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and its figure for whoever cannot show widgets."""
        data = self._box._repr_mimebundle_(**options)
        picture = self.figure()
        if picture is None:
            return {**data, "text/plain": repr(self)}, {}
        png, size = picture._repr_png_()
        return {**data, "image/png": png, "text/plain": repr(self)}, {"image/png": size}

    def __repr__(self) -> str:
        return f"Explorer over {self.run.folder.name}: {len(self._content.stages)} stages"


def _row(tag: str, *cells: object) -> str:
    style = "style='text-align: right; padding: 0.1em 0 0.1em 1.2em'"
    return f"<tr>{''.join(f'<{tag} {style}>{cell}</{tag}>' for cell in cells)}</tr>"


def _flat(values: np.ndarray) -> np.ndarray:
    """(positions, channels) of the first image, whatever the stage's own shape."""
    first = values[0] if values.ndim > 2 else values
    return first.reshape(-1, first.shape[-1]) if first.ndim > 1 else first.reshape(-1, 1)


def _worst_position(sides: Sides) -> int:
    """Where they differ most, NaN first; the first position where they do not."""
    errors = np.abs(_flat(sides.transformers).astype(float) - _flat(sides.lavis).astype(float)).max(axis=1)
    return int(np.nan_to_num(errors, nan=np.inf).argmax())


def _token(report: ReportData, stage: str, position: int) -> str:
    """What stands at a position of a stage, where that is known."""
    for part, texts in (report.content.sequences or {}).items():
        if stage.startswith(part) and position < len(texts):
            return f" ({texts[position]!r})"
    return ""
