"""A tensor on disk: where its bytes are, and reading them piece by piece. Needs no torch until a tensor is asked for.

Everything that is converted, checked or hashed goes through `Stored.pieces`, so that no more than a piece of a tensor
is in memory at a time, whatever its size.

Travels to where LAVIS is with the recorder: Python 3.8, NumPy, and BLAKE3 only where something is hashed.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __package__:
    from blip2nb.errors import RequestError
else:  # copied to where LAVIS is
    from errors import RequestError  # type: ignore[no-redef]

if TYPE_CHECKING:
    import blake3
    import torch

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Bytes per element of each dtype that a checkpoint may hold, by safetensors' name."""

PIECE = 1 << 20
"""Bytes read, hashed, cast and written at a time: about what a core's own cache holds. Chosen: reading, scanning and
hashing run within a fifth of each other from 64 KiB to 4 MiB, and at half the speed with 16 MiB (EPYC, one thread)."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file, and what it is. Nothing is read before it is asked for.

    Attributes:
        path: the file.
        offset: where in it the first element is, in bytes.
        dtype: by safetensors' name, such as "F16".
        strides: steps between elements along each dimension, in elements; None for row-major order.
        crc32: the file's own checksum of just these bytes, where it has one.
        record: all the bytes it is cut from, where the file has a checksum of those alone.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    crc32: int | None = None
    record: Stored | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in row-major order."""
        return math.prod(self.shape) * SIZES[self.dtype]

    def rows(self, start: int, stop: int) -> Stored:
        """A slice along the first dimension. Row-major tensors only."""
        assert self.strides is None, "only row-major tensors are cut"
        step = math.prod(self.shape[1:]) * SIZES[self.dtype]
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + start * step, shape=shape, crc32=None)

    def pieces(self, size: int = PIECE) -> Iterator[memoryview]:
        """The tensor's bytes in row-major order, in buffers of at most `size` bytes, each good until the next.

        `size` is a multiple of the largest element, 8 bytes.
        """
        if self.strides is None:
            yield from _read(self.path, self.offset, self.nbytes, size)
            return
        view = self._strided()
        if not self.shape:
            yield memoryview(view.tobytes())
            return
        step = max(1, size // max(1, view[:1].nbytes))
        for row in range(0, len(view) if self.nbytes else 0, step):
            flat = np.ascontiguousarray(view[row : row + step]).reshape(-1).view(np.uint8)
            for at in range(0, len(flat), size):
                yield memoryview(flat.data)[at : at + size]

    def tensor(self) -> torch.Tensor:
        """The tensor, memory-mapped where its place in the file allows it. Writing to it changes a private copy."""
        import torch

        dtype = _hashing().DTYPES[self.dtype]
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        if self.strides is None and self.offset % SIZES[self.dtype] == 0:
            whole, start = _mapped(self.path, self.offset, self.nbytes)
            return torch.frombuffer(whole, dtype=dtype, count=math.prod(self.shape), offset=start).view(self.shape)
        return torch.frombuffer(bytearray(b"".join(self.pieces())), dtype=dtype).view(self.shape)

    def bits(self) -> np.ndarray:
        """The tensor in memory, as unsigned integers of its element's size: all that joining bytes needs."""
        content = bytearray(b"".join(self.pieces()))
        return np.frombuffer(content, np.dtype(f"u{SIZES[self.dtype]}")).reshape(self.shape)

    def digest(self) -> str:
        """ "DTYPE:hash" over shape and bytes: see `start_digest`."""
        hasher = start_digest(self.shape)
        for piece in self.pieces():
            hasher.update(piece)
        return end_digest(self.dtype, hasher)

    def _strided(self) -> np.ndarray:
        assert self.strides is not None
        size = SIZES[self.dtype]
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        whole, start = _mapped(self.path, self.offset, (last + 1) * size)
        flat = np.frombuffer(whole, np.dtype(f"u{size}"), last + 1, start)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [step * size for step in self.strides])


def start_digest(shape: tuple[int, ...]) -> blake3.blake3:
    """A hash for a tensor's bytes, to be updated with them and ended with `end_digest`. Two tensors have the same
    digest when they are bit-identical.

    BLAKE3, since a conversion hashes all it reads: SHA-256 takes four times as long, longer than the copying itself.
    """
    import blake3

    return blake3.blake3(repr(tuple(shape)).encode())


def end_digest(dtype: str, hasher: blake3.blake3) -> str:
    return f"{dtype}:{hasher.hexdigest()}"


def combine(digests: Mapping[str, str]) -> str:
    """One hash for many digests by name, whatever their order."""
    import blake3

    return blake3.blake3("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def digest_of(tensor: torch.Tensor) -> str:
    """The digest of a tensor in memory."""
    dtype, content = contents(tensor)
    hasher = start_digest(tuple(tensor.shape))
    hasher.update(content)
    return end_digest(dtype, hasher)


def digest_as(tensor: torch.Tensor, like: str) -> str | None:
    """The digest of a tensor cast to the dtype that the digest `like` names, or None if that cast would lose bits."""
    import torch

    made = tensor.to(_hashing().DTYPES[like.split(":", 1)[0]])
    return digest_of(made) if torch.equal(made.to(tensor.dtype), tensor) else None


def contents(tensor: torch.Tensor) -> tuple[str, memoryview]:
    """A tensor's dtype by safetensors' name, and its bytes in row-major order."""
    hashing = _hashing()
    return hashing.DTYPE_NAMES[tensor.dtype], hashing.tensor_bytes(tensor)


def cast(piece: memoryview, dtype: str, to: str, room: memoryview | None = None) -> memoryview:
    """A buffer of values in another dtype, rounded to nearest; what is too large becomes infinite.

    Args:
        room: where to put it, of just its size; fresh memory unless given.
    """
    import torch

    dtypes = _hashing().DTYPES
    if room is None:
        room = memoryview(bytearray(len(piece) // SIZES[dtype] * SIZES[to]))
    values = torch.frombuffer(piece, dtype=dtypes[dtype])
    if SIZES[dtype] == SIZES[to]:
        values = values.float()  # exact, and five times as fast as from one half precision to the other
    torch.frombuffer(room, dtype=dtypes[to]).copy_(values)
    return room


def largest(piece: memoryview, dtype: str) -> float:
    """The largest magnitude in a buffer of values."""
    import torch

    return float(torch.frombuffer(piece, dtype=_hashing().DTYPES[dtype]).abs().max())


_NOT_FINITE: dict[
    str, tuple[Any, int, int]
] = {  # as which integers the values are looked at, the bits without the sign, and where infinity begins
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
# Bytes looked at in one go. What is written in between stays in a core's own cache: half of a small one, of 256 KiB.
_SCAN = 1 << 17


def is_finite(piece: memoryview, dtype: str) -> bool:
    """Whether a buffer of floating-point values is free of NaN and infinity, told from their bits."""
    unsigned, bits, infinity = _NOT_FINITE[dtype]
    values = np.frombuffer(piece, unsigned)
    step = _SCAN // values.itemsize
    return all(
        np.bitwise_and(values[at : at + step], unsigned(bits)).max() < infinity for at in range(0, len(values), step)
    )


def count_not_finite(stored: Stored) -> int:
    """How many values are NaN or infinite."""
    unsigned, bits, infinity = _NOT_FINITE[stored.dtype]
    return sum(int((np.frombuffer(piece, unsigned) & unsigned(bits) >= infinity).sum()) for piece in stored.pieces())


def _hashing() -> Any:
    """The module that knows PyTorch's dtypes. To import it is to import PyTorch."""
    if __package__:
        from blip2nb.weights import hashing
    else:
        import hashing  # type: ignore[no-redef]
    return hashing


def _read(path: Path, offset: int, nbytes: int, size: int) -> Iterator[memoryview]:
    """These bytes of a file, in one buffer that is filled again and again."""
    buffer = memoryview(bytearray(min(size, nbytes)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while nbytes:
            want = buffer[:nbytes]
            filled = 0
            while filled < len(want):
                count = file.readinto(want[filled:])
                if not count:
                    raise RequestError(f"{path} ends before its last tensor does: it changed while it was read.")
                filled += count
            yield want
            nbytes -= filled


def _mapped(path: Path, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
    """A private memory map that holds these bytes of a file, and where in it they start."""
    page = offset - offset % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), offset - page + nbytes, access=mmap.ACCESS_COPY, offset=page), offset - page
