"""LAVIS's side of `benchmarks.false_alarms`: one process of LAVIS's environment that serves many recordings.

Importing LAVIS takes longer than running a twin, so a twin's model is built once and filled anew for every other set of
weights. Its blocks are also built alone, at their full size. Python 3.8; nothing of LAVIS is changed.

Started as `python lavis_side.py FOLDER`, where FOLDER holds the recorder that `lavis_env.kernels.prepare` copies.
Each line on standard input is a job as JSON, each is answered by one line of JSON:

    {"job": "twin", "request": {…}, "threads": 2}          what the recorder's request says, but for captions
    {"job": "block", "block": {…}, "weights": PATH, "inputs": PATH, "output": PATH, "threads": 2}

The answer is always what runs here: {"versions": {…}}.
"""

import functools
import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file


def main(folder):
    """Serve until standard input ends."""
    sys.path.insert(0, folder)
    import record_lavis

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # LAVIS prints while it builds
    twins = {}  # type: dict
    for line in sys.stdin:
        job = json.loads(line)
        torch.set_num_threads(job["threads"])
        with torch.no_grad():
            if job["job"] == "twin":
                record_twin(record_lavis, twins, job["request"])
            elif job["job"] == "block":
                run_block(job["block"], job["weights"], job["inputs"], job["output"])
        answers.write(json.dumps({"versions": record_lavis.versions()}) + "\n")
        answers.flush()


def record_twin(record_lavis, twins, request):
    """Build the model, or fill the one that was built, and record it on the request's images and texts.

    Args:
        twins: model name -> the model that was built.
    """
    name = request["model"]
    if name not in twins:
        twins[name] = record_lavis.build(request)[0]
    model = twins[name]
    record_lavis.fill(model, request)
    getattr(model, request["language_prefix"]).tie_weights()
    processor = record_lavis.eval_processor(request)
    pixels = torch.stack([processor(record_lavis.open_image(path)) for path in request["images"]])
    with record_lavis.recording(model, request["places"]) as recorded:
        model(dict(request["texts"], image=pixels))
    recorded["pixel_values"] = pixels
    save_file({place: value.clone() for place, value in recorded.items()}, request["output"])


def run_block(sizes, weights, inputs, output):
    """One of LAVIS's modules on its own: built, filled, called, its output written as `output`.

    Args:
        sizes: which module, and how large; see `build_block`.
        weights: path of its parameters by their own names. inputs: path of its arguments by name.
    """
    with torch.device("meta"):
        module = build_block(sizes)
    held = load_file(weights)
    for name in list(dict(module.named_parameters())):
        path, _, leaf = name.rpartition(".")
        if name in held:  # a Q-Former layer also has a branch for text, which a captioner never calls
            setattr(module.get_submodule(path), leaf, torch.nn.Parameter(held[name], requires_grad=False))
    arguments = load_file(inputs)
    if sizes["kind"] == "qformer":
        arguments["query_length"] = arguments["hidden_states"].shape[1]
    out = module.float().eval()(**arguments)
    save_file({"output": (out if isinstance(out, torch.Tensor) else out[0]).contiguous().clone()}, output)


def build_block(sizes):
    """LAVIS's own module, as its models build it.

    Args:
        sizes: kind (vision, patches, vision_norm, qformer, opt, t5_encoder, t5_decoder, t5_norm, norm or linear),
            width, and what else that kind needs.
    """
    from lavis.models import eva_vit
    from lavis.models.blip2_models import Qformer, blip2, modeling_opt, modeling_t5

    kind, width = sizes["kind"], sizes["width"]
    if kind == "vision":
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        return eva_vit.Block(width, sizes["heads"], mlp_ratio=4.3637, qkv_bias=True, norm_layer=norm)
    if kind == "patches":
        with torch.device("cpu"):  # while it is built, it computes with what it has
            return eva_vit.VisionTransformer(
                img_size=sizes["image"], patch_size=14, embed_dim=width, depth=0, num_heads=sizes["heads"]
            )
    if kind == "vision_norm":
        return blip2.LayerNorm(width)
    if kind == "qformer":
        config = Qformer.BertConfig(encoder_width=sizes["encoder_width"], add_cross_attention=True)
        config.encoder_width, config.add_cross_attention = sizes["encoder_width"], True
        config.cross_attention_freq, config.query_length = sizes["cross_every"], sizes["queries"]
        return Qformer.BertLayer(config, sizes["layer"])
    if kind == "opt":
        return modeling_opt.OPTDecoderLayer(
            modeling_opt.OPTConfig(
                hidden_size=width, num_attention_heads=sizes["heads"], ffn_dim=sizes["mlp"], dropout=0.0
            )
        )
    if kind in ("t5_encoder", "t5_decoder", "t5_norm"):
        config = modeling_t5.T5Config(
            d_model=width,
            d_kv=sizes["head_width"],
            d_ff=sizes["mlp"],
            num_heads=sizes["heads"],
            feed_forward_proj="gated-gelu",
            is_decoder=kind == "t5_decoder",
            use_cache=False,
        )
        config.dense_act_fn = "gelu"  # as LAVIS does
        if kind == "t5_norm":
            return modeling_t5.T5LayerNorm(width, eps=config.layer_norm_epsilon)
        return modeling_t5.T5Block(config)
    if kind == "norm":
        return torch.nn.LayerNorm(width, eps=sizes["eps"])
    return torch.nn.Linear(width, sizes["outputs"], bias=sizes["bias"])


if __name__ == "__main__":
    main(sys.argv[1])
