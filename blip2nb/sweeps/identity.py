"""What a run depends on, as one hash: its parameters, its notebook, the kit, the libraries, and its input files.

A finished run is known by it, whatever its folder is called and whenever its files were touched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from blip2nb.report.sweep import Value
from blip2nb.sweeps.asked import Asked
from blip2nb.weights.download import cache_folder

log = logging.getLogger("blip2nb")

_KIT = Path(__file__).resolve().parent.parent
_LIBRARIES = ("torch", "torchvision", "transformers", "numpy")
_LARGE = 2_000_000_000  # bytes, from which on reading is announced. Chosen: it takes a disk about a second
_NO_INPUTS = ("lavis_python", "push_to_hub")  # a path that is an environment, a name that is no file


def key_of(run: Asked) -> str:
    """The hash, 64 hexadecimal digits. Reads each input file once; from then on its size and time of change tell.

    A released model, and its twin, are known by name; what is given by path (a checkpoint, a folder, images), by
    content.
    """
    parts = {
        "parameters": dict(run.parameters),
        "notebook": _hash(_cells(run.notebook.text)),
        "kit": kit(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "lavis": has_lavis(str(run.parameters.get("lavis_python", ""))),
        "inputs": {name: content(path) for name, path in inputs(run.parameters).items()},
    }
    return _hash(json.dumps(parts, sort_keys=True))


def _hash(text: str) -> str:
    return blake3(text.encode()).hexdigest()


def _cells(text: str) -> str:
    """What of a notebook decides its outcome: its cells' sources, not its outputs or who ran it when."""
    cells = json.loads(text)["cells"]
    return json.dumps([(cell["cell_type"], "".join(cell["source"])) for cell in cells])


@functools.cache
def kit() -> str:
    """A hash of this package's own code: driver and workers must have the same, and another may find something else."""
    one = blake3()
    for path in sorted(path for path in _KIT.rglob("*") if path.suffix in (".py", ".j2")):
        one.update(f"{path.relative_to(_KIT)}\n".encode())
        one.update(path.read_bytes())
    return one.hexdigest()


def has_lavis(lavis_python: str) -> bool:
    """Whether a LAVIS environment is there to make a recording with, which a proof without one would lack."""
    from blip2nb.lavis_env.environment import find_lavis

    return find_lavis(lavis_python) is not None


def inputs(parameters: Mapping[str, Value]) -> dict[str, Path]:
    """The files and folders that parameters name, by the parameter."""
    named = {
        name: Path(value).expanduser()
        for name, value in parameters.items()
        if isinstance(value, str) and value and name not in _NO_INPUTS
    }
    return {name: path for name, path in named.items() if path.exists()}


def content(path: Path) -> str:
    """A hash of a file, or of all files in a folder with their names. Hidden ones, and caches, do not count."""
    if path.is_file():
        return _hash_of_file(path)
    files = {str(one.relative_to(path)): _hash_of_file(one) for one in _files(path)}
    return _hash(json.dumps(files, sort_keys=True))


def _files(folder: Path) -> Iterator[Path]:
    for one in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in one.relative_to(folder).parts)
        if one.is_file() and not hidden and "__pycache__" not in one.parts:
            yield one


def _hash_of_file(path: Path) -> str:
    """A file's hash, from the table of those that were read before where nothing has touched the file since."""
    found = path.stat()
    state = f"{path.resolve()} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    note = cache_folder() / "hashes" / _hash(state)
    try:
        return note.read_text(encoding="utf-8")
    except FileNotFoundError:
        if found.st_size > _LARGE:
            log.info("reading %s once, to know it again", path.name)
        digest = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        note.parent.mkdir(parents=True, exist_ok=True)
        beside = note.with_name(f"{note.name}.{os.getpid()}")
        beside.write_text(digest, encoding="utf-8")
        os.replace(beside, note)
        return digest
