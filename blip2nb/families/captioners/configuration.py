"""The configuration of a converted directory: config.json, generation_config.json, tokenizer and image processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.forms import made_of, plain
from blip2nb.variants import Variant
from blip2nb.weights.sources import Files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGE = Path(__file__).resolve().parents[2]

# LAVIS's `generate`, by the names transformers gives the same settings. LAVIS's min_length of 1 is met by the prompt's
# first token, so that it never holds a caption back; transformers' min_new_tokens would.
GENERATION = {"num_beams": 5, "max_new_tokens": 30, "length_penalty": 1.0}

# What `Blip2Image…Processor`s of both libraries normalise with: CLIP's statistics
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def write_configuration(
    variant: Variant, text: dict[str, Any], language: Path, folder: Path, dtype: str = "float32"
) -> None:
    """Write config.json, generation_config.json and the processor's files into `folder`.

    Where transformers is not loaded yet, a process of its own does it: loading it here would hold up the threads that
    copy, and without PyTorch, which tokenizers and processors do without, it is loaded in a quarter of the time.

    Args:
        text: the language model's own configuration, as `read_language_config` gives it.
        language: the folder with its tokenizer, which gets `<image>` added.
        dtype: what `from_pretrained` is to load the weights as, unless it is told otherwise.

    Raises:
        RequestError: there is no tokenizer, or it has more entries than the embedding has rows.
    """
    if "transformers" in sys.modules:
        _write(variant, text, language, folder, dtype)
        return
    job = [plain(variant), text, str(language), dtype]
    paths = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        input=json.dumps(job),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise (RequestError if done.returncode == RequestError.exit_status else RuntimeError)(said[-1])
    for name, content in json.loads(done.stdout).items():
        (folder / name).write_text(content, encoding="utf-8")


def main() -> None:
    """What the process does: the job comes on standard input, the files go to standard output as name -> content, what
    is wrong to standard error. It writes nothing itself, since it may outlive a run that is killed."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    variant, text, language, dtype = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            _write(made_of(Variant, variant), text, Path(language), folder, dtype)
        except RequestError as error:
            print(" ".join(str(error).split()), file=sys.stderr)
            sys.exit(RequestError.exit_status)
        files = sorted(folder.iterdir())
        json.dump({path.name: path.read_text(encoding="utf-8") for path in files}, sys.stdout)


def _write(variant: Variant, text: dict[str, Any], language: Path, folder: Path, dtype: str) -> None:
    tokenizer = load_tokenizer(variant, language)
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    write_processor(variant, tokenizer, folder)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if image_token >= variant.language.vocabulary:
        raise RequestError(
            f"{tokenizer.name_or_path}: <image> would be token {image_token}, but the embedding has "
            f"{variant.language.vocabulary} rows. The tokenizer belongs to another language model."
        )
    config = model_config(variant, text, image_token, newline[0] if newline else None)
    config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    ends = {
        name: config["text_config"][name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        if name in config["text_config"]
    }
    _write_json(folder / "generation_config.json", {**ends, **GENERATION})


def model_config(variant: Variant, text: dict[str, Any], image_token: int, newline: int | None) -> dict[str, Any]:
    """The content of config.json.

    Args:
        text: the language model's own config.json.
        newline: the token LAVIS ends an OPT caption with.
    """
    vision, qformer = variant.vision, variant.qformer
    text = {
        name: value
        for name, value in text.items()
        if name not in ("_name_or_path", "torch_dtype", "transformers_version")
    }
    if variant.language.kind == "opt":
        text["eos_token_id"] = newline
    else:
        # LAVIS overrides the activation; a BOS is needed to caption without a prompt; lm_head has weights of its own
        text |= {"dense_act_fn": "gelu", "bos_token_id": 1, "tie_word_embeddings": False}
    config: dict[str, Any] = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "dtype": "float32",  # without it, loading takes one tensor's dtype and rounds the rest
        "image_token_index": image_token,
        "num_query_tokens": qformer.queries,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "use_decoder_only_language_model": variant.language.kind == "opt",
        "is_encoder_decoder": variant.language.kind == "t5",
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": variant.image_size,
            "patch_size": vision.patch,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": qformer.width,
            "intermediate_size": qformer.mlp,
            "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": vision.width,
        },
        "text_config": text,
    }
    if variant.language.kind == "t5":
        config["tie_word_embeddings"] = False  # beside the one in text_config: versions differ in which they read
    return config


def read_language_config(files: Files) -> dict[str, Any]:
    """The language model's own configuration; of a converted base, what it says of its language model.

    Raises:
        RequestError: it is missing or unreadable, or there is no tokenizer beside it.
    """
    path = files.language / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} should be the language model's configuration ({error}).") from error
    _require_tokenizer(files.language)
    if files.base is None:
        return config
    from transformers import AutoConfig

    text = dict(config.get("text_config", {}))  # transformers 4 left out what was its default
    return AutoConfig.for_model(text.pop("model_type", "opt"), **text).to_dict()


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # transformers would make an empty tokenizer of it, without a word
        raise RequestError(
            f"{folder} should hold the language model's tokenizer too: tokenizer.json, or vocab.json with merges.txt. "
            "Copy it from the language model's hub page."
        )


def old_language_files(text: dict[str, Any], folder: Path) -> dict[str, dict[str, Any] | str]:
    """A converted directory's language model as the old transformers that LAVIS needs reads it: file name -> content.

    Args:
        text: its configuration, as `read_language_config` gives it.
        folder: the directory, for its tokenizer.
    """
    config = {name: value for name, value in text.items() if name not in ("dtype", "torch_dtype")}
    if config["model_type"] == "t5":
        config["tie_word_embeddings"] = False  # flan-t5's head has weights of its own, and new versions say otherwise
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = ("add_bos_token", "add_prefix_space", "bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")
    settings = {name: settings[name] for name in kept if name in settings}
    out: dict[str, dict[str, Any] | str] = {"config.json": config, "tokenizer_config.json": settings}
    path = folder / "tokenizer.json"
    if not path.is_file():
        return out
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if config["model_type"] == "opt":
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}  # OPT's texts begin with one
        model = tokenizer["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return out | {"vocab.json": model["vocab"], "merges.txt": "\n".join(["#version: 0.2", *pairs]) + "\n"}
    settings["tokenizer_class"] = "T5Tokenizer"
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != "<image>"]
    return out | {"tokenizer.json": _old_metaspace(tokenizer)}


def _old_metaspace(part: Any) -> Any:
    """The same tokenizer with its word boundaries described as tokenizers 0.13 has it."""
    if isinstance(part, list):
        return [_old_metaspace(one) for one in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Metaspace":
        always = part.get("prepend_scheme", "always") != "never"
        return {"type": "Metaspace", "replacement": part["replacement"], "add_prefix_space": always}
    return {name: _old_metaspace(one) for name, one in part.items()}


def load_tokenizer(variant: Variant, folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer from its folder, no network, no remote code.

    Raises:
        RequestError: there is none, or it does not begin and end a text as the language model expects.
    """
    from transformers import AutoTokenizer

    _require_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer("a").input_ids
    except Exception as error:  # the tokenizers library raises nothing narrower
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{folder} should hold the language model's tokenizer too ({first}).") from error
    place, wanted = (0, tokenizer.bos_token_id) if variant.language.kind == "opt" else (-1, tokenizer.eos_token_id)
    if ids[place] != wanted:
        raise RequestError(
            f"{folder}: the tokenizer should put token {wanted} at the {'end' if place else 'start'} of a text, "
            "and does not. Its tokenizer_config.json is missing or another model's; copy it from the hub page."
        )
    return tokenizer


def write_processor(variant: Variant, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save image processor and tokenizer together; this adds `<image>` to the tokenizer."""
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    side = variant.image_size
    images = BlipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    Blip2Processor(images, tokenizer, num_query_tokens=variant.qformer.queries).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("local_files_only", "is_local", "name_or_path"):  # how it was loaded here is nobody else's business
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 knows them by another name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(path, config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
