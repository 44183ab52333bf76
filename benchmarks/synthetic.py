"""Random weights in the released layout, at any size: what the benchmark converts instead of the released files.

Names, shapes, dtypes and files are those of a release: `eva_vit_g.pth`, the checkpoint, and the language model's hub
folder with configuration and tokenizer. The values are a few megabytes of noise, repeated from another place for every
tensor, so that tens of gigabytes are written as fast as the disk takes them and with little memory. What releases hold
beyond the model (a block that is not used, copies of tied tensors) is left out, so that converting and copying move
the same bytes.

    python -m benchmarks.synthetic 1.5b FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from blip2nb.families.captioners.mapping import entries
from blip2nb.twins import FORMS, write_twin
from blip2nb.variants import LanguageSizes, Variant, variant
from blip2nb.weights.rules import Drop, Tied

SHARD_BYTES = 10_000_000_000  # the largest file of the hub's language models
PERIOD = 1_000_003  # values after which the noise repeats; prime, so that no shape lines up with it
SPREAD = 0.02  # the noise's standard deviation. Chosen: what models are initialised with; finite in every dtype

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model to measure with, one whose vision tower has a file of its own (the coco variants have not).

    Attributes:
        name: what `--size` calls it.
        variant: names and sizes of every tensor. Its own name is the model that `blip2nb convert` is asked for.
        vision, language: dtype of the vision file and of the language model's files. The checkpoint is float32.
        note: what the table has to say of it.
    """

    name: str
    variant: Variant
    vision: torch.dtype
    language: torch.dtype
    note: str = ""

    @property
    def model(self) -> str:
        return self.variant.name

    @property
    def twin(self) -> Size:
        """The same kind of model, small."""
        name = self.model if self.variant.twin else f"tiny-{self.model}"
        return Size(name, variant(name), self.vision, self.language)


def _with_language(model: str, language: LanguageSizes) -> Variant:
    return dataclasses.replace(variant(model), language=language)


_HALF, _BRAIN, _FULL = torch.float16, torch.bfloat16, torch.float32
_OPT_125M = LanguageSizes("opt", width=768, layers=12, heads=12, mlp=3072, vocabulary=50272)
_OPT_350M = LanguageSizes("opt", width=1024, layers=24, heads=16, mlp=4096, vocabulary=50272)

SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("twin", variant("tiny-blip2-opt-2.7b"), _HALF, _HALF),
        Size(
            "small", _with_language("tiny-blip2-opt-2.7b", _OPT_125M), _HALF, _HALF,
            "no release: the twin's vision tower and Q-Former, a language model of OPT-125m's size",
        ),
        Size(
            "1.5b", _with_language("blip2-opt-2.7b", _OPT_350M), _FULL, _FULL,
            "no release: the full vision tower and Q-Former, a language model of OPT-350m's size, all float32",
        ),
        Size("blip2-opt-2.7b", variant("blip2-opt-2.7b"), _HALF, _HALF),
        Size("blip2-flan-t5-xl", variant("blip2-flan-t5-xl"), _HALF, _FULL),
        Size("blip2-opt-6.7b", variant("blip2-opt-6.7b"), _HALF, _HALF),
        Size(
            "blip2-flan-t5-xxl", variant("blip2-flan-t5-xxl"), _HALF, _BRAIN,
            "language model stored in bfloat16 to fit the disk; the hub's is float32, twice as large",
        ),
    )
}  # fmt: skip


class Noise:
    """Values of one dtype for tensors of up to `largest` elements, all of them views of one buffer."""

    def __init__(self, dtype: torch.dtype, largest: int):
        generator = torch.Generator().manual_seed(0)
        values = (torch.randn(PERIOD, generator=generator) * SPREAD).to(dtype).view(torch.uint8).numpy()
        self._dtype = dtype
        self._buffer = np.empty(largest * dtype.itemsize + values.nbytes, dtype=np.uint8)
        for start in range(0, self._buffer.nbytes, values.nbytes):
            part = self._buffer[start : start + values.nbytes]
            part[:] = values[: part.nbytes]

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of this name: its own place in the noise, and a storage that ends where it ends."""
        offset = zlib.crc32(name.encode()) % PERIOD * self._dtype.itemsize
        flat = torch.frombuffer(self._buffer.data, dtype=self._dtype, count=math.prod(shape), offset=offset)
        return flat.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Tensors by the name they have in their file."""

    vision: Shapes
    checkpoint: Shapes
    buffers: Shapes
    language: Shapes


def parts(size: Size) -> Parts:
    """Which tensors go into which file, in the order of the network's modules."""
    out = Parts({}, {}, {}, {})
    bare = FORMS[size.twin.name].bare
    for entry in entries(size.variant):
        for name in entry.sources:
            if isinstance(entry.rule, Tied):
                continue
            if isinstance(entry.rule, Drop):
                out.buffers[name] = entry.source_shape
            elif name.startswith("visual_encoder."):
                out.vision[name.removeprefix("visual_encoder.")] = entry.source_shape
            elif name.startswith(f"{size.variant.language_prefix}."):
                short = name.removeprefix(f"{size.variant.language_prefix}.")
                out.language[short.removeprefix("model.") if bare else short] = entry.source_shape
            else:
                out.checkpoint[name] = entry.source_shape
    return Parts(*(dict(sorted(shapes.items(), key=_layer)) for shapes in dataclasses.astuple(out)))


def _layer(item: tuple[str, tuple[int, ...]]) -> tuple[str, int]:
    """What brings a layer's tensors together, as they lie in real files; the mapping lists them rule by rule."""
    match = re.match(r"(.*?)\.(\d+)\.", item[0])
    return (match.group(1), int(match.group(2))) if match else ("", 0)


def source_bytes(size: Size) -> int:
    """Bytes of the weights that `write_source` writes, without the headers."""
    tensors = parts(size)
    return sum(
        count(shapes) * dtype.itemsize
        for shapes, dtype in (
            (tensors.vision, size.vision),
            (tensors.checkpoint, torch.float32),
            (tensors.buffers, torch.int64),
            (tensors.language, size.language),
        )
    )


def count(shapes: Shapes) -> int:
    """Elements."""
    return sum(math.prod(shape) for shape in shapes.values())


def write_source(size: Size, folder: Path) -> None:
    """Write a whole source, or nothing, into `folder`, which must not exist. Memory: twice the largest tensor."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_parts(size, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_parts(size: Size, folder: Path) -> None:
    tensors = parts(size)
    torch.save(_filled(tensors.vision, size.vision), folder / "eva_vit_g.pth")
    trained = _filled(tensors.checkpoint, torch.float32)
    trained |= {name: torch.arange(shape[-1]).reshape(shape) for name, shape in tensors.buffers.items()}
    torch.save({"model": trained}, folder / size.variant.checkpoint)
    _write_language(size, tensors.language, folder / size.variant.language_folder)


def _filled(shapes: Shapes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    noise = Noise(dtype, max(math.prod(shape) for shape in shapes.values()))
    return {name: noise.tensor(name, shape) for name, shape in shapes.items()}


def _write_language(size: Size, shapes: Shapes, folder: Path) -> None:
    folder.mkdir()
    _write_configuration(size, folder)
    tensors = _filled(shapes, size.language)
    groups = list(_shards(shapes, size.language.itemsize))
    stem, ending = ("pytorch_model", "bin") if size.variant.language.kind == "opt" else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        shard = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        path = folder / f"{stem}{shard}.{ending}"
        part = {name: tensors[name] for name in names}
        if ending == "bin":
            torch.save(part, path)
        else:
            _save_safetensors(part, path)
        weight_map |= dict.fromkeys(names, path.name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": count(shapes) * size.language.itemsize}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: Shapes, item_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * item_bytes
        if names and filled + bytes_ > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += bytes_
    yield names


_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Header and bytes, as https://github.com/huggingface/safetensors#format has them, sorted by name as on the hub.

    The library's own writer takes a copy of all tensors first.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in sorted(tensors.items()):
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _write_configuration(size: Size, folder: Path) -> None:
    """Configuration and tokenizer of the twin, the tokenizer with as many entries as the size's embedding has room
    for: reading it is a part of every conversion."""
    twin = size.twin.variant
    language = dataclasses.replace(twin.language, vocabulary=size.variant.language.vocabulary)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "twin"
        write_twin(dataclasses.replace(twin, language=language), made)
        for path in (made / twin.language_folder).iterdir():
            if path.suffix in (".json", ".txt") and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= _config_sizes(size.variant.language) | {"torch_dtype": str(size.language).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config_sizes(language: LanguageSizes) -> dict[str, int]:
    if language.kind == "opt":
        return {
            "hidden_size": language.width,
            "word_embed_proj_dim": language.width,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "ffn_dim": language.mlp,
            "max_position_embeddings": language.positions,
            "vocab_size": language.vocabulary,
        }
    return {
        "d_model": language.width,
        "d_kv": language.head_width,
        "d_ff": language.mlp,
        "num_layers": language.layers,
        "num_decoder_layers": language.layers,
        "num_heads": language.heads,
        "relative_attention_num_buckets": language.buckets,
        "vocab_size": language.vocabulary,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one source."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=main.__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, help="made here; must not exist")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} exists; name a folder that does not.")
    write_source(SIZES[options.size], options.folder)


if __name__ == "__main__":
    main()
