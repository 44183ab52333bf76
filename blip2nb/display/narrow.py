"""What report.html shows on a phone, drawn by a process of its own while this one draws what it shows on a desk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.resources import cores

if TYPE_CHECKING:  # matplotlib is imported by both processes at the same time
    from blip2nb.display.page import Shown


@contextlib.contextmanager
def narrow_pictures(folder: Path) -> Iterator[Callable[[], dict[str, Shown]]]:
    """Begin to draw them on another core.

    Args:
        folder: where report.json and arrays.safetensors are.

    Returns:
        A function that waits for the pictures and gives them by name; none of them if there is no other core, or if
        the process was ended, for lack of memory or another reason. `page.render` draws what it is not given.
    """
    if cores() < 2:
        yield dict
        return
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def wait() -> dict[str, Shown]:
        from blip2nb.display.page import Shown

        said = process.communicate()[0]
        return {} if process.returncode else {name: Shown(*one) for name, one in json.loads(said).items()}

    with process:
        try:
            yield wait
        finally:
            process.kill()


def main() -> None:
    """What the process does: name -> picture on standard output."""
    from blip2nb.display import page, plots
    from blip2nb.report.store import ReportData

    report = ReportData.load(Path(sys.argv[1]))
    there = plots.available(report.content, report.arrays)
    drawn = {name: page.narrow(name, report.content, report.arrays) for name in there}
    json.dump({name: dataclasses.astuple(one) for name, one in drawn.items()}, sys.stdout)


if __name__ == "__main__":
    main()
