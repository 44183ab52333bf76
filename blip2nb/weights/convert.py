"""A source's tensors to sharded safetensors, piece by piece on all cores, with a manifest of where each came from;
the way back; and the check of what was written.

Knows names and bytes alone. What makes the folder a model (configuration, tokenizer) is added by
`conversion.directory`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from isal import isal_zlib

from blip2nb.errors import RequestError
from blip2nb.report.manifest import FORMAT, MANIFEST, Manifest, Shard
from blip2nb.weights.rules import Entry, MappingError, Plan
from blip2nb.weights.sources import Alias, Assembled, open_folder
from blip2nb.weights.stored import (
    PIECE,
    SIZES,
    Stored,
    cast,
    combine,
    contents,
    count_not_finite,
    end_digest,
    is_finite,
    largest,
    start_digest,
)
from blip2nb.weights.threads import at_once, go_on
from blip2nb.weights.writer import INDEX, ShardFile, Slot, Unfinished, parse_size, shard, write_index

if TYPE_CHECKING:
    import torch

log = logging.getLogger("blip2nb")

LOSSY = ("float16", "bfloat16")
CASTS = {"auto": None, "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KEPT_IN_FLOAT32 = re.compile(r"(query_tokens|qformer\..*|.*\.wo\.weight)")
"""What transformers holds in float32 even where a model is loaded in float16: stored so, nothing is lost twice."""


# -- writing


def write_weights(
    plan: Plan,
    source: Assembled,
    work: Unfinished,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    progress: Callable[[int], object] | None = None,
    beside: Callable[[], None] | None = None,
) -> Manifest:
    """Write a plan's tensors into an unfinished directory as safetensors with the hub's naming.

    Every tensor's place is known beforehand, so that several are written at once, each piece by piece: read, hashed,
    looked through for NaN, and put where it belongs. What an interrupted run wrote is read back, and kept where its
    hash is the one that was noted.

    Args:
        dtype: "auto" keeps each tensor's stored dtype and loses nothing; else every tensor is cast.
        progress: called with the number of bytes written, or found whole, since the last call.
        beside: other work for this directory, done by another thread meanwhile.

    Raises:
        RequestError: a tensor holds NaN or infinity, overflows in the asked dtype, or does not have the checksum its
            file says; an alias disagrees with its original; a dropped buffer is not what transformers would recompute.
    """
    if dtype not in CASTS:
        raise RequestError(f"dtype should be one of {', '.join(CASTS)}, found {dtype!r}.")
    slots = target_slots(plan, source, dtype)
    shards = shard(slots, parse_size(max_shard_size))
    noted = {one["target"]: one for one in work.done}
    say = _counted(progress)
    for left in (MANIFEST, INDEX):  # by a run that was killed at its very end
        (work.folder / left).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(contextlib.closing(ShardFile(work.folder, one))) for one in shards]
        place = {slot.name: file for file, one in zip(files, shards, strict=True) for slot in one.slots}
        copies = [_Copy(entry, slot, source, place[slot.name]) for entry, slot in zip(plan.written, slots, strict=True)]
        if not all(copy.plain or copy.fused for copy in copies):
            stack.enter_context(_torch_in_each_thread())

        def one_copy(copy: _Copy) -> dict[str, Any]:
            known = noted.get(copy.slot.name)
            if known is not None and copy.file.stored(copy.slot.name).digest() == known["written"]:
                say(copy.slot.size)
                return known
            done = copy.run(say)
            work.note(**done)
            return done

        jobs: list[Callable[[], Any]] = [beside] if beside is not None else []
        jobs += [partial(_check_hub_hash, file) for file in _hub_files(source)]
        jobs += [partial(_check_record, record, names) for record, names in _records(plan, source).items()]
        jobs += [partial(_check_alias, alias) for alias in source.aliases]
        jobs += [partial(_check_dropped, entry, source) for entry in plan.dropped]
        jobs += [partial(one_copy, copy) for copy in copies]
        done = {one["target"]: one for one in at_once(jobs) if one is not None}
        for file in files:
            file.finish()
    write_index(work.folder, shards)
    parameters = {name: done[str(e.target)]["read"][name] for e in plan.written for name in e.sources}
    written = {slot.name: done[slot.name]["written"] for slot in slots}
    return Manifest(
        model=plan.variant.name,
        variant=plan.variant,
        dtype=dtype,
        weights_hash=combine(parameters),
        parameters=parameters,
        origins={name: source.tensors[name].path.name for name in parameters},
        checkpoints=tuple(path.name for path in source.checkpoints),
        written=written,
        shards={
            one.name: Shard(file.size, shard_hash(one.header(), [written[slot.name] for slot in one.slots]))
            for one, file in zip(shards, files, strict=True)
        },
        tied={alias.name: _tied_words(alias) for alias in source.aliases},
        dropped={entry.sources[0]: entry.rule.why for entry in plan.dropped},
        unused={name: rule.why for name, rule in plan.unused.items()},
        no_way_back={
            entry.sources[0]: f"interpolated from {source.tensors[entry.sources[0]].shape[1]} positions"
            for entry in plan.written
            if entry.kind == "InterpolatePositions"
        },
        bytes_by_kind=_bytes_by_kind(plan, slots),
        versions=_versions(),
        format=FORMAT,
    )


def source_digests(plan: Plan, source: Assembled) -> dict[str, str]:
    """LAVIS name -> digest of every parameter that `write_weights` would read."""
    names = [name for entry in plan.written for name in entry.sources]
    return dict(zip(names, at_once([source.tensors[name].digest for name in names]), strict=True))


def target_slots(plan: Plan, source: Assembled, dtype: str = "auto") -> list[Slot]:
    """What `write_weights` will write, in its order."""
    return [Slot(str(entry.target), _target_dtype(entry, source, dtype), entry.shape) for entry in plan.written]


def shard_hash(header: bytes, digests: Iterable[str]) -> str:
    """One hash for a shard: over its header and the digests of its tensors, so that no byte is hashed twice."""
    return blake3("\n".join([header.hex(), *digests]).encode()).hexdigest()


def _target_dtype(entry: Entry, source: Assembled, dtype: str) -> str:
    if dtype == "float16" and KEPT_IN_FLOAT32.fullmatch(str(entry.target)):
        return "F32"
    own = "F32" if entry.kind == "InterpolatePositions" else source.tensors[entry.sources[0]].dtype
    return CASTS[dtype] or own


@contextlib.contextmanager
def _torch_in_each_thread() -> Iterator[None]:
    """Torch, loaded before the threads that copy begin, and with no threads of its own inside each of them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _counted(progress: Callable[[int], object] | None) -> Callable[[int], None]:
    lock = threading.Lock()

    def say(count: int) -> None:
        go_on()
        if progress is not None:
            with lock:
                progress(count)

    return say


@dataclasses.dataclass(frozen=True)
class _Copy:
    """One tensor on its way from the source into its slot."""

    entry: Entry
    slot: Slot
    source: Assembled
    file: ShardFile

    @property
    def plain(self) -> bool:
        """Whether its bytes are copied as they are."""
        return self.entry.kind == "Rename" and self.source.tensors[self.entry.sources[0]].dtype == self.slot.dtype

    @property
    def fused(self) -> bool:
        """Whether its bytes are joined from those of others."""
        return self.entry.kind == "FuseQueryValueBias" and self.source.tensors[self.entry.sources[0]].dtype == (
            self.slot.dtype
        )

    def run(self, say: Callable[[int], None]) -> dict[str, Any]:
        """Write it. Returns what the journal notes: the digests of what was read and of what was written."""
        read: dict[str, str] = {}
        hasher = None if self.plain else start_digest(self.slot.shape)

        def pieces() -> Iterator[memoryview]:
            for piece in self._pieces(read):
                if hasher is not None:
                    hasher.update(piece)
                yield piece
                say(piece.nbytes)

        self.file.write(self.slot.name, pieces())
        written = end_digest(self.slot.dtype, hasher) if hasher is not None else read[self.entry.sources[0]]
        return {"target": self.slot.name, "read": read, "written": written}

    def _pieces(self, read: dict[str, str]) -> Iterator[memoryview]:
        """The target's bytes; the digests of the sources come to stand in `read` when the last was handed out."""
        if self.entry.kind == "Rename":
            (name,) = self.entry.sources
            stored = self.source.tensors[name]
            if self.plain:
                yield from _sound(name, stored, read)
                return
            room = memoryview(bytearray(min(PIECE // SIZES[stored.dtype] * SIZES[self.slot.dtype], self.slot.size)))
            for piece in _sound(name, stored, read):
                yield self._cast(
                    piece, stored.dtype, room[: piece.nbytes // SIZES[stored.dtype] * SIZES[self.slot.dtype]]
                )
            return
        for name in self.entry.sources:  # a bias or the positions: small, so computed whole
            for _ in _sound(name, self.source.tensors[name], read):
                pass
        dtype, content = self._computed([self.source.tensors[name] for name in self.entry.sources])
        yield content if dtype == self.slot.dtype else self._cast(content, dtype)

    def _computed(self, sources: list[Stored]) -> tuple[str, memoryview]:
        if self.entry.kind == "InterpolatePositions":
            return contents(self.entry.rule.forward(*(one.tensor() for one in sources)))
        return sources[0].dtype, memoryview(self.entry.rule.forward(*(one.bits() for one in sources))).cast("B")

    def _cast(self, piece: memoryview, dtype: str, room: memoryview | None = None) -> memoryview:
        made = cast(piece, dtype, self.slot.dtype, room)
        if not is_finite(made, self.slot.dtype):
            raise RequestError(
                f"{self.entry.sources[0]} holds values up to {largest(piece, dtype):.4g}, too large for "
                f"{self.slot.dtype}. Use dtype auto, float32 or bfloat16."
            )
        return made


def _sound(name: str, stored: Stored, read: dict[str, str]) -> Iterator[memoryview]:
    """A tensor's pieces, each looked through; its digest is put into `read` behind the last.

    Raises:
        RequestError: it is no weight, holds NaN or infinity, or does not have the checksum that its file says.
    """
    if stored.dtype not in ("F16", "BF16", "F32", "F64"):
        raise RequestError(
            f"{name} in {stored.path.name} is {stored.dtype}; floating-point weights were "
            "expected. Quantised checkpoints cannot be converted; use the one they were made from."
        )
    hasher, checksum = start_digest(stored.shape), 0
    for piece in stored.pieces():
        if not is_finite(piece, stored.dtype):
            raise RequestError(
                f"{name} in {stored.path.name} holds {count_not_finite(stored)} NaN or infinite values; "
                "finite weights were expected. Use a checkpoint from before the training diverged."
            )
        hasher.update(piece)
        if stored.crc32 is not None:
            checksum = isal_zlib.crc32(piece, checksum)
        yield piece
    if stored.crc32 is not None and checksum != stored.crc32:
        raise _damaged(name, stored.path)
    read[name] = end_digest(stored.dtype, hasher)


def _damaged(name: str, path: Path) -> RequestError:
    return RequestError(
        f"{name} in {path} does not have the checksum that the file says: it was damaged since it was "
        "saved. Download or copy the file again."
    )


def _records(plan: Plan, source: Assembled) -> dict[Stored, str]:
    """What tensors without a checksum of their own are cut from -> those tensors' names. Few files have any."""
    names: dict[Stored, list[str]] = {}
    for entry in plan.written:
        for name in entry.sources:
            record = source.tensors[name].record
            if record is not None:
                names.setdefault(record, []).append(name)
    return {record: " or ".join(found[:3]) for record, found in names.items()}


def _check_record(record: Stored, names: str) -> None:
    checksum = 0
    for piece in record.pieces():
        go_on()
        checksum = isal_zlib.crc32(piece, checksum)
    if checksum != record.crc32:
        raise _damaged(names, record.path)


def _tied_words(alias: Alias) -> str:
    cast = "" if alias.stored.dtype == alias.original.dtype else f", cast to {alias.stored.dtype}"
    return f"tied to {alias.of}{cast}"


def _check_alias(alias: Alias) -> None:
    """An alias must equal its original, as cast to its own dtype. Nothing is dropped on trust."""
    if alias.stored is alias.original:
        return
    if alias.stored.shape == alias.original.shape and _equal_as_cast(alias.stored, alias.original):
        return
    raise MappingError(
        f"{alias.name} should be a copy of {alias.of}, but the values in {alias.stored.path.name} differ beyond a "
        "cast. One of them was trained on its own; transformers holds only one tensor for both."
    )


def _equal_as_cast(alias: Stored, original: Stored) -> bool:
    """By their digests, since the pieces of one that lies crosswise in its file are cut at other places."""
    hasher = start_digest(original.shape)
    for piece in original.pieces():
        go_on()
        hasher.update(piece if alias.dtype == original.dtype else cast(piece, original.dtype, alias.dtype))
    return end_digest(alias.dtype, hasher) == alias.digest()


def _check_dropped(entry: Entry, source: Assembled) -> None:
    """A dropped buffer must hold what transformers would recompute."""
    found = source.tensors[entry.sources[0]]
    if found.dtype not in ("I64", "I32") or found.bits().tolist() != entry.rule.restore(entry.shape):
        raise MappingError(
            f"{entry.sources[0]} is {entry.rule.why} and should count up from 0, but it holds something else."
        )


_SHA256 = re.compile(r"[0-9a-f]{64}")


def _hub_files(source: Assembled) -> list[Path]:
    """Files in the Hugging Face cache whose SHA-256 is known: the cache names large ones after it."""
    found = {stored.path for stored in source.tensors.values()}
    return sorted(path for path in found if _SHA256.fullmatch(path.resolve().name))


def _check_hub_hash(path: Path) -> None:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            go_on()
            hasher.update(piece)
    found = hasher.hexdigest()
    if found != path.resolve().name:
        raise RequestError(
            f"{path} is not the file that the hub has (its SHA-256 is {found[:12]}…, expected "
            f"{path.resolve().name[:12]}…): it was damaged since it was downloaded. Delete it and download it again."
        )


# -- reading back


def inverse_tensors(model: Path, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """(LAVIS name, tensor) of every parameter, computed back from a converted directory by the rules' inverses.

    Raises:
        MappingError: a rule's inverse would lose something, such as a key bias that is not zero.
    """
    saved = open_folder(model)
    for entry in plan.written:
        yield from inverse_of(entry, saved)


def inverse_of(entry: Entry, saved: Mapping[str, Stored]) -> list[tuple[str, torch.Tensor]]:
    """The same of one rule's tensor. Raises MappingError, and KeyError where the directory lacks it."""
    try:
        back = entry.rule.inverse(saved[str(entry.target)].tensor())
    except MappingError as error:
        raise MappingError(str(error).replace(str(entry.rule.target), str(entry.target), 1)) from error
    return list(zip(entry.sources, back, strict=True))


def check_weights(
    folder: Path, manifest: Manifest, source: Assembled | None, progress: Callable[[int], object] | None = None
) -> list[str]:
    """Read a converted directory again, and its source where there is one, and compare both with the manifest.

    Returns:
        What is wrong, a sentence each: nothing for a directory that is as it was written.
    """
    say = _counted(progress)
    held = open_folder(folder)
    wrong = [f"{name} is missing" for name in manifest.written if name not in held]
    wrong += [f"{name} is not in the manifest" for name in held if name not in manifest.written]
    sizes = {name: (folder / name).stat().st_size for name in manifest.shards if (folder / name).is_file()}
    wrong += [
        f"{name} has {sizes.get(name, 'no')} bytes, expected {one.bytes}"
        for name, one in manifest.shards.items()
        if sizes.get(name) != one.bytes
    ]
    wrong += [
        f"{name} is not as it was written"
        for name, expected in manifest.configuration.items()
        if not (folder / name).is_file() or file_hash(folder / name) != expected
    ]
    pairs = [(name, held[name], manifest.written[name]) for name in held if name in manifest.written]
    words = ["is not as it was written"] * len(pairs)
    if source is not None:
        pairs += [(name, one, manifest.parameters.get(name, "")) for name, one in _read_ones(source, manifest)]
        words += ["in the source is not what was converted"] * (len(pairs) - len(words))

    def digest(stored: Stored) -> str:
        found = stored.digest()
        say(stored.nbytes)
        return found

    digests = at_once([partial(digest, one) for _, one, _ in pairs])
    return wrong + [
        f"{name} ({one.path.name}) {word}"
        for (name, one, expected), word, found in zip(pairs, words, digests, strict=True)
        if found != expected
    ]


def _read_ones(source: Assembled, manifest: Manifest) -> list[tuple[str, Stored]]:
    unread = {**manifest.dropped, **manifest.unused}
    return [(name, stored) for name, stored in source.tensors.items() if name not in unread]


def file_hash(path: Path) -> str:
    """BLAKE3 of a small file."""
    return blake3(path.read_bytes()).hexdigest()


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
