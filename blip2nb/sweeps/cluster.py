"""Dask: a cluster of this machine's, or one that is running already, and a sweep's runs on it.

A Dask worker stands for a machine: its threads are the places where runs are made, each in processes of its own, and
its memory is a resource that Dask counts, so that two models that do not fit beside each other never run beside each
other. A worker that is lost is Dask's to replace: its runs are made again elsewhere.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import distributed
from distributed.diagnostics.plugin import WorkerPlugin

from blip2nb import resources
from blip2nb.errors import RequestError
from blip2nb.report.sweep import Outcome
from blip2nb.sweeps import worker
from blip2nb.sweeps.identity import kit
from blip2nb.sweeps.worker import Begun, Task

TOPIC = "blip2nb-sweep"
MEMORY = "MEMORY"
_UNKNOWN = 1 << 60  # beyond any model's need
_LOOK = 2.0  # seconds between two looks at a local cluster's worker. Chosen: a run takes far longer
_MISSING = 6  # so many looks without one: a nanny takes one or two to begin another. Chosen: any few more do
_ANSWERS = 10  # seconds for a scheduler's first answer. Chosen: one that is there takes one


def memory() -> int:
    """Bytes of memory that runs on this machine may take together, also in a container."""
    return int(resources.memory() * resources.SHARE)


@contextlib.contextmanager
def local(slots: int) -> Iterator[distributed.Client]:
    """A cluster on this machine that makes `slots` runs at a time, and is gone at the end."""
    with (
        _quiet(),
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=slots,
            host="127.0.0.1",
            memory_limit=0,  # what the worker's own process takes is little
            resources={MEMORY: memory()},
            dashboard_address="127.0.0.1:0",  # any free port, and nobody else may look
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
        _replaced(cluster, client),
    ):
        yield client


@contextlib.contextmanager
def _replaced(cluster: distributed.LocalCluster, client: distributed.Client) -> Iterator[None]:
    """Begin the worker again where Dask does not: its nanny lets one be that ends while it is starting."""

    def watch() -> None:
        missing = 0
        while not ended.wait(_LOOK):
            missing = 0 if _workers(client) else missing + 1
            if missing == _MISSING:
                cluster.scale(0)
                cluster.scale(1)
                missing = 0

    ended = threading.Event()
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


@contextlib.contextmanager
def remote(address: str) -> Iterator[distributed.Client]:
    """A cluster that is running: its scheduler's address, or the file in which that left it.

    Raises:
        RequestError: nothing answers there, or a worker has no blip2nb or another one.
    """
    where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
    with _quiet():
        try:
            client = distributed.Client(**where, timeout=_ANSWERS)
        except (OSError, ValueError) as error:
            raise RequestError(
                f"No Dask scheduler answers at {address}. Start one with `dask scheduler`, and workers with "
                f"`dask worker {address}`."
            ) from error
        with client:
            _prepare(client)
            yield client


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own log tells of lost workers and closed connections with tracebacks; what matters of it is said here."""
    log = logging.getLogger("distributed")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with dask.config.set({"logging.distributed": "critical"}):  # the worker's process takes it over
            yield
    finally:
        log.setLevel(before)


class _Memory(WorkerPlugin):
    """Makes a worker's memory a resource, also of workers that join later, where its owner has not done so."""

    name = "blip2nb-memory"

    async def setup(self, worker: distributed.Worker) -> None:
        if MEMORY not in worker.state.total_resources:
            limit = worker.memory_manager.memory_limit or resources.memory()
            await worker.set_resources(**{MEMORY: int(limit * resources.SHARE)})


def _prepare(client: distributed.Client) -> None:
    try:
        found = client.run(kit)
        client.register_plugin(_Memory())
    except ModuleNotFoundError as error:
        raise RequestError(
            f"The cluster's workers lack a package ({error}). Install blip2nb where they run."
        ) from error
    other = [address for address, one in found.items() if one != kit()]
    if other:
        raise RequestError(
            f"The worker {other[0]} has another version of blip2nb than this one. Install the same on all of them."
        )
    if not found:
        logging.getLogger("blip2nb").info("the cluster has no worker yet; waiting for one")


def largest(client: distributed.Client) -> int:
    """Bytes of memory of the largest worker; beyond any model's need while there is none."""
    return int(max((one["resources"].get(MEMORY, 0) for one in _workers(client)), default=_UNKNOWN))


def slots(client: distributed.Client) -> int:
    """How many runs the cluster can make at a time, as it is now."""
    return sum(one["nthreads"] for one in _workers(client))


def _workers(client: distributed.Client) -> list[dict[str, Any]]:
    return list(client.scheduler_info(n_workers=-1)["workers"].values())


def run(
    client: distributed.Client,
    tasks: Sequence[Task],
    needs: Mapping[str, int],
    cores: int,
    say: Callable[[Begun], None],
    window: int,
) -> Iterator[Outcome]:
    """Make all runs, the first ones first, and yield each outcome as it comes.

    Args:
        needs: bytes of memory by the run's name.
        cores: those of a worker's machine; 0 for as many as it has threads, as is usual with Dask.
        say: told of each cell as it begins. Called in another thread.
        window: how many are given to Dask at a time. When a worker is lost, Dask holds that against all runs that it
            had been given, begun or not, and gives one up after four; it is then made once more, beside no other.
    """
    client.subscribe_topic(TOPIC, lambda event: say(event[1]))
    waiting, suspects = collections.deque(tasks), collections.deque[Task]()
    futures, begun_alone = {}, set()
    running = distributed.as_completed()
    whole = largest(client)  # now: when it is needed, the worker may be gone and its successor not there yet

    def begin(task: Task, alone: bool = False) -> None:
        need = whole if alone else needs[task.name]
        future = client.submit(
            _on_worker,
            task,
            need,
            cores,
            key=f"{task.name}-{uuid.uuid4().hex}",  # its own: another sweep may have asked the same of this cluster
            resources={MEMORY: need},
            priority=-tasks.index(task),
            pure=False,
        )
        futures[future] = task
        running.add(future)

    def fill() -> None:
        if suspects:
            if not futures:
                begin(suspects.popleft(), alone=True)
            return
        while waiting and len(futures) < window:
            begin(waiting.popleft())

    try:
        fill()
        for future in running:
            task = futures.pop(future)
            if (
                isinstance(future.exception(), distributed.KilledWorker)
                and task.name not in begun_alone
                and whole < _UNKNOWN
            ):
                begun_alone.add(task.name)  # was it this one, or one beside it, that cost so many workers?
                suspects.append(task)  # one after the other: a lost worker counts against all that it was given
            else:
                yield _outcome(future, task)
                future.release()
            fill()
    finally:
        client.cancel(list(futures), force=True)
        client.unsubscribe_topic(TOPIC)


def _on_worker(task: Task, need: int, cores: int) -> Outcome | None:
    here = distributed.get_worker()
    key = here.get_current_task()
    beside = min(here.state.nthreads, int(here.state.total_resources[MEMORY] // need))
    slot = f"{here.name}-{threading.get_ident()}"

    def say(**event: Any) -> None:
        here.log_event(TOPIC, {"run": task.name, "slot": slot, **event})

    def wanted() -> bool:
        found = here.state.tasks.get(key)
        return found is not None and found.state == "executing"

    return worker.run(task, max(1, (cores or here.state.nthreads) // max(1, beside)), say, wanted)


def _outcome(future: distributed.Future, task: Task) -> Outcome:
    try:
        outcome = future.result()
    except distributed.KilledWorker:
        return worker.give_up(task, "Every worker that began it was lost: often that is a lack of memory.")
    except Exception as error:
        return worker.give_up(task, f"{type(error).__name__}: {error}")
    return outcome or task.outcome("not run")
