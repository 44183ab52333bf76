"""What was measured on what: the machine, the versions, and how much memory and disk there is."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path

import blip2nb
from blip2nb import resources
from blip2nb.sweeps.identity import kit

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


def describe_machine(folder: Path) -> dict[str, str | int]:
    """CPU, cores this process may use, memory, system, and the kind of file system `folder` lies on."""
    return {
        "cpu": _cpu_model(),
        "cores": resources.cores(),
        "memory": f"{resources.memory() / 2**30:.1f} GiB",
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


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def file_system(folder: Path) -> str:
    """The kind of file system `folder` lies on, such as ext4."""
    path = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, after = line.split(" - ", 1)
        mounts[before.split()[4]] = after.split()[0]
    return next(mounts[str(parent)] for parent in (path, *path.parents) if str(parent) in mounts)


def _cpu_model() -> str:
    """The model's name, where the processor tells it; else the architecture's."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()
