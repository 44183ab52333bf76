"""Lazy readers: tensors by LAVIS's names, from the files people have. Nothing is read before it is asked for.

A source has four methods: `names()`, `shape(name)`, `dtype(name)` (safetensors' name of it) and `tensor(name)`.
No pickle is ever executed: `.pth` and `.bin` files are opened with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from blip2nb.errors import RequestError
from blip2nb.variants import Variant

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Tensors by name. `origin` says which file one comes from."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def origin(self, name: str) -> Path: ...


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Name to shape of everything in a source."""
    return {name: source.shape(name) for name in source.names()}


class TorchFile:
    """A `.pth` or `.bin` file, memory-mapped. What stands under "model" if there is such a key, else the whole dict."""

    def __init__(self, path: Path):
        self.path = path
        content = _load_torch(path)
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise RequestError(f"{path} should hold a dict of tensors, found a {type(content).__name__}.")
        self._tensors = {name: value for name, value in content.items() if hasattr(value, "dtype")}
        if not self._tensors:
            raise RequestError(f"{path} holds no tensors. Expected a LAVIS checkpoint or a language model's weights.")

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return _dtype_name(self.path, name, self._tensors[name].dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def origin(self, name: str) -> Path:
        return self.path


class SafetensorsFile:
    """One `.safetensors` file."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise RequestError(
                f"{path} is not a whole safetensors file ({error}). Download or copy it again."
            ) from error
        self._names = list(self._file.keys())

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return _known_dtype(self.path, name, self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def origin(self, name: str) -> Path:
        return self.path


@dataclasses.dataclass
class Union:
    """Several sources as one; where two hold the same name, the later one wins."""

    parts: list[Source]

    def __post_init__(self) -> None:
        self._part = {name: part for part in self.parts for name in part.names()}

    def names(self) -> Iterable[str]:
        return self._part.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._part[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._part[name].dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._part[name].tensor(name)

    def origin(self, name: str) -> Path:
        return self._part[name].origin(name)


class Renamed:
    """A source under other names: how a bare vision file or a hub folder comes to have LAVIS's."""

    def __init__(self, part: Source, rename: Callable[[str], str]):
        self._part = part
        self._name = {rename(name): name for name in part.names()}

    def names(self) -> Iterable[str]:
        return self._name.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._part.shape(self._name[name])

    def dtype(self, name: str) -> str:
        return self._part.dtype(self._name[name])

    def tensor(self, name: str) -> torch.Tensor:
        return self._part.tensor(self._name[name])

    def origin(self, name: str) -> Path:
        return self._part.origin(self._name[name])


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a model's parts lie, in the order in which they are laid over each other.

    `vision` is eva_vit_g.pth, `language` a hub folder with its tokenizer, `checkpoints` one file or more.
    """

    vision: Path
    language: Path
    checkpoints: tuple[Path, ...]

    def missing(self) -> list[Path]:
        """Those that are not there."""
        return [path for path in (self.vision, self.language, *self.checkpoints) if not path.exists()]

    def __str__(self) -> str:
        return " ∪ ".join(str(path) for path in (self.vision, self.language, *self.checkpoints))


def files_in(folder: Path, variant: Variant) -> Files:
    """The three parts of a variant in a folder of the released layout. They need not be there: see `Files.missing`."""
    return Files(
        vision=folder / "eva_vit_g.pth",
        language=folder / variant.language_folder,
        checkpoints=(folder / variant.checkpoint,),
    )


def open_model(files: Files, variant: Variant) -> Union:
    """All of a model's tensors by LAVIS's names: vision ∪ language model ∪ checkpoints.

    Raises:
        RequestError: a file is missing, truncated, unreadable without running code, or not what it should be.
    """
    missing = files.missing()
    if missing:
        raise RequestError(
            f"{variant.name} needs {', '.join(path.name for path in missing)}, not found in {missing[0].parent}. "
            f"Give a folder that holds {files.vision.name}, {files.checkpoints[0].name} and {files.language.name}/ "
            "with --source."
        )
    vision = Renamed(open_file(files.vision), lambda name: f"visual_encoder.{name}")
    language = Renamed(open_folder(files.language), lambda name: _language_name(variant, name))
    return Union([vision, language, *(open_file(path) for path in files.checkpoints)])


def _language_name(variant: Variant, name: str) -> str:
    """A hub name as LAVIS calls it. An OPTModel was saved without the `model.` that an OPTForCausalLM has."""
    if variant.language.kind == "opt" and name.startswith("decoder."):
        name = f"model.{name}"
    return f"{variant.language_prefix}.{name}"


def open_file(path: Path) -> Source:
    """One weights file, by its ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def open_folder(folder: Path) -> Source:
    """A hub-style folder: one file or shards with an index, safetensors before `.bin`."""
    for single, index in zip(_SINGLE, _INDEXES, strict=True):
        if (folder / single).is_file():
            return open_file(folder / single)
        if (folder / index).is_file():
            return Union([open_file(path) for path in _shards(folder / index)])
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise RequestError(f"{folder} should hold one of {', '.join((*_SINGLE, *_INDEXES))}; found: {found or 'nothing'}.")


def holds_weights(folder: Path) -> bool:
    """Whether `open_folder` would open it: weights, with every shard."""
    try:
        open_folder(folder)
    except RequestError:
        return False
    return True


def _shards(index: Path) -> list[Path]:
    """The files an index names. One that points outside its folder is refused, not followed."""
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RequestError(f"{index} is not an index of shards ({error!r}). Download or copy it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise RequestError(
                f"{index} names {name!r}: a shard must lie beside its index. The folder is not safe to use."
            )
        if not (index.parent / name).is_file():
            raise RequestError(f"{index} names {name}, which is not in {index.parent}. Download or copy it again.")
    return [index.parent / name for name in names]


def _load_torch(path: Path) -> object:
    import torch

    try:
        zipped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise RequestError(
            f"{path} holds something other than tensors and was not opened, since reading it would run code"
            f"{': ' + reason.strip() if reason else ''}. Save it again as a plain dict of tensors, "
            'torch.save({"model": state_dict}, path), where you trust it.'
        ) from error
    except Exception as error:  # a cut file makes torch's reader raise whatever its bytes spell
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{path} is not a whole PyTorch file ({first}). Download or copy it again.") from error


def _dtype_name(path: Path, name: str, dtype: torch.dtype) -> str:
    from blip2nb.weights.hashing import DTYPE_NAMES

    return _known_dtype(path, name, DTYPE_NAMES.get(dtype, str(dtype)))


def _known_dtype(path: Path, name: str, dtype: str) -> str:
    from blip2nb.weights.hashing import DTYPES

    if dtype not in DTYPES:
        raise RequestError(f"{path}: {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}.")
    return dtype
