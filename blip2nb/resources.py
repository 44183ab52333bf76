"""Cores and memory that this process may use: what the machine has, less what affinity, a container or a sweep sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CORES = "BLIP2NB_CORES"
"""Environment variable: at most so many cores. A sweep gives each of its runs its share."""

SHARE = 0.9
"""What models may fill of a machine's memory. Chosen: the rest is for the system and whatever runs beside."""

_UNLIMITED = 1 << 60  # version 1 of control groups says "no limit" by a number beyond any memory


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, at least 1: by its affinity, the quota of its control groups, and CORES.

    Args:
        root: where /proc and /sys are.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get(CORES, "")
    limits = [own, *_quotas(root), *([int(share)] if share.isdecimal() else [])]
    return max(1, min(limits))


def _quotas(root: Path) -> Iterator[int]:
    for group in _groups("cpu", root):
        quota, period = [*_words(group / "cpu.max"), "", ""][:2]
        if not quota:
            quota, period = ("".join(_words(group / f"cpu.cfs_{one}_us")) for one in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # not "max", and not -1
            yield -(-int(quota) // int(period))


def memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may take at most: the machine's, or its control groups' limit. 0 if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
    return min([total, *(limit for limit, _ in _limits(root))])


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still take: of the machine's, and of its control groups' limit."""
    import psutil

    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _limits(root))])


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that has a limit. The page cache, which yields, is not counted as used."""
    for group in _groups("memory", root):
        for version, limit_in, use_in in ("", "max", "current"), ("total_", "limit_in_bytes", "usage_in_bytes"):
            limit, use = ("".join(_words(group / f"memory.{name}")) for name in (limit_in, use_in))
            if limit.isdecimal() and int(limit) < _UNLIMITED:
                stat = _words(group / "memory.stat")
                held = dict(zip(stat[::2], stat[1::2], strict=False))
                cache = sum(int(held.get(f"{version}{name}_file", 0)) for name in ("active", "inactive"))
                yield int(limit), int(use or 0) - cache


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of both versions: each with all that are above it.

    In a container its own group is often mounted as the topmost, whatever path the kernel names: then that one counts.
    """
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = [mounted / controller, mounted / controllers] if controllers else [mounted]
        top = next((one for one in tops if one.is_dir()), mounted)
        group = top / path.strip("/")
        yield from (one for one in (group, *group.parents) if one.is_relative_to(top))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # no control groups, or not of this kind
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
