"""Progress bars, as text: on a terminal on standard error, in a notebook among the cell's own output."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(**how: Any) -> Any:
    """A tqdm bar. In a kernel it goes to standard output, since Jupyter shows standard error as if something was wrong;
    as text there too, since a widget's bar stays empty in a notebook that papermill has executed."""
    from tqdm import tqdm

    return tqdm(file=sys.stdout if "ipykernel.kernelapp" in sys.modules else sys.stderr, **how)
