"""How fast one thread does each thing a conversion is made of, on this machine: what bounds it.

Rates are in GB/s of the bytes worked on, the median of several rounds. Memory is worked through in pieces of 1 MiB, so
that what a step leaves behind (a mask, a copy) stays in the processor's cache.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import blake3
import numpy as np
import torch
from isal import isal_zlib

from benchmarks.synthetic import Noise

PIECE = 1 << 20  # bytes at a time, as the converter reads them: `weights.stored.PIECE`
DATA = 256 << 20  # bytes of each round in memory. Chosen: more than a processor's cache holds
FILE = 1 << 30  # bytes of each round on disk. Chosen: half a second or more, so that starting costs nothing beside it
ROUNDS = 5  # chosen: their median leaves out two that something else disturbed; on disk, where they are longer, 3

STEPS = (
    "read from the page cache",
    "BLAKE3",
    "CRC-32 (isal)",
    "scan float16 for NaN and infinity",
    "write past the page cache",
)
"""What happens to every byte of a .pth, in one of several threads."""


def measure(folder: Path) -> dict[str, float]:
    """What is done -> GB/s. Writes 1 GiB into `folder` at a time and removes it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: round(rate, 3) for name, rate in {**_in_memory(), **_on_disk(folder)}.items()}
    finally:
        torch.set_num_threads(threads)


def in_one_thread(rates: dict[str, float]) -> float:
    """GB/s of one thread that reads, hashes, scans and writes every byte, one after the other."""
    return 1 / sum(1 / rates[step] for step in STEPS)


def _in_memory() -> dict[str, float]:
    half = Noise(torch.float16, DATA // 2).tensor("costs", (DATA // 2,))
    full = Noise(torch.float32, DATA // 4).tensor("costs", (DATA // 4,))
    half_bits, full_bits = half.numpy().view(np.uint16), full.numpy().view(np.uint32)
    raw = half.numpy().view(np.uint8)
    brain = torch.empty(PIECE // 4, dtype=torch.bfloat16)
    room = np.empty(PIECE, dtype=np.uint8)
    blake, sha = blake3.blake3(), hashlib.sha256()
    return {
        "BLAKE3": _rate(lambda at: blake.update(raw[at : at + PIECE])),
        "SHA-256, for comparison": _rate(lambda at: sha.update(raw[at : at + PIECE])),
        "CRC-32 (isal)": _rate(lambda at: isal_zlib.crc32(raw[at : at + PIECE])),
        "CRC-32 (zlib), for comparison": _rate(lambda at: zlib.crc32(raw[at : at + PIECE])),
        "scan float16 for NaN and infinity": _rate(
            lambda at: (half_bits[at // 2 : (at + PIECE) // 2] & 0x7FFF).max() < 0x7C00
        ),
        "scan float32 for NaN and infinity": _rate(
            lambda at: (full_bits[at // 4 : (at + PIECE) // 4] & 0x7FFFFFFF).max() < 0x7F800000
        ),
        "cast float32 to bfloat16": _rate(lambda at: brain.copy_(full[at // 4 : (at + PIECE) // 4])),
        "copy in memory": _rate(lambda at: np.copyto(room, raw[at : at + PIECE])),
    }


def _rate(work: Callable[[int], object], total: int = DATA) -> float:
    """GB/s of doing `work` at every piece of `total` bytes."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for at in range(0, total, PIECE):
            work(at)
        rounds.append(total / (time.perf_counter() - start) / 1e9)
    return statistics.median(rounds)


def _on_disk(folder: Path) -> dict[str, float]:
    path = folder / "costs.bin"
    data = memoryview(Noise(torch.float16, PIECE // 2).tensor("costs", (PIECE // 2,)).numpy()).cast("B")
    cached, synced = [], []
    try:
        for _ in range(3):
            path.unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()
            with open(path, "wb", buffering=0) as file:
                for _ in range(FILE // PIECE):
                    file.write(data)
                cached.append(FILE / (time.perf_counter() - start) / 1e9)
                os.fsync(file.fileno())
            synced.append(FILE / (time.perf_counter() - start) / 1e9)
        past = [_past_the_cache(path) for _ in range(3)]
        room = bytearray(PIECE)
        with open(path, "rb", buffering=0) as file:
            handle = file.fileno()
            read = _rate(lambda at: os.preadv(handle, [room], at), FILE)
    finally:
        path.unlink(missing_ok=True)
    return {
        "read from the page cache": read,
        "write to the page cache": statistics.median(cached),
        "write to the page cache and fsync": statistics.median(synced),
        "write past the page cache": statistics.median(past),
    }


def _past_the_cache(path: Path) -> float:
    """GB/s of writing with O_DIRECT into room set aside before, as the converter does."""
    path.unlink(missing_ok=True)
    os.sync()
    pages = mmap.mmap(-1, PIECE)
    pages.write(os.urandom(PIECE))
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(handle, 0, FILE)
        start = time.perf_counter()
        for at in range(0, FILE, PIECE):
            os.pwrite(handle, pages, at)
        os.fsync(handle)
        return FILE / (time.perf_counter() - start) / 1e9
    finally:
        os.close(handle)
