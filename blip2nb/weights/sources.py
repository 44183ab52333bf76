"""Sources: tensors by LAVIS's names, from the files people have. Only headers are read, and no pickle is executed.

A source is a mapping from names to `Stored` tensors. A whole model is several files laid over each other:
vision ∪ language model ∪ checkpoints, or an already converted directory ∪ checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.once import once
from blip2nb.variants import Variant
from blip2nb.weights.stored import SIZES, Stored
from blip2nb.weights.torchfile import Odd, read_torch_file

Source = Mapping[str, Stored]


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Name to shape of everything in a source."""
    return {name: stored.shape for name, stored in source.items()}


# -- one file or folder


def open_file(path: Path) -> Source:
    """One weights file, by its ending: `.safetensors`, or PyTorch's own format. It is read once, and what it holds is
    shared by all who open it.

    Raises:
        RequestError: it is missing, not whole, unreadable without running code, or holds no tensors.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else open_checkpoint(path)[0]


@once
def open_checkpoint(path: Path) -> tuple[Source, Mapping[str, Any]]:
    """A `.pth` or `.bin` file: its tensors, and the training's own configuration where LAVIS's trainer left one.

    The tensors are what stands under "model" if there is such a key, else the whole dict, without the `module.` that a
    distributed run puts before every name. The optimizer beside them is not looked at.

    Raises:
        RequestError: as for `open_file`.
    """
    content = read_torch_file(path)
    config = content.get("config") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise RequestError(f"{path} should hold a dict of tensors, found a {type(content).__name__}.")
    tensors = {name: value for name, value in content.items() if isinstance(value, Stored | Odd)}
    if not tensors:
        raise RequestError(f"{path} holds no tensors. Expected a LAVIS checkpoint or a language model's weights.")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    known = {name: _of_known_dtype(path, name, value) for name, value in tensors.items()}
    return known, config if isinstance(config, dict) else {}


def _of_known_dtype(path: Path, name: str, value: Stored | Odd) -> Stored:
    if isinstance(value, Odd):
        raise RequestError(f"{path}: {name} has dtype {value.dtype}, expected one of {', '.join(SIZES)}.")
    return value


@once
def _open_safetensors(path: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # the library's own check that header and length agree
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{path} is not a whole safetensors file ({error}). Download or copy it again.") from error
    header.pop("__metadata__", None)
    return {
        name: _of_known_dtype(path, name, Odd(one["dtype"], ()))
        if one["dtype"] not in SIZES
        else Stored(path, 8 + length + one["data_offsets"][0], one["dtype"], tuple(one["shape"]))
        for name, one in header.items()
    }


_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def open_folder(folder: Path) -> dict[str, Stored]:
    """A hub-style folder: one file or shards with an index, safetensors before `.bin`."""
    return {name: stored for path in weight_files(folder) for name, stored in open_file(path).items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_folder` reads.

    Raises:
        RequestError: there are none, one that the index names is not there, or it names one outside the folder.
    """
    for single, index in zip(_SINGLE, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise RequestError(f"{folder} should hold one of {', '.join((*_SINGLE, *_INDEXES))}; found: {found or 'nothing'}.")


def holds_weights(folder: Path) -> bool:
    """Whether `open_folder` would open it: weights, with every shard whole."""
    try:
        open_folder(folder)
    except RequestError as error:
        if memory_ran_out(error):
            raise
        return False
    return True


def _shards(index: Path) -> list[Path]:
    """The files an index names. One that points outside its folder is refused, not followed."""
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
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


# -- a whole model


_CONFIGURATION = (
    "added_tokens.json", "chat_template.jinja", "config.json", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
"""What is read of a language model's folder beside its weights. Whatever else lies there is not looked at."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a model's parts lie, in the order in which they are laid over each other.

    Attributes:
        vision: eva_vit_g.pth; None where a base holds it.
        language: a hub folder with the language model and its tokenizer; the base itself where there is one.
        checkpoints: one file or more, each laid over what comes before it.
        base: a directory that was converted to transformers already, in place of the vision file, the language model
            and the pretrained checkpoint.
    """

    vision: Path | None
    language: Path
    checkpoints: tuple[Path, ...]
    base: Path | None = None

    def parts(self) -> list[Path]:
        """All of them, in their order."""
        first = [self.base] if self.base is not None else [path for path in (self.vision, self.language) if path]
        return [*first, *self.checkpoints]

    def missing(self) -> list[Path]:
        """Those that are not there."""
        return [path for path in self.parts() if not path.exists()]

    def weight_files(self) -> list[Path]:
        """Every file that weights are read from."""
        return [file for path in self.parts() for file in (weight_files(path) if path.is_dir() else [path])]

    def configuration_files(self) -> list[Path]:
        """The files that the language model's configuration and tokenizer are read from."""
        return [self.language / name for name in _CONFIGURATION if (self.language / name).is_file()]

    def __str__(self) -> str:
        return " ∪ ".join(str(path) for path in self.parts())


def files_in(folder: Path, variant: Variant) -> Files:
    """The three parts of a variant in a folder of the released layout. They need not be there: see `Files.missing`."""
    return Files(
        vision=folder / "eva_vit_g.pth",
        language=folder / variant.language_folder,
        checkpoints=(folder / variant.checkpoint,),
    )


@dataclasses.dataclass(frozen=True)
class Alias:
    """A second name of one tensor, as a file has it, with the tensor that it should be a copy of."""

    name: str
    stored: Stored
    of: str
    original: Stored


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A whole model: every tensor once, by LAVIS's name, and the aliases that were found beside them.

    Attributes:
        tensors: of two files that hold one name, the later one's.
        aliases: to be checked against their originals; not among the tensors.
        checkpoints: the files that were laid over the base, in their order.
        configs: what LAVIS's trainer wrote into each of them.
    """

    tensors: Mapping[str, Stored]
    aliases: tuple[Alias, ...] = ()
    checkpoints: tuple[Path, ...] = ()
    configs: tuple[Mapping[str, Any], ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of everything the files hold, aliases included."""
        return shapes(self.tensors) | {alias.name: alias.stored.shape for alias in self.aliases}

    def trained(self, name: str) -> bool:
        """Whether a tensor comes from a checkpoint, and not from what the checkpoints are laid over."""
        return name in self.tensors and self.tensors[name].path in self.checkpoints
