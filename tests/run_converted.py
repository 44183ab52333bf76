"""What converted directories compute in whichever transformers this Python finds. As a script it writes them to files:

    python tests/run_converted.py OUT DIRECTORY=DTYPE…

This loads and runs them as their users do, with nothing but what transformers 4.57 and 5 have both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from blip2nb.families.captioners.huggingface import Loaded, caption, forward_inputs
from blip2nb.families.captioners.inputs import demo_images, texts
from blip2nb.report.manifest import Manifest

# transformers 5 picks another image processor than was saved, unless it is told; 4.57 picks the one that was
OPTIONS = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {}


def compute(folder: Path, dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (inputs, logits) and plain facts (captions, what loading said) of one directory.

    Args:
        dtype: what to load the weights as, by its name in PyTorch; "auto" for what config.json says.
    """
    variant = Manifest.read(folder).variant
    model, info = Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    loaded = Loaded(model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True, **OPTIONS))
    images = demo_images(variant)
    inputs = forward_inputs(loaded, variant, images[0], texts(variant))
    with torch.no_grad():
        logits = model(**inputs).logits
    language = model.language_model
    tensors = {name: inputs[name].contiguous() for name in ("input_ids", "attention_mask", "pixel_values")}
    tensors["logits"] = logits.float().contiguous()
    return tensors, {
        "loading": {what: sorted(map(str, names)) for what, names in info.items()},
        "dtypes": {name: str(one.dtype) for name, one in model.named_parameters()},
        "tied": language.lm_head.weight.data_ptr() == language.get_input_embeddings().weight.data_ptr(),
        "captions": caption(loaded, images, variant.prompt, num_beams=1, max_new_tokens=30)["ids"],
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


def main(out: Path, jobs: list[str]) -> None:
    """Compute every job, and write what comes out as OUT/<number>.safetensors and .json."""
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        folder, dtype = job.rsplit("=", 1)
        tensors, facts = compute(Path(folder), dtype)
        save_file(tensors, out / f"{number}.safetensors")
        (out / f"{number}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
