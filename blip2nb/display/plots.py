"""The figures by name: which of them a report has data for, drawing one, saving them all."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from blip2nb.display.figures import (
    activations,
    before_and_after,
    captions,
    depth_trace,
    files,
    fusion,
    inside,
    logits,
    pixels,
    signature,
    stage_by_token,
    stage_map,
    token_by_channel,
    worst_image,
)
from blip2nb.display.figures.style import DPI, Arrays, Draw, Picture, Report, Row, rasterise, style

_MODULES: dict[str, ModuleType] = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (
        stage_map,
        files,
        fusion,
        pixels,
        depth_trace,
        before_and_after,
        activations,
        stage_by_token,
        token_by_channel,
        signature,
        inside,
        logits,
        captions,
        worst_image,
    )
}

FIGURES: dict[str, Draw] = {name: module.draw for name, module in _MODULES.items()}
"""Name -> the function that draws it from a report and its arrays."""

WIDTHS = (3.4, 7.0)
"""Inches: a column and a page of a paper."""


def available(report: Report, arrays: Arrays) -> list[str]:
    """The figures for which the report and its arrays hold the data, in the order of FIGURES."""
    return [name for name, module in _MODULES.items() if module.available(report, arrays)]


def alt_text(name: str, report: Report, arrays: Arrays) -> str:
    """One or two sentences with the numbers, for whoever cannot see the figure.

    Raises:
        KeyError: there is no figure of that name.
    """
    return _MODULES[name].alt_text(report, arrays)


def table(name: str, report: Report, arrays: Arrays) -> list[Row]:
    """The data that the figure draws, a dictionary a row, all with the same columns.

    Raises:
        KeyError: there is no figure of that name.
    """
    return _MODULES[name].table(report, arrays)


def save(
    report: Report,
    arrays: Arrays,
    folder: Path,
    widths: Sequence[float] = (7.0,),
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write every figure for which there is data, and return the paths.

    Args:
        report: as in report.json.
        arrays: as in arrays.safetensors.
        folder: made if it is not there.
        widths: inches. One gives `<name>.<format>`, several `<name>-<width>in.<format>`.
        formats: of png, svg and pdf (with fonts that can be edited).
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in available(report, arrays):
        alt = alt_text(name, report, arrays)
        for width in widths:
            picture = FIGURES[name](report, arrays, width)
            for kind in formats:
                path = folder / f"{name}{f'-{width:g}in' if len(widths) > 1 else ''}.{kind}"
                written.append(save_picture(picture, path, name, alt))
    return written


def save_all(report: Report, arrays: Arrays, folder: Path) -> tuple[dict[str, Picture], dict[str, Image.Image]]:
    """Write every figure for which there is data as a PNG, 7 inches wide, drawing each once.

    Returns:
        The figures by name, which keep the PNG, and the same as RGB images.
    """
    pictures, images = {}, {}
    for name in available(report, arrays):
        pictures[name] = FIGURES[name](report, arrays, 7.0)
        images[name] = rasterise(pictures[name], DPI)
        path = save_image(images[name], folder / f"{name}.png", name, alt_text(name, report, arrays))
        pictures[name].keep(path.read_bytes())
    return pictures, images


def save_picture(picture: Figure, path: Path, name: str, alt: str) -> Path:
    """Write one picture, of a kind that its path's ending says, with its name and alt text in it. Returns the path."""
    if path.suffix == ".png":
        return save_image(rasterise(picture, DPI), path, name, alt)
    with style(picture.get_figwidth()):
        layout = picture.get_layout_engine()
        if layout is not None:  # once, for all files: matplotlib would draw the whole picture in vain for each of them
            picture.set_dpi(DPI)
            FigureCanvasAgg(picture)
            layout.execute(picture)
            picture.set_layout_engine(None)
        picture.savefig(path, dpi=DPI, metadata=_metadata(path.suffix[1:], name, alt))
    return path


def save_image(image: Image.Image, path: Path, name: str, alt: str) -> Path:
    """Write one picture that was drawn already as a PNG, with its name and alt text in it. Returns the path."""
    written = PngInfo()
    for key, value in _metadata("png", name, alt).items():
        written.add_text(key, value)
    image.save(path, "PNG", dpi=(DPI, DPI), pnginfo=written, compress_level=3)
    return path


def export(report: Report, arrays: Arrays, folder: Path) -> list[Path]:
    """Everything that a paper or a talk needs of each figure: SVG, PDF and PNG in two widths, its data, its alt text.

    Returns:
        The paths: for each figure `<name>-<width>in.<format>`, `<name>.csv` and `<name>.txt`.
    """
    written = save(report, arrays, folder, WIDTHS, ("svg", "pdf", "png"))
    for name in available(report, arrays):
        data, words = folder / f"{name}.csv", folder / f"{name}.txt"
        words.write_text(alt_text(name, report, arrays) + "\n", encoding="utf-8")
        rows = table(name, report, arrays)
        with data.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        written += [data, words]
    return sorted(written)


def _metadata(kind: str, name: str, alt: str) -> dict[str, Any]:
    """The alt text travels with the file; the date does not, so that the same report gives the same bytes."""
    if kind == "pdf":
        return {"Title": name, "Subject": alt, "CreationDate": None}
    return {"Title": name, "Description": alt} | ({"Date": None} if kind == "svg" else {})
