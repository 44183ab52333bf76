"""What a sweep is doing: on a terminal a bar and a line for each worker, elsewhere a line for each run that ends."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from blip2nb.report.sweep import Outcome
from blip2nb.sweeps.worker import Begun, duration

log = logging.getLogger("blip2nb")


class Board:
    """Shows a sweep while it runs. Use it as a context."""

    def __init__(self, total: int):
        self._live = sys.stderr.isatty()
        self._total, self._done = total, 0
        self._lines: dict[str, tqdm] = {}
        self._running: dict[str, str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Board:
        if self._live:
            self._redirect = logging_redirect_tqdm()
            self._redirect.__enter__()
            self._bar = tqdm(total=self._total, unit="run", desc="sweep", position=0, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            for line in [*self._lines.values(), self._bar]:
                line.close()
            self._redirect.__exit__(kind, error, trace)

    def cell(self, event: Begun) -> None:
        """A cell begins."""
        if not self._live:
            return
        with self._lock:
            line = self._lines.get(event["slot"])
            if line is None:
                where = len(self._lines) + 1
                line = tqdm(total=1, position=where, bar_format="  {desc}", leave=False, dynamic_ncols=True)
                self._lines[event["slot"]] = line
            self._running[event["slot"]] = event["run"]
            line.set_description_str(f"{event['run']}  cell {event['cell']} of {event['of']}  {event['title']}")

    def done(self, outcome: Outcome) -> None:
        """A run has ended."""
        self._done += 1
        said = outcome.verdict or outcome.state
        log.info(
            "%*d of %d  %s: %s, %s%s",
            len(str(self._total)), self._done, self._total, outcome.run_name, said,
            duration(outcome.seconds), f". {outcome.error}" if outcome.error else "",
        )  # fmt: skip
        if self._live:
            with self._lock:
                self._bar.update()
                for slot, name in self._running.items():
                    if name == outcome.run_name:
                        self._lines[slot].set_description_str("")
