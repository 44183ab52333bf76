"""A fault at one place of a right model, or several at once: planting it there, in memory or in a copy of the files."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip2nb.catalogue.planting import Fault, Target
from blip2nb.catalogue.right import RightModel
from blip2nb.families.captioners import huggingface
from blip2nb.whole import whole_file


@dataclasses.dataclass(frozen=True)
class Broken:
    """A model with a fault in it.

    Attributes:
        folder: the converted directory; the original, unless the fault is in a file.
        loaded: the model, as loaded from there.
        inputs: what it is called with.
    """

    folder: Path
    loaded: huggingface.Loaded
    inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Placed:
    """A fault at one place, and the stages where it arises, in the order of the network."""

    fault: Fault
    target: Target
    stages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fault.name} at {self.target}"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planted at once: one fault, or several."""

    faults: tuple[Placed, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Where they arise: a right answer names these, and no other."""
        return tuple(dict.fromkeys(stage for one in self.faults for stage in one.stages))

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))

    def __add__(self, other: Case) -> Case:
        """Both at once."""
        return Case((*self.faults, *other.faults))

    @contextlib.contextmanager
    def planted(self, right: RightModel, scratch: Path, seed: int = 0) -> Iterator[Broken]:
        """The model with the fault, for as long as the block lasts.

        Args:
            right: the model without it.
            scratch: an empty or missing folder, for a copy of the directory where one is needed; removed afterwards.

        Raises:
            ValueError: a fault changes nothing there.
        """
        stored = [one for one in self.faults if one.fault.kind in ("files", "configuration")]
        try:
            if stored:
                shutil.copytree(right.folder, scratch, dirs_exist_ok=True)
            for one in stored:
                write(one.fault, scratch, one.target, seed)
            folder = scratch if stored else right.folder
            loaded = huggingface.load(folder) if stored else right.loaded
            with contextlib.ExitStack() as stack:
                inputs = right.prepared(loaded) if stored else dict(right.inputs)
                for one in self.faults:
                    if one.fault.kind == "inputs":
                        inputs = one.fault.how(right, loaded, one.target)
                    elif one.fault.kind == "code":
                        stack.enter_context(one.fault.planted(loaded.model, one.target, seed))
                yield Broken(folder, loaded, inputs)
        finally:
            if stored:
                shutil.rmtree(scratch, ignore_errors=True)


def write(fault: Fault, folder: Path, target: Target, seed: int = 0) -> None:
    """Put a fault of files or configuration into a converted directory, for good.

    Raises:
        ValueError: it changes nothing there.
    """
    if fault.kind == "configuration":
        fault.how(folder, target)
        return
    shards = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
    before: dict[str, torch.Tensor] = {}
    for path in sorted({shards[name] for name in target.names}):
        with safe_open(path, framework="pt") as file:
            before |= {name: file.get_tensor(name) for name in target.names if shards[name] == path}
    changed = fault.changed(before, target, seed)
    if not changed:
        raise ValueError(f"{fault.name} changes nothing at {target}.")
    for path in {shards[name] for name in changed}:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors |= {name: tensor.contiguous() for name, tensor in changed.items() if shards[name] == path}
        with whole_file(path) as beside:  # a new file: what other directories link to stays as it is
            save_file(tensors, beside, metadata=metadata)


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
