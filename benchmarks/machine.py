"""What was measured on what: the machine, the versions, and how much memory and disk there is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import blip2nb
from blip2nb.sweeps.identity import kit

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


def describe_machine(folder: Path) -> dict[str, str | int]:
    """CPU, cores this process may use, memory, system, and the kind of file system `folder` lies on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{memory_total() / 2**30:.1f} GiB",
        "file_system": file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
    }


def describe_versions() -> dict[str, str]:
    """Versions of what takes part, and a hash of the kit's code, so that no two states of it are mixed."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "cp": subprocess.run(["cp", "--version"], capture_output=True, text=True).stdout.split("\n")[0],
        "blip2nb": blip2nb.__version__,
        "blip2nb_code": kit()[:12],
    }


def memory_total() -> int:
    """Bytes of memory: the machine's, or the control group's where that is less."""
    return min(_meminfo("MemTotal"), _group("memory.max") or _meminfo("MemTotal"))


def memory_available() -> int:
    """Bytes of memory that a new process can have without swapping."""
    limit = _group("memory.max")
    free = _meminfo("MemAvailable")
    return free if limit is None else min(free, limit - _group_in_use())


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def file_system(folder: Path) -> str:
    """The kind of file system `folder` lies on, such as ext4."""
    path = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        mounts[before.split()[4]] = after.split()[0]
    return next(mounts[str(parent)] for parent in (path, *path.parents) if str(parent) in mounts)


def _cpu_model() -> str:
    """The model's name, where the processor tells it; else the architecture's."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def _meminfo(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/meminfo has no {name}"
    return int(match.group(1)) * 1024


def _group(name: str) -> int | None:
    """A number of this process's control group, or None where there is no limit."""
    path = Path("/sys/fs/cgroup") / name
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def _group_in_use() -> int:
    """Bytes that this process's control group holds, but for cached files, which give way."""
    stat = Path("/sys/fs/cgroup/memory.stat")
    match = re.search(r"^file (\d+)$", stat.read_text(), re.MULTILINE) if stat.is_file() else None
    return (_group("memory.current") or 0) - (int(match.group(1)) if match else 0)
