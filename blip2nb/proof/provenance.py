"""What was compared with what: names and hashes of a directory, its recording, and the libraries that compare."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

from blip2nb._version import __version__
from blip2nb.conversion.hub import CARD
from blip2nb.families.captioners.recording import recording
from blip2nb.report.schema import Reference
from blip2nb.trace.tape import Tape


def reference(tape: Tape) -> Reference:
    """What the report says of the recording that the directory was compared with."""
    told = recording(tape)
    return Reference(
        source_hash=told["source_hash"],
        inputs_hash=told["inputs_hash"],
        device=told["device"],
        texts={name: tuple(texts) for name, texts in told["texts"].items()},
        versions=told["versions"],
    )


def state(folder: Path) -> str:
    """What tells at a glance that a converted directory is as it was: its files' names, sizes and times of change. The
    card is no part of it: it says what was found, and is written after."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in CARD]
    text = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """What compares: library -> version."""
    import torch
    import transformers

    return {
        "blip2nb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
