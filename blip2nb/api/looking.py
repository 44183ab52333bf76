"""The verbs for looking at what was found: show, draw, figures, explore, diff; and the end of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.api.common import run_of
from blip2nb.handles import Difference, Report, Run

if TYPE_CHECKING:
    from blip2nb.display.explorer import Explorer
    from blip2nb.display.figures.style import Picture

log = logging.getLogger("blip2nb")


def show(target: str | Path | Run) -> str:
    """A run in words: the verdict, the numbers behind it, and where everything lies."""
    from blip2nb.display.text import describe

    run = run_of(target)
    return describe(run)


def draw(run: Run, report: Report | None = None) -> dict[str, Picture]:
    """Draw every figure that the run's report has data for into its figures/ folder, and make report.html of them.

    Args:
        report: the run's, where it is in memory already.

    Returns:
        The figures by name, each drawn once: shown in a notebook, it is what was written.
    """
    from blip2nb.display.narrow import narrow_pictures

    report = report or run.report
    run.figures.mkdir(parents=True, exist_ok=True)
    with narrow_pictures(run.folder) as narrow:
        from blip2nb.display import page, plots  # takes half a second, as long as that process takes to begin

        for stem in plots.FIGURES:  # of an earlier report, which may have had data for more
            for path in run.figures.glob(f"{stem}*"):
                path.unlink()
        pictures, wide = plots.save_all(report.content, report.arrays, run.figures)
        page.save(report.content, report.arrays, run.page, wide, narrow())
    return pictures


def export_figures(target: str | Path | Run, folder: str | Path = "") -> list[Path]:
    """Write each of a run's figures as a paper or a talk needs it: SVG, PDF and PNG at 3.4 and 7.0 inches, the data it
    draws as CSV, and its alt text.

    Args:
        target: a run's folder or name, or a run.
        folder: where to; the run's figures/export/ unless given.

    Returns:
        The files' paths.

    Raises:
        RequestError: there is no such run, or it was not verified.
    """
    from blip2nb.display import plots

    run = run_of(target)
    report = run.report
    return plots.export(report.content, report.arrays, Path(folder).expanduser() if folder else run.figures / "export")


def explore(target: str | Path | Run) -> Explorer:
    """A widget to look around in a run: choose stage, token and image, see the figure and the numbers change.

    Args:
        target: a run's folder or name, or a run.

    Raises:
        RequestError: there is no such run, it was not verified, or its converted model was removed.
    """
    from blip2nb.display.explorer import Explorer

    return Explorer(run_of(target))


def diff(run_a: str | Path | Run, run_b: str | Path | Run) -> Difference:
    """What is different between two runs that were verified: verdicts, stages, output, parameters and versions.

    Args:
        run_a, run_b: runs, their folders or names, or converted directories. Of the same model or of two; where the
            behaviour of one was not compared with LAVIS's, the rest is compared.

    Raises:
        RequestError: one is no run, or was not verified yet.
    """
    one, other = map(run_of, (run_a, run_b))
    return Difference.of(one.report, other.report, (one.folder.name, other.folder.name))


def finish(run: Run, keep_model: bool = True) -> None:
    """The end of a run: remove its converted model where it is not to be kept. Everything else stays.

    The same `convert` makes the same model again.

    Raises:
        RequestError: what stands in the model's place is not a conversion of this kit.
    """
    if keep_model or not run.model.exists():
        return
    from blip2nb import clean

    clean.remove_model(run)
    log.info("removed the converted model %s; report and figures stay", run.model)
