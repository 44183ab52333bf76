"""The plain way to convert, to compare with: everything in memory, an initialised model beside it, `save_pretrained`.

It takes the kit's mapping for the names and does the rest as a one-file script would: every file loaded whole, one
dict of them all under the new names, a float32 model built and initialised, the dict loaded into it, the model saved.

    python -m benchmarks.in_memory 1.5b --source FOLDER --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.synthetic import SIZES, Size
from blip2nb.families.captioners.mapping import entries, parameter_count
from blip2nb.resources import free_memory
from blip2nb.weights.rules import Tied

MEMORY_FACTOR = 2.3  # of the model in float32: the dict, the model, and what saving takes; 2.1 in the results of 1.5b


def model_bytes(size: Size) -> int:
    """Bytes of the whole model in float32, which is also what gets written."""
    return 4 * parameter_count(size.variant)


def refusal(size: Size) -> str:
    """Why this size does not fit into the memory that is free, or nothing."""
    needed, available = MEMORY_FACTOR * model_bytes(size), free_memory()
    if available >= needed:
        return ""
    return f"does not fit: needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are free"


def convert(size: Size, source: Path, output: Path) -> None:
    """Convert a source that `benchmarks.synthetic` wrote, all of it in memory."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    tensors = rename(size, load_all(size, source))
    processor = _processor(size, source / size.variant.language_folder)
    model = Blip2ForConditionalGeneration(Blip2Config(**_configuration(size, source, processor.tokenizer)))
    model.load_state_dict(tensors)
    model.save_pretrained(output)
    processor.save_pretrained(output)


def load_all(size: Size, source: Path) -> dict[str, Any]:
    """LAVIS name -> tensor, of all files."""
    language = source / size.variant.language_folder
    tensors = {f"visual_encoder.{name}": tensor for name, tensor in _load(source / "eva_vit_g.pth").items()}
    for path in sorted([*language.glob("*.bin"), *language.glob("*.safetensors")]):
        for name, tensor in _load(path).items():
            bare = f"model.{name}" if name.startswith("decoder.") and path.suffix == ".bin" else name
            tensors[f"{size.variant.language_prefix}.{bare}"] = tensor
    return tensors | _load(source / size.variant.checkpoint)["model"]


def _load(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def rename(size: Size, tensors: dict[str, Any]) -> dict[str, Any]:
    """transformers' name -> tensor, tied copies too, since `load_state_dict` asks for them."""
    out: dict[str, Any] = {}
    for entry in entries(size.variant):
        if isinstance(entry.rule, Tied):
            out[str(entry.target)] = tensors[str(entry.of)]
        elif entry.target is not None:
            out[entry.target] = entry.rule.forward(*(tensors[name] for name in entry.sources))
    return out


def _processor(size: Size, language: Path) -> Any:
    from transformers import AutoTokenizer, Blip2Processor, BlipImageProcessor

    side = size.variant.image_size
    tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True)
    images = BlipImageProcessor(size={"height": side, "width": side})
    return Blip2Processor(images, tokenizer, num_query_tokens=size.variant.qformer.queries)


def _configuration(size: Size, source: Path, tokenizer: Any) -> dict[str, Any]:
    vision, qformer = size.variant.vision, size.variant.qformer
    text = json.loads((source / size.variant.language_folder / "config.json").read_text(encoding="utf-8"))
    text.pop("torch_dtype")
    return {
        "dtype": "float32",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "num_query_tokens": qformer.queries,
        "vision_config": {
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": size.variant.image_size,
            "patch_size": vision.patch,
        },
        "qformer_config": {
            "hidden_size": qformer.width,
            "intermediate_size": qformer.mlp,
            "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads,
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": vision.width,
        },
        "text_config": text,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert one source in memory. Ends with 2 where there is too little of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_memory", description=main.__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--source", type=Path, required=True, help="a folder that benchmarks.synthetic wrote")
    parser.add_argument("--output", type=Path, required=True, help="where to write")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    if said := refusal(size):
        print(f"{size.name} {said}.", file=sys.stderr)
        sys.exit(2)
    convert(size, options.source, options.output)


if __name__ == "__main__":
    main()
