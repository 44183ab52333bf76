"""What a conversion would do, said before anything starts: what it reads and from where, what it writes, and what
disk and memory that needs.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from blip2nb import resources
from blip2nb.conversion.directory import free_space
from blip2nb.conversion.files import Opened, open_source, wrong_base
from blip2nb.conversion.recognise import configured
from blip2nb.errors import RequestError
from blip2nb.families.captioners.mapping import entries, parameter_count
from blip2nb.report.outputs import Plan, Reading
from blip2nb.sizes import as_bytes
from blip2nb.variants import Variant
from blip2nb.weights.convert import CASTS, KEPT_IN_FLOAT32, target_slots
from blip2nb.weights.download import Part, cache_folder, locate, remote_size
from blip2nb.weights.sources import open_checkpoint, weight_files
from blip2nb.weights.stored import SIZES
from blip2nb.weights.writer import Slot, parse_size, shard

CONVERTING = 250_000_000
"""Bytes of memory that converting takes beside the imports at most, whatever the model's size. Chosen: with two cores
it is 93 MB (`python -m benchmarks.convert`), and every further core has a thread more, with room of its own."""


@dataclasses.dataclass(frozen=True)
class Preview(Plan):
    """What a conversion would do, in words."""

    def __str__(self) -> str:
        rows = [
            (
                "read" if number == 0 else "",
                one.name,
                f"{'about ' if one.estimated else ''}{as_bytes(one.size)}",
                one.where if not one.here else f"{one.path}{f' ({one.where})' if one.where else ''}",
            )
            for number, one in enumerate(self.reads)
        ]
        files = f"{self.shards} file{'s' if self.shards > 1 else ''}, dtype {self.dtype}"
        rows.append(("write", "model/", as_bytes(self.writes), f"{self.output} ({files})"))
        widths = [max(len(row[n]) for row in rows) for n in range(3)]
        lines = [self.model, ""]
        lines += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
        lines.append("")
        lines.append(f"  disk    {as_bytes(self.writes)} needed at the output, {as_bytes(self.disk_free)} free there")
        if self.fetch_bytes:
            lines.append(
                f"          {as_bytes(self.fetch_bytes)} to fetch first, {as_bytes(self.fetch_free)} free for it"
            )
        lines += [
            f"  memory  {as_bytes(self.memory_converting)} for converting, whatever the model's size",
            f"          {as_bytes(self.memory_float32)} for loading the result in float32, "
            f"{as_bytes(self.memory_half)} in half precision",
            f"          {as_bytes(self.memory_proving)} for the second proof; this machine has "
            f"{as_bytes(self.memory_here)}",
        ]
        return "\n".join([*lines, *(f"\n  !! {problem}" for problem in self.problems)])


def preview(
    wanted: Variant,
    output: Path,
    source: str | Path = "",
    base: str | Path = "",
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    timeout: float = 5.0,
) -> Preview:
    """Look at what is here, ask the servers for the size of what is not, and count.

    Args:
        output: where the model would be written.
        source, base: as for `files.find_files`.
        timeout: seconds to wait for a server. Chosen: a preview may go without, and should keep nobody.

    Raises:
        RequestError: what is here does not belong together, or a named path does not exist.
    """
    named, wrong = _expected(wanted, source, base)
    parts = [] if wanted.twin or _whole_source(source) or base else locate(named)
    exact = not wrong and all(part.here for part in parts)
    if exact:
        opened = open_source(wanted, source, base)
        slots = target_slots(opened.plan, opened.tensors, dtype)
        named, reads = opened.variant, _found(opened, parts)
    else:
        slots = _expected_slots(named, dtype)
        reads = tuple(_to_fetch(named, part, timeout) for part in parts)
        if source:
            path = Path(source).expanduser()
            reads += (Reading(path.name, str(path), "", path.stat().st_size, here=True),)
    writes = sum(slot.size for slot in slots)
    fetch = sum(one.size for one in reads if not one.here)
    total = sum(math.prod(slot.shape) for slot in slots)
    out = Preview(
        model=named.name,
        output=str(output),
        dtype=dtype,
        exact=exact,
        reads=reads,
        writes=writes,
        shards=len(shard(slots, parse_size(max_shard_size))),
        disk_free=free_space(output),
        fetch_bytes=fetch,
        fetch_free=free_space(cache_folder() / "lavis"),
        one_disk=_device(output) == _device(cache_folder() / "lavis"),
        memory_converting=CONVERTING,
        memory_float32=total * 4,
        memory_half=total * 2,
        memory_proving=memory_proving(named),
        memory_here=resources.memory(),
    )
    return dataclasses.replace(out, problems=(*([wrong] if wrong else []), *_problems(out)))


def _problems(plan: Preview) -> list[str]:
    out = []
    same_disk = plan.fetch_bytes if plan.one_disk else 0
    if plan.disk_free < plan.writes + same_disk:
        more = f" beside the {as_bytes(same_disk)} to fetch" if same_disk else ""
        out.append(
            f"Too little disk: {plan.output} needs {as_bytes(plan.writes)}{more}, and {as_bytes(plan.disk_free)} are "
            "free there. Make room, or name an output on another disk."
        )
    elif plan.fetch_free < plan.fetch_bytes:
        out.append(
            f"Too little disk: {as_bytes(plan.fetch_bytes)} are to be fetched, and {as_bytes(plan.fetch_free)} are "
            "free in the caches. Make room, or fetch the files elsewhere and give them as source."
        )
    return out


def _device(path: Path) -> int:
    return next(parent for parent in path.resolve().parents if parent.is_dir()).stat().st_dev


def _whole_source(source: str | Path) -> bool:
    return bool(source) and Path(source).expanduser().is_dir()


def _expected(wanted: Variant, source: str | Path, base: str | Path) -> tuple[Variant, str]:
    """The variant with what a checkpoint's training says of it, and why its own files cannot complete it, if so."""
    path = Path(source).expanduser()
    if not source or path.is_dir():
        return wanted, ""
    if not path.is_file():
        raise RequestError(f"source {path} does not exist. Expected a folder in the released layout or a checkpoint.")
    if path.suffix == ".safetensors":
        return wanted, ""
    tensors, config = open_checkpoint(path)
    named = configured(wanted, config)
    return named, "" if base else wrong_base(named, path, config, tensors)


def _found(opened: Opened, parts: list[Part]) -> tuple[Reading, ...]:
    words = {part.path: part.where for part in parts}
    return tuple(
        Reading(
            f"{path.name}/" if path.is_dir() else path.name,
            str(path),
            words.get(path, ""),
            sum(file.stat().st_size for file in weight_files(path)) if path.is_dir() else path.stat().st_size,
            here=True,
        )
        for path in opened.files.parts()
    )


def _to_fetch(variant: Variant, part: Part, timeout: float) -> Reading:
    if part.here:
        return Reading(part.name, str(part.path), part.where, part.size or 0, here=True)
    size = remote_size(part, timeout)
    guess = _released_sizes(variant)[("vision", "language", "checkpoint")[_kind(variant, part)]]
    return Reading(part.name, str(part.path), part.where, size or guess, here=False, estimated=size is None)


def _kind(variant: Variant, part: Part) -> int:
    return 1 if part.name.endswith("/") else 2 if part.name == variant.checkpoint else 0


def _released_dtype(variant: Variant, name: str) -> str:
    """The dtype that the released files hold a tensor in."""
    if name.startswith("visual_encoder."):
        return "F32" if variant.vision_in_checkpoint else "F16"
    return "F16" if name.startswith("opt_model.") else "F32"


def _released_sizes(variant: Variant) -> dict[str, int]:
    """Bytes that each of a released variant's parts should have, from shapes alone."""
    out = {"vision": 0, "language": 0, "checkpoint": 0}
    for entry in entries(variant):
        for name in entry.sources if not entry.optional else ():
            count = math.prod(entry.source_shape)
            size = count * SIZES[_released_dtype(variant, name)]
            if name.startswith("visual_encoder."):
                out["vision"] += count * SIZES["F16"]
                out["checkpoint"] += size if variant.vision_in_checkpoint else 0
            else:
                out["language" if name.startswith(variant.language_prefix) else "checkpoint"] += size
    return out


def _expected_slots(variant: Variant, dtype: str) -> list[Slot]:
    def stored(target: str, source: str) -> str:
        kept = dtype == "float16" and KEPT_IN_FLOAT32.fullmatch(target)
        return "F32" if kept else CASTS[dtype] or _released_dtype(variant, source)

    return [
        Slot(str(entry.target), stored(str(entry.target), entry.sources[0]), entry.shape)
        for entry in entries(variant)
        if not entry.optional
    ]


def memory_proving(model: Variant) -> int:
    """Bytes of memory that comparing a model's behaviour takes, beside the imports: its weights in float32, four bytes
    each, and a quarter more: the widest layer in float64 is 7 % at most in the released models; the rest is chosen, for
    activations."""
    return parameter_count(model) * 5
