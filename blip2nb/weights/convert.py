"""A source's tensors to sharded safetensors, one at a time, with a manifest of where each came from; and back.

Knows names and bytes alone. What makes the folder a model (configuration, tokenizer) is added by `models.directory`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.weights.hashing import DTYPE_NAMES, DTYPES, combine, digest
from blip2nb.weights.mapping import Entry, MappingError, Plan
from blip2nb.weights.sources import Source, open_folder
from blip2nb.weights.writer import Slot, parse_size, shard, shard_file, write_index

if TYPE_CHECKING:
    import torch

MANIFEST = "blip2nb.json"
LOSSY = ("float16", "bfloat16")
CASTS = {"auto": None, "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted directory says of itself.

    Attributes:
        model: the variant.
        dtype: as asked for: auto keeps every tensor's own.
        weights_hash: one hash over the source's parameters by LAVIS name, in their stored dtype.
        parameters: LAVIS name -> digest, of what was read.
        origins: LAVIS name -> the file's name it was read from.
        tied, dropped, unused: names left out, each with the rule's reason.
        bytes_by_kind: component -> kind of rule -> bytes written.
        versions: what wrote it.
        files: name, size and time of change of every file read.
        recipe: what else decided what was written: options, configuration, versions.
    """

    model: str
    dtype: str
    weights_hash: str
    parameters: Mapping[str, str]
    origins: Mapping[str, str]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    unused: Mapping[str, str]
    bytes_by_kind: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    files: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises RequestError when the folder is not one of ours."""
        try:
            return cls(**json.loads((folder / MANIFEST).read_text()))
        except FileNotFoundError as error:
            raise RequestError(
                f"{folder} has no {MANIFEST}: expected a directory that `blip2nb convert` wrote. Convert it first."
            ) from error
        except (ValueError, TypeError) as error:
            raise RequestError(f"{folder / MANIFEST} is damaged ({error}). Convert again with --overwrite.") from error


def write_weights(
    plan: Plan,
    source: Source,
    folder: Path,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    progress: Any = None,
) -> Manifest:
    """Write a plan's tensors into `folder` as safetensors with the hub's naming, one tensor in memory at a time.

    Args:
        dtype: "auto" keeps each tensor's stored dtype and loses nothing; else every tensor is cast.
        progress: called with the number of bytes written so far since the last call.

    Raises:
        RequestError: a tensor holds NaN or infinity, overflows in the asked dtype, an alias disagrees with its
            original, or a dropped buffer is not what transformers would recompute.
    """
    if dtype not in CASTS:
        raise RequestError(f"--dtype should be one of {', '.join(CASTS)}, found {dtype!r}.")
    _check_left_out(plan, source)
    slots = _slots(plan, source, dtype)
    entry_of = {entry.target: entry for entry in plan.written}
    shards = shard(slots, parse_size(max_shard_size))
    parameters: dict[str, str] = {}
    for one in shards:
        with shard_file(folder / one.name, one) as out:
            for slot in one.slots:
                out.write(_target(entry_of[slot.name], source, slot, parameters))
                if progress is not None:
                    progress(slot.size)
    write_index(folder, shards)
    return Manifest(
        model=plan.variant.name,
        dtype=dtype,
        weights_hash=combine(parameters),
        parameters=parameters,
        origins={name: source.origin(name).name for name in parameters},
        tied={entry.sources[0]: f"tied to {entry.of}" for entry in plan.tied},
        dropped={entry.sources[0]: entry.rule.why for entry in plan.dropped},
        unused={name: rule.why for name, rule in plan.unused.items()},
        bytes_by_kind=_bytes_by_kind(plan, slots),
        versions=_versions(),
    )


def target_size(plan: Plan, source: Source, dtype: str = "auto") -> int:
    """Bytes that `write_weights` will write, without headers."""
    return sum(slot.size for slot in _slots(plan, source, dtype))


def _slots(plan: Plan, source: Source, dtype: str) -> list[Slot]:
    """What will be written, in the plan's order."""
    return [
        Slot(str(entry.target), CASTS[dtype] or source.dtype(entry.sources[0]), entry.shape) for entry in plan.written
    ]


def _target(entry: Entry, source: Source, slot: Slot, parameters: dict[str, str]) -> torch.Tensor:
    read = []
    for name in entry.sources:
        tensor = source.tensor(name)
        _require_sound(source, name, tensor)
        parameters[name] = digest(tensor)
        read.append(tensor)
    tensor = entry.rule.forward(*read)
    if DTYPE_NAMES[tensor.dtype] == slot.dtype:
        return tensor
    cast = tensor.to(DTYPES[slot.dtype])
    if not bool(cast.isfinite().all()):
        raise RequestError(
            f"{entry.sources[0]} holds values up to {float(tensor.abs().max()):.4g}, too large for {slot.dtype}. "
            "Use --dtype auto, float32 or bfloat16."
        )
    return cast


def _require_sound(source: Source, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise RequestError(
            f"{name} in {source.origin(name).name} is {DTYPE_NAMES[tensor.dtype]}; floating-point weights were "
            "expected. Quantised checkpoints cannot be converted; use the one they were made from."
        )
    if not bool(tensor.isfinite().all()):
        raise RequestError(
            f"{name} in {source.origin(name).name} holds {int((~tensor.isfinite()).sum())} NaN or infinite values; "
            "finite weights were expected. Use a checkpoint from before the training diverged."
        )


def _check_left_out(plan: Plan, source: Source) -> None:
    """Nothing is dropped on trust: an alias must equal its original (as cast), a buffer what would be recomputed."""
    import torch

    for name in dict.fromkeys(str(entry.of) for entry in plan.tied):
        _require_sound(source, name, source.tensor(name))
    for entry in plan.tied:
        alias, original = source.tensor(entry.sources[0]), source.tensor(str(entry.of))
        if not torch.equal(alias, original.to(alias.dtype)):
            raise MappingError(
                f"{entry.sources[0]} should be a copy of {entry.of}, but the values differ beyond a cast. "
                "One of them was trained on its own; transformers holds only one tensor for both."
            )
    for entry in plan.dropped:
        found = source.tensor(entry.sources[0])
        if not torch.equal(found, torch.tensor(entry.rule.restore(entry.shape), dtype=found.dtype)):
            raise MappingError(
                f"{entry.sources[0]} is {entry.rule.why} and should count up from 0, but it holds something else."
            )


def inverse_tensors(model: Path, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """(LAVIS name, tensor) of every parameter, computed back from a converted directory by the rules' inverses.

    Raises:
        MappingError: a rule's inverse would lose something, such as a key bias that is not zero.
    """
    saved = open_folder(model)
    for entry in plan.written:
        try:
            back = entry.rule.inverse(saved.tensor(str(entry.target)))
        except MappingError as error:
            raise MappingError(str(error).replace(str(entry.rule.target), str(entry.target), 1)) from error
        yield from zip(entry.sources, back, strict=True)


def _bytes_by_kind(plan: Plan, slots: Sequence[Slot]) -> dict[str, dict[str, int]]:
    """Bytes written by component (vision_model, qformer, …) and kind of rule: what the picture of the files draws."""
    out: dict[str, dict[str, int]] = {}
    for entry, slot in zip(plan.written, slots, strict=True):
        component = str(entry.target).split(".", 1)[0]
        kinds = out.setdefault(component, {})
        kinds[entry.kind] = kinds.get(entry.kind, 0) + slot.size
    return out


def _versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
