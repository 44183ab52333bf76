"""What this machine has and lacks for the kit, each with what to do about it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

from blip2nb import resources
from blip2nb.conversion.preview import memory_proving
from blip2nb.lavis_env import kernels
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.report.outputs import MachineFinding
from blip2nb.report.runs import outputs_folder
from blip2nb.sizes import as_bytes
from blip2nb.variants import variant
from blip2nb.weights.download import cache_folder

FLOORS = {"torch": "2.6", "torchvision": "0.0", "transformers": "5.15", "papermill": "2.6", "jupyterlab": "4.2"}
"""The lowest versions that work, as pyproject.toml has them."""


def examine(lavis_python: str = "") -> list[MachineFinding]:
    """Look at everything the kit needs. Takes some seconds where LAVIS is installed, since it is imported."""
    return [_python(), *_packages(), _lavis(lavis_python), _disk(), _memory(), _cache()]


def _python() -> MachineFinding:
    found = platform.python_version()
    fine = tuple(int(part) for part in found.split(".")[:2]) >= (3, 11)  # as pyproject.toml has it
    return MachineFinding(
        "Python", found, fine, required=True, advice="" if fine else "Python 3.11 or newer is needed."
    )


def _packages() -> list[MachineFinding]:
    out = []
    for name, floor in FLOORS.items():
        try:
            found = importlib.metadata.version(name)
            fine = [*map(int, found.split(".")[:2])] >= [*map(int, floor.split("."))]
        except importlib.metadata.PackageNotFoundError:
            found, fine = "not installed", False
        out.append(
            MachineFinding(
                name, found, fine, required=True, advice="" if fine else "Run `make setup` or pip install -e ."
            )
        )
    return out


def _lavis(lavis_python: str) -> MachineFinding:
    lavis = find_lavis(lavis_python)
    if lavis is None:
        return MachineFinding(
            "LAVIS", "no environment found", False, advice="`make lavis` makes one; needed for new recordings alone."
        )
    versions = kernels.check(lavis.python, ["lavis=salesforce-lavis", "torch=torch", "transformers=transformers"])
    fine = all(versions.values()) and len(versions) > 1
    found = ", ".join(f"{name} {version or 'does not import'}" for name, version in versions.items())
    advice = (
        "" if fine else f"Try {lavis.python} -c 'import lavis' and read the error; `make lavis` makes a working one."
    )
    return MachineFinding("LAVIS", f"{lavis.python} ({found})", fine, advice=advice)


_ROOM = 20e9
"""Bytes of disk: room for each released model but blip2-flan-t5-xxl. They are 8 to 18 GB, that one is 47 GB."""

_WORKING = 2e9
"""Bytes of memory for a kernel and its libraries, 1.1 GB, and for `preview.CONVERTING`; the rest is chosen."""


def _disk() -> MachineFinding:
    folder = outputs_folder()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    fine = free > _ROOM
    advice = (
        "" if fine else "A full-size conversion writes 8 to 47 GB beside what it reads; use an output on another disk."
    )
    return MachineFinding("disk", f"{as_bytes(free)} free at {place}", fine, advice=advice)


def _memory() -> MachineFinding:
    free = resources.free_memory()
    smallest = variant("blip2-opt-2.7b")
    needed = memory_proving(smallest)
    advice = f"Conversion is fine; running {smallest.name} in float32 takes {as_bytes(needed)}."
    words = f"{as_bytes(free)} available"
    return MachineFinding("memory", words, free > _WORKING, advice="" if free > needed else advice)


def _cache() -> MachineFinding:
    folder = cache_folder()
    return MachineFinding("cache", str(folder) + ("" if folder.exists() else " (not made yet)"), True)
