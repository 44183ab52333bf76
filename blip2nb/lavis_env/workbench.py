"""Looking around in a run by hand: both models' values at any stage, and standing at one with both models live.

What takes long is done once: the converted model and LAVIS stay in memory for as long as the kernel lives, and the
values at the stages are kept in the run's folder, so that a restarted kernel finds them again.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blip2nb.conversion.files import open_source
from blip2nb.errors import RequestError, did_you_mean
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.stages import stages
from blip2nb.lavis_env import reference
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.lavis_env.session import LavisModule, LavisSession
from blip2nb.proof.behaviour import tape_images
from blip2nb.proof.provenance import state, versions
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import RunPaths
from blip2nb.trace.comparison import compare
from blip2nb.trace.metrics import distance
from blip2nb.trace.stage import Stage
from blip2nb.trace.step import Step, enter
from blip2nb.trace.tape import Tape, save_tape

if TYPE_CHECKING:
    import torch

log = logging.getLogger("blip2nb")

FED = ("own", "lavis")
"""What transformers' stage was fed: its own stages' outputs, as the model runs, or what LAVIS's stage was fed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sides:
    """Both models' values at one stage, as arrays of the same shape. Unpacks: `lavis, transformers = run.tensor(…)`.

    Attributes:
        stage: its name.
        fed: what transformers' side was fed, one of `FED`.
        lavis, transformers: the values, most often (images, positions, channels).
    """

    stage: str
    fed: str
    lavis: np.ndarray
    transformers: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """transformers − LAVIS, in float64."""
        return self.transformers.astype(np.float64) - self.lavis.astype(np.float64)

    @property
    def error(self) -> float:
        """‖transformers − LAVIS‖ ÷ ‖LAVIS‖: the drift, or the local error where it was fed LAVIS's inputs."""
        import torch

        return distance(torch.from_numpy(self.transformers), torch.from_numpy(self.lavis))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.lavis, self.transformers))

    def __repr__(self) -> str:
        fed = {"own": "as the model runs", "lavis": "fed what LAVIS's stage was fed"}[self.fed]
        error = "bit-equal" if self.error == 0 else f"relative error {self.error:.1e}"
        return f"{self.stage}, {fed}: {self.lavis.shape} {self.lavis.dtype}, {error}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{word}</th>" for word in ("", "RMS", "smallest", "largest"))
        sides = {"LAVIS": self.lavis, "transformers": self.transformers, "difference": self.difference}
        rows = "".join(
            f"<tr><th align='left'>{word}</th><td>{np.sqrt(np.mean(np.square(values, dtype=np.float64))):.4g}</td>"
            f"<td>{values.min():.4g}</td><td>{values.max():.4g}</td></tr>"
            for word, values in sides.items()
        )
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>"


def tensor(run: RunPaths, name: str, fed: str = "own") -> Sides:
    """Both models' values at a stage; see `Run.tensor`."""
    if fed not in FED:
        raise RequestError(f"fed should be one of {', '.join(FED)}, found {fed!r}.")
    bench = workbench(run)
    stage = bench.stage(name)
    key = f"{fed}/{name}"
    held = bench.activations
    if key not in held:
        key = f"own/{name}"  # nothing is computed at a junction: there is only what arrives
    return Sides(name, fed, bench.tape[stage.reference].numpy(), held[key].numpy())


def step(run: RunPaths, name: str, lavis_python: str | Path = "") -> Step:
    """Stand at a stage with both models live; see `Run.step`."""
    bench = workbench(run)
    stage = bench.stage(name)
    _ = bench.activations  # of the model as it is on disk, before anybody changes the one in memory
    live = bench.lavis(stage, lavis_python)
    try:
        return enter(bench.loaded.model, stage, bench.inputs, bench.tape, live)
    except ValueError as error:
        raise RequestError(str(error)) from error


_OPEN: dict[tuple[Path, Path, str], Workbench] = {}
"""The workbench in memory, by run and state of its model. One at a time: at full size there is no room for two."""


def release() -> None:
    """Let go of the models in memory, and of LAVIS's kernel; see `Run.release`."""
    for bench in _OPEN.values():
        bench.close()
    _OPEN.clear()


def workbench(run: RunPaths) -> Workbench:
    """The run's workbench: the same one for as long as its model is as it was.

    Raises:
        RequestError: there is no converted model, or no recording of LAVIS that fits it.
    """
    manifest = Manifest.read(run.model)
    key = (run.folder, run.model, state(run.model))
    if key not in _OPEN:
        release()
        tape = reference.find_tape(run, manifest)
        if tape is None:
            again = reference.completion(run, manifest, run.origin) or f"blip2nb capture {manifest.model}"
            raise RequestError(f"There is no recording of LAVIS that fits {run.folder.name}. Make one: {again}")
        _OPEN[key] = Workbench(run, key[-1], manifest, tape)
    return _OPEN[key]


class Workbench:
    """What stays in memory between two looks at the same run."""

    def __init__(self, run: RunPaths, state: str, manifest: Manifest, tape: Tape):
        self.run, self.manifest, self.tape = run, manifest, tape
        self.stages = {stage.name: stage for stage in stages(manifest.variant)}
        source = tape.metadata["source_hash"]
        self._of = {"state": state, "source": source, "inputs": tape.metadata["inputs_hash"], "versions": versions()}
        self._session: LavisSession | None = None

    def stage(self, name: str) -> Stage:
        if name not in self.stages:
            hint = did_you_mean(name, self.stages)
            names = list(self.stages)
            some = ", ".join([*names[:3], "…", *names[-2:]])
            raise RequestError(f"There is no stage {name!r}.{hint} There are {len(names)}: {some}.")
        return self.stages[name]

    @functools.cached_property
    def loaded(self) -> huggingface.Loaded:
        return huggingface.load(self.run.model)

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        image = tape_images(self.tape)[0]
        return huggingface.forward_inputs(self.loaded, self.manifest.variant, image, self.tape.metadata["texts"])

    @functools.cached_property
    def activations(self) -> Tape:
        """The converted model's outputs at every stage, `own/<stage>` and `lavis/<stage>`: from the run's folder, or
        computed now and kept there."""
        path = self.run.folder / "activations.safetensors"
        try:
            held = Tape(path)
            if held.metadata == self._of:
                return held
        except (FileNotFoundError, ValueError):
            pass
        log.info("computing the converted model's values at every stage, kept in %s", path.name)
        found = compare(self.tape, self.loaded.model, list(self.stages.values()), self.inputs)
        kept: dict[str, torch.Tensor] = {}
        for fed, outputs in (("own", found.outputs), ("lavis", found.local_outputs)):
            kept |= {f"{fed}/{name}": value.detach().cpu().contiguous() for name, value in outputs.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tape(str(path), kept, self._of)
        return Tape(path)

    def close(self) -> None:
        """End LAVIS's kernel, if it was started."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def lavis(self, stage: Stage, lavis_python: str | Path) -> LavisModule | None:
        """LAVIS's module of a stage, live; None where there is no LAVIS."""
        environment = find_lavis(lavis_python)
        if environment is None or stage.is_junction:
            return None
        if self._session is None or not self._session.alive:
            self.close()
            log.info("starting LAVIS in a kernel of its own")
            origin = self.run.origin
            opened = open_source(self.manifest.variant, origin.source, origin.base)
            session = LavisSession(environment, opened, origin.source)
            if session.source_hash != self.manifest.weights_hash:
                session.close()
                raise RequestError(
                    f"The source of {self.run.folder.name} is not the one it was converted from any more."
                )
            self._session = session
        return self._session.module(stage.reference)
