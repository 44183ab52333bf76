"""Builds LAVIS's own model on given weights and records a tape of what it does.

Runs where LAVIS is installed, which may be an old environment far from this kit: Python 3.8, and nothing but torch,
lavis, safetensors and the small files copied beside it (see `_FILES` in blip2nb/lavis_env/kernels.py). Everything that
is to be done stands in a request, a JSON file that the kit writes:

    python record_lavis.py request.json

LAVIS is used as it is installed. Only how its weights are found and loaded is replaced: its model is built without
the download and without storage, then filled tensor by tensor from the files, in float32. `torch.load`, which runs code
below torch 2.6, is never called: the kit's own reader comes along. No forward code is touched; on a GPU, where LAVIS
would wrap it in autocast, that wrapper is left out, and the tape says so.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

if __package__:
    from blip2nb.trace.tape import attributes, first_call, recording, save_tape
    from blip2nb.weights.hashing import sha256_as, sha256_of, sha256_of_all
    from blip2nb.weights.stored import Stored
    from blip2nb.weights.torchfile import Odd, read_torch_file
else:  # copied to where LAVIS is
    from hashing import sha256_as, sha256_of, sha256_of_all  # type: ignore[no-redef]
    from stored import Stored  # type: ignore[no-redef]
    from tape import attributes, first_call, recording, save_tape  # type: ignore[no-redef]
    from torchfile import Odd, read_torch_file  # type: ignore[no-redef]

log = logging.getLogger("blip2nb.lavis")

CAPTION_MODES: dict = {  # in LAVIS's words; its own defaults are 5 beams and a penalty of 1
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 5, "length_penalty": 0.0},
    "default": {},
}


def record(request, progress=None):
    """Do what a request says: build, load, run, write the tape.

    Args:
        request: what to do, as a dict (see `read_request`).
        progress: called with a sentence at each step.

    Returns:
        The tape's metadata. The tape itself lies at request["output"].
    """
    say = progress or log.info
    say("building LAVIS's {class} for {model}".format(**request))
    model, digests = build(request)
    return run(model, digests, request, say)


def run(model, digests, request, progress=None):
    """Show LAVIS's model the request's images and texts, and write what happened to request["output"].

    Args:
        model, digests: what `build` returned.

    Returns:
        The tape's metadata.
    """
    say = progress or log.info
    started = time.time()
    model = model.to(torch.device(request["device"]))
    pixels = _pixels(request)
    named = request.get("takes")
    takes = named or [
        {"picture": number, "texts": request["texts"], "prompt": request["prompt"]} for number in range(len(pixels))
    ]
    say("running it on {} image(s)".format(len(pixels)))
    with tempfile.TemporaryDirectory(dir=os.path.dirname(request["output"]) or ".") as scratch:
        with torch.no_grad(), _plain_float32(model):
            recorded, parts = _record_takes(model, request, takes if named else takes[:1], pixels, scratch, say)
            captions = _captions(model, takes, pixels, say)
        for number, path in enumerate(request["images"]):
            image = {"image.{}".format(number): _bytes_of(path)}
            if named:
                parts.append(("", _spill(image, scratch, "image-{}".format(number))))
            else:
                recorded.update(image)
        metadata = {
            "model": request["model"],
            "class": request["class"],
            "type": request["type"],
            "source": request["source"],
            "texts": request["texts"],
            "prompt": request["prompt"],
            "captions": captions,
            "pixels_sha256": [_sha256(one) for one in pixels],
            "parameters": digests,
            "weights_hash": sha256_of_all(digests),
            "source_hash": request["source_hash"],
            "inputs_hash": request["inputs_hash"],
            "attributes": attributes(model),
            "device": request["device"],
            "dtype": "float32",
            "autocast": "none" if torch.device(request["device"]).type == "cpu" else "switched off",
            "versions": versions(),
            "seconds": round(time.time() - started, 2),
        }
        if named:
            metadata.update(takes=takes, skipped=request["skipped"])
        save_tape(request["output"], recorded, metadata, parts)
    say("wrote {}".format(request["output"]))
    return metadata


def _pixels(request):
    """What LAVIS's processor makes of each of the request's images: a list of (3, height, width)."""
    processor = eval_processor(request)
    pixels = [processor(open_image(path)) for path in request["images"]]
    if pixels[0].shape[-1] != request["image_size"]:
        raise ValueError("LAVIS's processor made {} pixels, not {}".format(pixels[0].shape[-1], request["image_size"]))
    return pixels


def _record_takes(model, request, takes, pixels, scratch, say):
    """Run each take's image and texts. Returns what was recorded of the first, and the tapes that hold the others:
    together they may be larger than the memory. Only of the first is recorded what happens inside the stages."""
    first, parts = {}, []  # type: dict, list
    device = torch.device(request["device"])
    for number, take in enumerate(takes):
        if len(takes) > 1:
            say("recording {} of {}".format(number + 1, len(takes)))
        image = pixels[take["picture"]][None]
        with recording(model, request["places"], () if number else request["inside"]) as recorded:
            model(dict(take["texts"], image=image.to(device)))
        recorded["pixel_values"] = image
        if number:
            parts.append(("take.{}/".format(number), _spill(recorded, scratch, "take-{}".format(number))))
        else:
            first = recorded
    return first, parts


def _spill(tensors, folder, name):
    path = os.path.join(folder, name)
    save_tape(path, tensors)
    return path


def _captions(model, takes, pixels, say):
    device = next(model.parameters()).device

    def made(options, prompt, places):
        images = torch.stack([pixels[takes[place]["picture"]] for place in places]).to(device)
        return caption(model, images, prompt, **options)

    captions = {}
    for mode, options in CAPTION_MODES.items():
        say("captioning, {}".format(mode))
        captions[mode] = in_batches([take["prompt"] for take in takes], functools.partial(made, options))
    return captions


BATCH = 8
"""So many images are captioned at once. Chosen: any number does; each image takes memory for five beams."""


def in_batches(prompts, captioned):
    """Caption many images a few at a time, those with one prompt together, so that no prompt needs padding.

    Args:
        prompts: one per caption.
        captioned: called with a prompt and the numbers of the captions that are due; returns lists by name, each with
            an item for each of these.

    Returns:
        The same lists for all captions, in the order of `prompts`.
    """
    due = {}  # type: dict
    for number, prompt in enumerate(prompts):
        due.setdefault(prompt, []).append(number)
    out = {}  # type: dict
    for prompt, numbers in due.items():
        for start in range(0, len(numbers), BATCH):
            places = numbers[start : start + BATCH]
            for what, values in captioned(prompt, places).items():
                whole = out.setdefault(what, [None] * len(prompts))
                for at, place in enumerate(places):
                    whole[place] = values[at]
    return out


def enter(model, request, path):
    """Run LAVIS's forward on the request's first image up to one of its modules, and stop there.

    Returns:
        The module, and the arguments it is called with by name.
    """
    pixels = eval_processor(request)(open_image(request["images"][0]))[None]
    module = model.get_submodule(path)
    with torch.no_grad(), _plain_float32(model), first_call(module) as given:
        model(dict(request["texts"], image=pixels))
    return module, given


def read_request(path):
    """A request from its file. The images and the tape that it names relatively lie beside it."""
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    folder = os.path.dirname(os.path.abspath(path))
    request["images"] = [os.path.join(folder, image) for image in request["images"]]
    request["output"] = os.path.join(folder, request["output"])
    return request


def build(request):
    """LAVIS's model with the request's weights, in float32 and eval mode, and the digest of each parameter in it.

    Raises:
        RuntimeError: the files leave a parameter of LAVIS's model without a value.
    """
    from lavis.common.registry import registry

    with tempfile.TemporaryDirectory() as folder:
        _write_bert(request, os.path.join(folder, "bert-base-uncased"))
        with _without_weights(request), _inside(folder):
            model = registry.get_model_class(request["class"])(
                vit_model="eva_clip_g",
                img_size=request["image_size"],
                vit_precision="fp32",
                num_query_token=request["qformer"]["queries"],
                prompt=request["prompt"],
                **{"{}_model".format(request["language"]["kind"]): request["files"]["language"]},
            )
    stored = fill(model, request)
    language = getattr(model, request["language_prefix"])
    language.tie_weights()
    model = model.float().eval()
    empty = [name for name, _ in model.named_parameters() if name not in stored]
    if empty:
        raise RuntimeError(
            "The files have no value for {} of LAVIS's parameters, for one {}".format(len(empty), empty[0])
        )
    digests = {name: sha256_as(value, stored[name]) for name, value in model.named_parameters()}
    return model, digests


@contextlib.contextmanager
def _plain_float32(model):
    """On a GPU LAVIS wraps its forward in autocast and PyTorch rounds convolutions to TF32; on a CPU neither happens.
    This makes the GPU do what the CPU does."""
    if next(model.parameters()).device.type == "cpu":
        yield
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with mock.patch.object(type(model), "maybe_autocast", lambda self, dtype=None: contextlib.nullcontext()):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def caption(model, pixels, prompt, **options):
    """LAVIS's `generate` behind a prompt, keeping the token ids that it decodes and throws away.

    Returns:
        {"ids": one list per image, from the first new token to the end-of-sequence token, "text": one string per
        image}, and where one beam is followed "steps": one list per image, of `ladder`'s rows.
    """
    language = model.opt_model if hasattr(model, "opt_model") else model.t5_model
    kept = {}
    generate = language.generate

    def keep(**arguments):
        kept["out"] = generate(**arguments)
        kept["start"] = arguments["input_ids"].shape[1] if "input_ids" in arguments else 1
        return kept["out"]

    scores = []  # what the model said of the next token, each time it was asked
    head = language.lm_head.forward

    def keep_scores(*arguments):
        result = head(*arguments)
        scores.append(result[:, -1].detach().float().cpu())
        return result

    with mock.patch.object(language, "generate", keep), mock.patch.object(language.lm_head, "forward", keep_scores):
        text = model.generate({"image": pixels, "prompt": prompt}, **options)
    end = model.eos_token_id if hasattr(model, "eos_token_id") else language.config.eos_token_id
    ids = [until(row[kept["start"] :].tolist(), end) for row in kept["out"]]
    said = {"ids": ids, "text": [one.strip() for one in text]}
    if options.get("num_beams") == 1:
        said["steps"] = ladder(ids, scores)
    return said


def ladder(ids, scores):
    """How sure a model was of each token of its greedy captions.

    Args:
        ids: one list of token ids per caption.
        scores: one tensor per step, of shape (captions, vocabulary): the logits that the step's token was taken from.

    Returns:
        One list per caption of [token, its log-probability, the likeliest other token, its log-probability], in nats.
    """
    steps = [[] for _ in ids]  # type: list
    for place, logits in enumerate(scores):
        probabilities = logits.double().log_softmax(-1)
        for row, said in enumerate(ids):
            if place < len(said):
                first, second = probabilities[row].topk(2).indices.tolist()
                other = second if first == said[place] else first
                pair = [probabilities[row, token].item() for token in (said[place], other)]
                steps[row].append([said[place], pair[0], other, pair[1]])
    return steps


def until(ids, end):
    """The tokens up to and with the first `end`; what follows it is padding."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def versions():
    """What ran: name -> version."""
    import importlib.metadata
    import platform

    import transformers

    return {
        "salesforce-lavis": importlib.metadata.version("salesforce-lavis"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _write_bert(request, folder):
    """bert-base-uncased as LAVIS looks it up by name: its configuration, with the request's sizes, and a vocabulary.

    A captioner never tokenises with it and drops its word embeddings, so the special tokens are vocabulary enough.
    """
    sizes = request["qformer"]
    os.makedirs(folder)
    config = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": sizes["width"],
        "initializer_range": 0.02,
        "intermediate_size": sizes["mlp"],
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
        file.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) + "\n")


@contextlib.contextmanager
def _without_weights(request):
    """LAVIS's classes build their parts empty: from configurations, on the meta device, without downloading."""
    from lavis.models import eva_vit
    from lavis.models.blip2_models import blip2, blip2_opt, blip2_t5

    sizes = request["vision"]

    def vision_tower(img_size, drop_path_rate, use_checkpoint, precision):
        with _no_storage():
            return eva_vit.VisionTransformer(
                img_size=img_size,
                patch_size=sizes["patch"],
                use_mean_pooling=False,
                embed_dim=sizes["width"],
                depth=sizes["layers"],
                num_heads=sizes["heads"],
                mlp_ratio=4.3637,
                qkv_bias=True,
                drop_path_rate=drop_path_rate,
                norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
                use_checkpoint=use_checkpoint,
            )

    def from_config(cls, name, config=None, **kwargs):
        config = config if config is not None else cls.config_class.from_pretrained(name)
        with _no_storage():
            return cls(config)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(blip2, "create_eva_vit_g", vision_tower))
        for cls in (blip2.BertLMHeadModel, blip2_opt.OPTForCausalLM, blip2_t5.T5ForConditionalGeneration):
            stack.enter_context(mock.patch.object(cls, "from_pretrained", classmethod(from_config)))
        yield


@contextlib.contextmanager
def _no_storage():
    """Parameters made inside take no memory. Before torch 2.0 they do, and are overwritten."""
    with contextlib.ExitStack() as stack:
        if hasattr(torch.device("meta"), "__enter__"):
            stack.enter_context(torch.device("meta"))
            on_cpu = functools.partial(torch.linspace, device="cpu")  # LAVIS reads numbers out of it while building
            stack.enter_context(mock.patch.object(torch, "linspace", on_cpu))
        yield


@contextlib.contextmanager
def _inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fill(model, request):
    """Lay vision file, language model and checkpoints over each other, as float32. Returns name -> digest as stored."""
    stored = {}
    files = request["files"]
    aliases = request["aliases"]
    known = set(model.state_dict())
    parts = [_base(model, request)]
    parts.extend(_read(path) for path in files["checkpoints"])
    for part in parts:
        spare = {}
        for name, value in part:
            if name in aliases:
                spare[aliases[name]] = value
            elif name in known:
                stored[name] = sha256_of(value)
                _assign(model, name, value)
        for name, value in spare.items():  # a file may hold a tensor under its second name alone
            if name not in stored:
                stored[name] = sha256_of(value)
                _assign(model, name, value)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            _assign(model, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return stored


def _base(model, request):
    """(LAVIS name, tensor) of what the checkpoints are laid over: vision file and language model, or a directory that
    was converted already, taken apart again by the table of modules that are paired."""
    files, tower = request["files"], model.visual_encoder
    if files["base"] is not None:
        held = dict(_read_folder(files["base"]))
        pairs = request["pairs"].items()
        found = {name: held[target][start:stop] for name, (target, start, stop) in pairs if target in held}
        positions = {"pos_embed": found["visual_encoder.pos_embed"]}
        _interpolate(tower, positions)
        found["visual_encoder.pos_embed"] = positions["pos_embed"]
        for pair in found.items():
            yield pair
        return
    vision = dict(_read(files["vision"]))
    _interpolate(tower, vision)
    for name, value in vision.items():
        yield "visual_encoder." + name, value
    for name, value in _read_folder(files["language"]):
        yield _language_name(request["language_prefix"], name), value


def _interpolate(tower, vision):
    from lavis.models.eva_vit import interpolate_pos_embed

    with contextlib.redirect_stdout(io.StringIO()):
        interpolate_pos_embed(tower, vision)


def _assign(model, name, value):
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value.clone()
    else:
        setattr(module, leaf, torch.nn.Parameter(value.detach().float(), requires_grad=False))


def _language_name(prefix, name):
    if prefix == "opt_model" and name.startswith("decoder."):
        name = "model." + name
    return "{}.{}".format(prefix, name)


def _read_folder(folder):
    """(name, tensor) of a hub-style folder, safetensors before .bin, whole or in shards."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, single + ".index.json")
        if os.path.isfile(os.path.join(folder, single)):
            return _read(os.path.join(folder, single))
        if os.path.isfile(index):
            with open(index, encoding="utf-8") as file:
                shards = sorted(set(json.load(file)["weight_map"].values()))
            paths = [os.path.join(folder, os.path.basename(name)) for name in shards]
            return (pair for path in paths for pair in _read(path))
    raise FileNotFoundError("{} holds no weights".format(folder))


def _read(path):
    """(name, tensor) of one file, memory-mapped where it can be; what stands under "model" if there is such a key."""
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
        return
    content = read_torch_file(Path(path))
    content = content["model"] if isinstance(content.get("model"), dict) else content
    tensors = {name: value for name, value in content.items() if isinstance(value, (Stored, Odd))}
    distributed = all(name.startswith("module.") for name in tensors)
    for name, value in tensors.items():
        if isinstance(value, Odd):
            raise ValueError("{}: {} has dtype {}".format(path, name, value.dtype))
        yield name[len("module.") :] if distributed else name, value.tensor()


def eval_processor(request):
    """LAVIS's own image processing for evaluation, from the model type's configuration."""
    from lavis.common.registry import registry
    from lavis.models import load_preprocess
    from omegaconf import OmegaConf

    path = registry.get_model_class(request["class"]).default_config_path(request["type"])
    config = OmegaConf.load(path).preprocess
    config.vis_processor.eval.image_size = request["image_size"]  # as a training at another size has it
    return load_preprocess(config)[0]["eval"]


def open_image(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def _bytes_of(path):
    with open(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


def _sha256(tensor):
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()


def main(path):
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    record(read_request(path))


if __name__ == "__main__":
    main(sys.argv[1])
