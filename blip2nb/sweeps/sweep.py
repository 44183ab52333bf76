"""A sweep: which of its runs are finished already, the others made on a cluster, and the report over all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import logging
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import Diverges, RequestError
from blip2nb.report.store import INCOMPLETE, content_of
from blip2nb.report.sweep import Entry, Index, Outcome
from blip2nb.resources import cores
from blip2nb.sizes import as_bytes
from blip2nb.sweeps import worker
from blip2nb.sweeps.asked import Asked
from blip2nb.sweeps.identity import key_of
from blip2nb.sweeps.place import FAILED, Folder, Place, place
from blip2nb.sweeps.worker import Task

if TYPE_CHECKING:
    import distributed

    from blip2nb.variants import Variant

log = logging.getLogger("blip2nb")

_BASE = 1_300_000_000
"""Bytes of memory that a run takes beside its model: kernel, libraries, figures. On a twin it was 1.1 GB; a fifth more
is chosen, for figures of longer sequences."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found: the content of index.json. Shows itself as a table in a notebook.

    Attributes:
        address: the folder, or the address, that holds it.
    """

    address: str
    index: Index = dataclasses.field(repr=False)

    @property
    def runs(self) -> tuple[Entry, ...]:
        """One entry for each run that was asked for."""
        return self.index.runs

    @property
    def status(self) -> int:
        """What the command line ends with: 3 if a run failed or was not made, else 1 if one diverges, else 4 if one
        lacks something of the proof that was asked for, else 0."""
        if any(run.state != "finished" for run in self.runs):
            return 3
        if any(run.verdict == "diverges" for run in self.runs):
            return Diverges.exit_status
        return INCOMPLETE if any(run.missing for run in self.runs) else 0

    def _rows(self) -> list[tuple[str, str, str]]:
        """Of each run its name, what it came to, and what matters most of it."""
        return [(run.run_name, run.verdict or run.state, _words(run)) for run in self.runs]

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[n]) for row in rows) for n in range(2)]
        lines = [f"  {name:<{widths[0]}}  {found:<{widths[1]}}  {words}".rstrip() for name, found, words in rows]
        return "\n".join([self.index.sentence, "", *lines, "", f"  report  {self.address}/index.html"])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(one)}</td>' for one in row)}</tr>" for row in self._rows())
        return f"<p><strong>{html.escape(self.index.sentence)}</strong></p><table>{rows}</table>"


def _words(run: Entry) -> str:
    """What matters most of a run, on one line."""
    first = run.first_divergence
    if run.error:
        return run.error
    if first and run.verdict == "diverges":
        return f"first wrong at {first.stage}: {first.cause}"
    took = "finished before" if run.earlier else worker.duration(run.seconds)
    if run.missing:
        return "; ".join([took, *run.missing])
    layers = run.proofs.layers
    return "; ".join([took] + [f"layers {layers.words}"] * (layers.state != "not done"))


def sweep(
    runs: Sequence[Asked],
    output: str | Path = "",
    *,
    workers: int = 0,
    scheduler: str = "",
    timeout: float = 0.0,
    keep_models: bool = False,
    overwrite: bool = False,
) -> Sweep:
    """Make all runs that are not finished, and the report over all. Arguments as for `api.sweep`."""
    where = place(output)
    with where.lock(), _terminated_as_interrupted():
        tasks = [_task(run, where, timeout, keep_models, overwrite) for run in runs]
        outcomes = {} if overwrite else _finished(tasks, where)
        todo = [(run, task) for run, task in zip(runs, tasks, strict=True) if task.name not in outcomes]
        if outcomes:
            log.info("%d of %d are finished already; kept", len(outcomes), len(tasks))
        try:
            if todo:
                with _cluster(scheduler, workers, len(todo)) as (client, cores):
                    for outcome in _make(client, cores, todo):
                        outcomes[outcome.run_name] = outcome
        finally:
            found = _report(tasks, outcomes, where)
    return found


def gather(runs: Sequence[Asked], output: str | Path = "") -> Sweep:
    """The report over runs that are there, whoever made them, without making any."""
    where = place(output)
    tasks = [_task(run, where) for run in runs]
    records = where.records()
    outcomes = {}
    for task in tasks:
        record = records.get(task.name) or records.get(f"{task.name}{FAILED}")
        report = where.read(f"{task.name}/report.json")
        if record is not None:
            outcomes[task.name] = dataclasses.replace(record, earlier=True)
        elif report is not None:  # made by hand
            verdict = content_of(report, f"{task.name}/report.json").verdict
            made = task.outcome("finished")
            outcomes[task.name] = dataclasses.replace(made, verdict=verdict, folder=task.name, earlier=True)
    return _report(tasks, outcomes, where)


def lines(runs: Sequence[Asked], output: str | Path = "", keep_models: bool = False) -> list[str]:
    """A papermill command for each run that is not finished, for xargs, job arrays and the like."""
    where = place(output)
    tasks = [_task(run, where, 0.0, keep_models) for run in runs]
    done = _finished(tasks, where)
    out = []
    for run, task in zip(runs, tasks, strict=True):
        if task.name in done:
            continue
        given = {**task.parameters, "run_name": task.name, "output_dir": where.address, "keep_model": keep_models}
        words = ["papermill", str(run.notebook.path), f"{where.address}/{task.name}.ipynb"]
        for name, value in given.items():
            if name in task.declared:
                words += ["-r" if isinstance(value, str) else "-p", name, str(value)]
        out.append(shlex.join(words))
    if out and isinstance(where, Folder):
        where.root.mkdir(parents=True, exist_ok=True)  # papermill refuses to write to a folder that is not there
    return out


def seconds(text: str | float) -> float:
    """A time such as 90, 90s, 15min or 2h, in seconds; 0 for "".

    Raises:
        RequestError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)?", str(text or 0).strip())
    if found is None:
        raise RequestError(f"timeout should be a time such as 90s, 15min or 2h, found {text!r}.")
    return float(found[1]) * {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}[found[2] or "s"]


def _task(run: Asked, where: Place, timeout: float = 0.0, keep_models: bool = False, overwrite: bool = False) -> Task:
    return Task(
        name=run.name,
        key=key_of(run),
        notebook=run.notebook.name,
        folder=str(run.notebook.path.parent),
        text=run.notebook.text,
        parameters=run.parameters,
        declared=tuple(run.notebook.declared),
        output=where.address,
        keep_model=keep_models,
        overwrite=overwrite,
        timeout=timeout,
    )


def _finished(tasks: Sequence[Task], where: Place) -> dict[str, Outcome]:
    """The outcomes of earlier sweeps that still hold: made of the same, and nothing was changed since."""
    records = where.records()
    found = {}
    for task in tasks:
        record = records.get(task.name)
        if record is None or record.key != task.key or record.state != "finished":
            continue
        report = where.read(f"{task.name}/report.json")
        same = record.report == worker.hash_of_report(report)
        there = not record.kept or where.read(f"{task.name}/model/config.json") is not None
        kept = not task.keep_model or (record.keep_model and there)
        if same and kept:
            found[task.name] = dataclasses.replace(record, earlier=True)
    return found


@contextlib.contextmanager
def _cluster(scheduler: str, workers: int, runs: int) -> Iterator[tuple[distributed.Client, int]]:
    """A client, and the cores of its workers' machine where there is one machine."""
    from blip2nb.sweeps import cluster

    if scheduler:
        with cluster.remote(scheduler) as client:
            yield client, 0
    else:
        here = cores()
        with cluster.local(min(workers or here, runs)) as client:
            yield client, here


def _make(client: distributed.Client, cores: int, todo: Sequence[tuple[Asked, Task]]) -> Iterator[Outcome]:
    """The outcomes of all runs, as they come. Those that take longest are begun first, so that none is left alone."""
    from blip2nb.sweeps import cluster
    from blip2nb.sweeps.progress import Board

    largest = cluster.largest(client)
    sized = {task.name: _Need.of(run, largest) for run, task in todo}
    with Board(len(todo)) as board:
        fitting = []
        for _, task in sorted(todo, key=lambda one: -sized[one[1].name].work):
            if sized[task.name].refused:
                outcome = dataclasses.replace(task.outcome("failed"), error=sized[task.name].refused)
                board.done(outcome)
                yield outcome
            else:
                fitting.append(task)
        needs = {task.name: sized[task.name].memory for task in fitting}
        window = cluster.slots(client) if cores else len(fitting)  # a cluster may grow while it works
        for outcome in cluster.run(client, fitting, needs, cores, board.cell, window):
            board.done(outcome)
            yield outcome


@dataclasses.dataclass(frozen=True)
class _Need:
    """What a run takes: bytes of memory, and how much work it is beside others. Or why it cannot be made."""

    memory: int
    work: float
    refused: str = ""

    @classmethod
    def of(cls, run: Asked, largest: int) -> _Need:
        """
        Args:
            largest: bytes of memory of the largest worker. A model that fits in none is proven by
                its weights alone, as it would be by hand, unless both proofs were asked for.
        """
        from blip2nb.conversion.preview import CONVERTING, memory_proving

        model = _model_of(run)
        if model is None:
            return cls(_BASE, 0.0)
        proving, proof = memory_proving(model), run.parameters.get("proof", "auto")
        work = proving * model.vision_tokens
        fits = proving <= largest
        if proof == "weights" or (not fits and proof != "both"):
            return cls(_BASE + CONVERTING, work)
        if not fits:
            return cls(0, work, f"Running {model.name} in float32 takes {as_bytes(proving)} of memory; the largest "
                       f"worker has {as_bytes(largest)}. Use a larger machine, or proof weights.")  # fmt: skip
        need = _BASE + proving
        return cls(min(need, largest), work)


def _model_of(run: Asked) -> Variant | None:
    """The variant that a run is of, as far as that can be told before it runs."""
    source = str(run.parameters.get("source") or run.parameters.get("checkpoint") or "")
    model = run.model or ("" if source else str(run.notebook.declared.get("model_name", "")))
    try:
        if model:
            from blip2nb.variants import variant

            return variant(model)
        if source:
            from blip2nb.conversion.files import which

            return which("", source)
    except RequestError:
        pass  # which the run will say, and keep in its notebook
    return None


def _report(tasks: Iterable[Task], outcomes: Mapping[str, Outcome], where: Place) -> Sweep:
    """Write the report over all runs, in the order in which they were asked for."""
    from blip2nb.display.overview.entry import summarise
    from blip2nb.display.overview.files import texts
    from blip2nb.display.overview.index import index

    entries = []
    for task in tasks:
        outcome = outcomes.get(task.name) or task.outcome("not run")
        path = f"{outcome.folder}/report.json"
        report = where.read(path) if outcome.state == "finished" else None
        entries.append(summarise(outcome, None if report is None else content_of(report, path)))
    found = index(entries)
    where.write(texts(found))
    return Sweep(where.address, found)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does: cleanly, with what is finished."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
