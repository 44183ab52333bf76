"""Twins: models with a released variant's architecture, flags and file layout, and small random weights.

A twin goes through the same code as the real files, so everything proven on it is proven of that code. The values come
from integer arithmetic alone, so that a twin is bit-identical on every machine; the tape that ships with the kit holds
its hash. Between them the twins cover the forms real files take (see `FORMS`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from blip2nb.families.captioners.mapping import entries
from blip2nb.variants import Variant
from blip2nb.weights.rules import Drop, Tied
from blip2nb.weights.writer import whole_directory

REVISION = 1  # raise when the values or files of a twin change, so that cached ones are made again


@dataclasses.dataclass(frozen=True)
class Form:
    """How a twin's files are stored, as the hub and LAVIS's trainer store them.

    Attributes:
        safetensors: the language model as safetensors instead of `.bin`.
        shards: into how many files it is split.
        bare: OPT's names without `model.`, as an OPTModel was saved.
        copies: the language model's file also holds the tied copies of its embedding.
        trainer: the checkpoint is LAVIS's trainer's own: with optimizer and config, and with the tied copies (cast)
            and the buffers that the trainer's filter lets through.
        unused: the vision file holds a block, a norm and a head that LAVIS does not build.
        zipped: `.pth` files in PyTorch's zip format; else in the one from before 1.6.
    """

    safetensors: bool = False
    shards: int = 1
    bare: bool = False
    copies: bool = False
    trainer: bool = False
    unused: bool = False
    zipped: bool = True


FORMS: dict[str, Form] = {
    "tiny-blip2-opt-2.7b": Form(bare=True, unused=True),
    "tiny-blip2-opt-6.7b": Form(shards=2),
    "tiny-blip2-opt-2.7b-coco": Form(safetensors=True, bare=True, trainer=True),
    "tiny-blip2-opt-6.7b-coco": Form(safetensors=True, shards=2, copies=True),
    "tiny-blip2-flan-t5-xl": Form(safetensors=True, shards=2, copies=True),
    "tiny-blip2-flan-t5-xl-coco": Form(trainer=True),
    "tiny-blip2-flan-t5-xxl": Form(shards=3, zipped=False),
}

# fmt: off
WORDS = (
    "a", "an", "the", "of", "on", "in", "at", "by", "to", "with", "and", "is", "are", "photo", "picture", "image",
    "man", "woman", "child", "dog", "cat", "bird", "boat", "ship", "car", "bus", "train", "tree", "hill", "sea",
    "lake", "sky", "sun", "moon", "cloud", "snow", "sand", "road", "house", "tower", "bridge", "red", "blue",
    "green", "white", "black", "old", "small", "big", "two", "three", "new", "sits", "stands", "runs", "looks",
    "near", "under", "over", "beach", "street", "field", "table", "plate", "food", "cup",
)
# fmt: on


def write_twin(variant: Variant, folder: Path, seed: int = 0) -> None:
    """Write a twin's files, laid out as LAVIS's release and the hub have them. Whole or not at all.

    The folder then holds `eva_vit_g.pth`, the checkpoint by its released name, and the language model's folder.

    Args:
        seed: 0 for the twin itself; any other number gives the same architecture and files with other weights.
    """
    form = FORMS[variant.name]
    tensors = twin_tensors(variant, seed)
    language = {name: t for name, t in tensors.items() if name.startswith(variant.language_prefix)}
    vision = {name: t for name, t in tensors.items() if name.startswith("visual_encoder.")}
    trained = {name: t for name, t in tensors.items() if name not in language and name not in vision}
    if variant.vision_in_checkpoint:
        trained |= vision
        vision = {name: t for name, t in twin_tensors(_pretrained(variant), seed).items() if name in vision}
    if form.trainer:
        trained |= _left_in(variant, tensors)
    with whole_directory(folder) as out:
        bare = {name.removeprefix("visual_encoder."): t.half() for name, t in vision.items()}
        if form.unused:
            bare |= _unused(variant)
        torch.save(bare, out / "eva_vit_g.pth", _use_new_zipfile_serialization=form.zipped)
        checkpoint: dict[str, object] = {"model": trained}
        if form.trainer:
            checkpoint |= {
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(8)}}, "param_groups": [{"lr": 1e-5}]},
                "config": {"model": {"arch": variant.lavis_class, "model_type": variant.lavis_type}},
                "scaler": None,
                "epoch": 4,
            }
        torch.save(checkpoint, out / variant.checkpoint, _use_new_zipfile_serialization=form.zipped)
        (out / variant.language_folder).mkdir()
        _write_language(variant, form, language, out / variant.language_folder)


def twin_tensors(variant: Variant, seed: int = 0) -> dict[str, torch.Tensor]:
    """A twin's tensors by LAVIS name, without aliases and buffers, in the dtypes real files have."""
    return {
        name: _value(variant, name, entry.source_shape, seed)
        for entry in entries(variant)
        if not isinstance(entry.rule, Tied | Drop)
        for name in entry.sources
    }


def _value(variant: Variant, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One tensor: noise of a scale that keeps activations sensible, in the dtype the real file has. Norms and
    biases vary by a tenth, by choice: enough that one in another's place shows."""
    origin = f"{variant.name}/{name}" + (f"/{seed}" if seed else "")
    if name.endswith(("norm.weight", "Norm.weight", "norm1.weight", "norm2.weight", "ln_vision.weight")):
        array = 1 + _noise(origin, shape, 0.1)
    elif name.endswith("bias"):
        array = _noise(origin, shape, 0.1)
    else:
        array = _noise(origin, shape, _spread(name, shape))
    if name == _HEADS[variant.language.kind]:
        array *= _loudness(variant)[:, None]
    half = name.startswith("opt_model.") or (name.startswith("visual_encoder.") and not variant.vision_in_checkpoint)
    return torch.from_numpy(array).to(torch.float16 if half else torch.float32)


_HEADS = {"opt": "opt_model.model.decoder.embed_tokens.weight", "t5": "t5_model.lm_head.weight"}


def _loudness(variant: Variant) -> np.ndarray:
    """How strong each token's row of the output layer is: words before fragments, so that captions are made of words,
    and the end of the sequence before both, so that captions end. LAVIS ends an OPT caption at a line break."""
    if variant.language.kind == "opt":
        tokens = list(_opt_vocabulary(variant)[0])
        space, end = _byte_letters()[32], _byte_letters()[10]
    else:
        tokens, space, end = _t5_pieces(variant), "▁", "</s>"
    words = {space + word for word in WORDS}
    loudness = np.full(variant.language.vocabulary, 0.5, np.float32)
    for row, token in enumerate(tokens):
        loudness[row] = _END[variant.name] if token == end else 1.0 if token in words else 0.5
    return loudness


# Found by trying: with these about half of the six demo captions end before LAVIS's limit of 30 tokens.
_END = {
    "tiny-blip2-opt-2.7b": 1.0,
    "tiny-blip2-opt-6.7b": 1.3,
    "tiny-blip2-opt-2.7b-coco": -1.0,
    "tiny-blip2-opt-6.7b-coco": 2.5,
    "tiny-blip2-flan-t5-xl": 4.0,
    "tiny-blip2-flan-t5-xl-coco": 1.5,
    "tiny-blip2-flan-t5-xxl": 2.5,
}

# Where a name ends, how strong its weights are, in units of 1 / sqrt(inputs): chosen so that no layer saturates,
# attention is neither flat nor one-hot, and the variance before ln_vision stays below 1, where its eps shows.
_GAINS: tuple[tuple[str, float], ...] = (
    ("patch_embed.proj.weight", 0.3),
    ("attn.qkv.weight", 1.5),
    ("attn.proj.weight", 0.15),
    ("mlp.fc2.weight", 0.15),
    ("SelfAttention.q.weight", 0.8),
    ("SelfAttention.k.weight", 0.8),
    ("EncDecAttention.q.weight", 0.8),
    ("EncDecAttention.k.weight", 0.8),
    ("lm_head.weight", 2.0),
    ("_proj.weight", 2.0),
    ("crossattention.output.dense.weight", 3.0),
)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a tensor's values: of a table's as such, of a matrix's by its inputs and `_GAINS`.
    Chosen, as those are."""
    if name.endswith(("cls_token", "pos_embed")):
        return 0.2
    if name.endswith(("embed_tokens.weight", "embed_positions.weight")):
        return 0.3
    if name.endswith(("query_tokens", "shared.weight")):
        return 1.0
    if name.endswith("relative_attention_bias.weight"):
        return 0.5
    inputs = int(np.prod(shape[1:]))
    gain = next((gain for ending, gain in _GAINS if name.endswith(ending)), 1.0)
    return gain / inputs**0.5


def _noise(seed: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Float32 values of mean 0 and the given standard deviation, near a bell curve, from integers alone.

    A counter through the splitmix64 finaliser (Steele et al., 2014), four 16-bit pieces of it added up: exact in
    float32, then one multiplication, so that no machine can round differently.
    """
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    total = np.sum([(x >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)], axis=0)
    centred = total.astype(np.int64) - 2 * 0xFFFF
    unit = np.float32(std / (0x10000 / 3**0.5))
    return (centred.astype(np.float32) * unit).reshape(shape)


def _pretrained(variant: Variant) -> Variant:
    """The 224-pixel variant whose vision file a coco variant starts from."""
    return dataclasses.replace(variant, image_size=224, vision_in_checkpoint=False)


def _left_in(variant: Variant, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What LAVIS's trainer saves though it was not trained: tied copies, in the dtype LAVIS holds them, and buffers."""
    cast = torch.float16 if variant.language.kind == "opt" else torch.bfloat16
    left: dict[str, torch.Tensor] = {}
    for entry in entries(variant):
        if isinstance(entry.rule, Tied):
            left[entry.sources[0]] = tensors[entry.rule.of].to(cast)
        elif isinstance(entry.rule, Drop):
            left[entry.sources[0]] = torch.tensor(entry.rule.restore(entry.shape))
    return left


def _unused(variant: Variant) -> dict[str, torch.Tensor]:
    width = variant.vision.width
    block = {f"blocks.{variant.vision.layers}.norm1.{leaf}": torch.ones(width) for leaf in ("weight", "bias")}
    return {**block, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), "head.bias": torch.zeros(4)}


def _write_language(variant: Variant, form: Form, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    hub: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(f"{variant.language_prefix}.")
        hub[short.removeprefix("model.") if form.bare else short] = tensor
    if form.copies:
        for entry in entries(variant):
            if isinstance(entry.rule, Tied):
                hub[entry.sources[0].removeprefix(f"{variant.language_prefix}.")] = tensors[entry.rule.of].clone()
    names = list(hub)
    stem, ending = ("model", "safetensors") if form.safetensors else ("pytorch_model", "bin")
    save: Callable[[dict, Path], None] = _save_safetensors if form.safetensors else torch.save
    if form.shards == 1:
        save(hub, folder / f"{stem}.{ending}")
    else:
        weight_map: dict[str, str] = {}
        size = -(-len(names) // form.shards)
        for number in range(form.shards):
            part = names[number * size : (number + 1) * size]
            file = f"{stem}-{number + 1:05d}-of-{form.shards:05d}.{ending}"
            save({name: hub[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    write_tokenizer = {"opt": _write_opt_tokenizer, "t5": _write_t5_tokenizer}[variant.language.kind]
    write_tokenizer(variant, folder)
    (folder / "config.json").write_text(json.dumps(language_config(variant), indent=2) + "\n", encoding="utf-8")


def _save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def language_config(variant: Variant) -> dict[str, object]:
    """What a language model's config.json says on the hub, with a variant's sizes."""
    return {"opt": _opt_config, "t5": _t5_config}[variant.language.kind](variant)


def _opt_config(variant: Variant) -> dict[str, object]:
    """config.json as facebook/opt-* have it: written by hand, since LAVIS's transformers must read it too."""
    language = variant.language
    return {
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": language.mlp,
        "hidden_size": language.width,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": language.positions,
        "model_type": "opt",
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": language.vocabulary,
        "word_embed_proj_dim": language.width,
    }


def _t5_config(variant: Variant) -> dict[str, object]:
    """config.json as google/flan-t5-* have it, gelu and all: LAVIS overrides `dense_act_fn` itself."""
    language = variant.language
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": language.mlp,
        "d_kv": language.head_width,
        "d_model": language.width,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": language.layers,
        "num_heads": language.heads,
        "num_layers": language.layers,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": language.buckets,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": language.vocabulary,
    }


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(spare)
            spare += 1
    return [letters[byte] for byte in range(256)]


def _opt_vocabulary(variant: Variant) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair vocabulary and merges that spell `WORDS`, smaller than the embedding by 12 rows (OPT's by 7)."""
    room = variant.language.vocabulary - 12
    space = _byte_letters()[32]
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *_byte_letters()])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        start = space
        for letter in word:
            if start + letter not in vocabulary and len(vocabulary) < room:
                merges.append((start, letter))
                vocabulary[start + letter] = len(vocabulary)
            start += letter
    while len(vocabulary) < room:
        vocabulary[f"madeupword{len(vocabulary):04d}"] = len(vocabulary)
    return vocabulary, merges


def _write_opt_tokenizer(variant: Variant, folder: Path) -> None:
    vocabulary, merges = _opt_vocabulary(variant)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {f"{name}_token": {**token, "content": "</s>"} for name in ("bos", "eos", "unk")}
    special["pad_token"] = {**token, "content": "<pad>"}
    config = {**special, "add_bos_token": True, "add_prefix_space": False, "errors": "replace"}
    config["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    plain = {name: {key: value for key, value in text.items() if key != "__type"} for name, text in special.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")


def _t5_pieces(variant: Variant) -> list[str]:
    room = variant.language.vocabulary - 112  # 100 sentinels, 12 spare rows (flan-t5 has 28)
    pieces = ["<pad>", "</s>", "<unk>", "▁"]
    pieces += [f"▁{word}" for word in dict.fromkeys(WORDS)]
    pieces += [chr(code) for code in range(33, 127)]
    pieces += [f"▁{left}{right}" for left in "bcdfghlmnprstw" for right in "aeiouhlr"]
    pieces += [f"▁made{number:03d}" for number in range(room)]
    return list(dict.fromkeys(pieces))[:room]


def _write_t5_tokenizer(variant: Variant, folder: Path) -> None:
    """A unigram tokenizer.json in the form that both tokenizers 0.13 and current ones read."""
    pieces = _t5_pieces(variant)
    room = len(pieces)
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(100))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [(index, text) for index, text in enumerate(pieces[:3])]
    added += [(room + index, text) for index, text in enumerate(sentinels)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": sequence + second,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [[piece, 0.0 if index < 3 else -2.0 - 0.01 * index] for index, piece in enumerate(pieces)],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": sentinels}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), encoding="utf-8")
    config = {**special, "extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
