"""The four files of a sweep's report."""

from __future__ import annotations

import json
from pathlib import Path

from blip2nb.display.overview.junit import junit
from blip2nb.display.overview.markdown import markdown
from blip2nb.display.overview.page import html
from blip2nb.forms import plain
from blip2nb.report.sweep import Index
from blip2nb.whole import write_whole


def texts(index: Index) -> dict[str, str]:
    """File name -> its whole content."""
    return {
        "index.html": html(index),
        "index.json": json.dumps(plain(index), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n",
        "summary.md": markdown(index),
        "junit.xml": junit(index),
    }


def save(index: Index, folder: Path) -> list[Path]:
    """Write the four files into `folder`, each whole or not at all. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in texts(index).items():
        write_whole(folder / name, text)
        written.append(folder / name)
    return written
