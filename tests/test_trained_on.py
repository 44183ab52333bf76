"""A checkpoint that was trained on other files than the kit would lay it over is refused; one that was not, is not."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome

from blip2nb import api
from blip2nb.conversion.files import find_files, open_source, own_files
from blip2nb.conversion.trained_on import DEFAULTS, changed, wrong_base
from blip2nb.errors import RequestError
from blip2nb.families.captioners.mapping import POSITIONS, entries
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.variants import RELEASED, variant
from blip2nb.weights.download import LAVIS_URL
from blip2nb.weights.sources import open_checkpoint, open_file

OPT, T5, COCO = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl", "tiny-blip2-opt-2.7b-coco"
QFORMER = ("query_tokens", "Qformer.", "ln_vision.", "opt_proj.", "t5_proj.")

# What may stand in a configuration beside the defaults, and whether it is another beginning, by kind of model type
SETTINGS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "nothing": ({}, False, False),
    "finetuned_not_loaded": ({"load_finetuned": False}, False, True),
    "finetuned_loaded": ({"load_finetuned": True}, True, False),
    "finetuned_null": ({"load_finetuned": None}, False, True),
    "finetuned_as_text": ({"load_finetuned": "False"}, True, True),
    "pretrained_loaded": ({"load_pretrained": True}, False, False),
    "pretrained_not_loaded": ({"load_pretrained": False}, True, True),
    "pretrained_null": ({"load_pretrained": None}, True, True),
    "first_stage": ({"pretrained": f"{LAVIS_URL}blip2_pretrained.pth"}, True, True),
    "own_pretrained": ({"pretrained": "A/checkpoint_best.pth"}, True, True),
    "copy_of_pretrained": ({"pretrained": "/data/blip2_pretrained_opt2.7b.pth"}, True, True),
    "own_finetuned": ({"finetuned": "A/checkpoint_best.pth"}, True, True),
    "no_finetuned": ({"finetuned": None, "load_finetuned": False}, False, True),
    "empty_finetuned": ({"finetuned": "", "load_finetuned": False}, False, True),
    "other_language_model": ({"opt_model": "facebook/opt-1.3b"}, True, True),
    "local_language_model": ({"opt_model": "./opt-2.7b"}, True, True),
    "local_path": ({"opt_model": "/data/opt-2.7b"}, True, True),
    "of_the_other_kind": ({"t5_model": "./flan-t5-xl"}, False, False),
}


def trainers(folder: Path, tensors: dict[str, torch.Tensor], model: dict[str, Any], **run: Any) -> Path:
    """A checkpoint as LAVIS's trainer writes it."""
    path = folder / "checkpoint_best.pth"
    config = {"run": {"task": "captioning", **run}, "model": {"arch": "blip2_opt", **model}}
    torch.save({"model": tensors, "optimizer": {}, "config": config, "scaler": None, "epoch": 1}, path)
    return path


def part(name: str, *prefixes: str) -> dict[str, torch.Tensor]:
    """The tensors of a twin whose names begin so, and the first of each moved as by training."""
    whole = open_source(variant(name)).tensors.tensors
    return {one: stored.tensor() + 0.5 for one, stored in whole.items() if one.startswith(prefixes)}


def refused(command: Callable[..., Outcome], checkpoint: Path, *words: str) -> None:
    for verb in ("convert", "plan"):
        ended = command(verb, "--source", checkpoint, "--output", checkpoint.parent / "out")
        assert ended.status == 2, ended.err
        said = ended.said if verb == "convert" else [line for line in ended.out.splitlines() if "!!" in line]
        assert len(said) == 1
        assert all(word in said[0] for word in (*words, "--base"))
    assert not (checkpoint.parent / "out").exists()


@pytest.mark.parametrize("coco", [False, True], ids=["pretrain", "coco"])
@pytest.mark.parametrize("what", SETTINGS)
def test_each_setting_that_names_another_beginning_is_refused_without_a_base(
    converted, tmp_path: Path, what: str, coco: bool
):
    model = variant(COCO if coco else OPT)
    settings, refused = SETTINGS[what][0], SETTINGS[what][1 + coco]
    path = trainers(tmp_path, {"ln_vision.bias": torch.zeros(44)}, {"model_type": model.lavis_type, **settings})
    if not refused:
        assert find_files(model, path).checkpoints[-1] == path
        return
    with pytest.raises(RequestError) as error:
        open_source(model, path)
    name, value = next(iter(settings.items()))
    default = DEFAULTS[model.lavis_type][name]
    assert f"{name}: {value!r} (default of {model.lavis_type}: {default!r})" in str(error.value)
    assert "--base" in str(error.value)
    assert "\n" not in str(error.value)
    assert find_files(model, path, converted(OPT).model).checkpoints == (path,)


@pytest.mark.parametrize("name", RELEASED)
def test_the_defaults_themselves_written_out_are_no_deviation(name: str):
    model = variant(name)
    defaults = dict(DEFAULTS[model.lavis_type])
    config = {"model": {"model_type": model.lavis_type, **defaults}, "run": {"resume_ckpt_path": None}}
    assert changed(model, config) == {}
    assert wrong_base(model, config, ["query_tokens"]) == ""


def test_a_training_that_was_resumed_is_refused(command: Callable[..., Outcome], tmp_path: Path):
    path = trainers(
        tmp_path, {"ln_vision.bias": torch.zeros(44)}, {"model_type": "pretrain_opt2.7b"}, resume_ckpt_path="c_3.pth"
    )
    refused(command, path, "resume_ckpt_path: 'c_3.pth' (default of pretrain_opt2.7b: None)")


def test_a_coco_model_trained_with_the_tower_frozen(command: Callable[..., Outcome], converted, tmp_path: Path):
    """LAVIS's recipe for COCO on a small GPU. The tower is eva_vit_g's, interpolated, and not the COCO file's."""
    model = {"model_type": "caption_coco_opt2.7b", "load_finetuned": False, "freeze_vit": True, "image_size": 364}
    path = trainers(tmp_path, part(COCO, *QFORMER), model)
    refused(command, path, "load_finetuned: False (default of caption_coco_opt2.7b: True)")
    opened = open_source(variant(COCO), path, converted(OPT).model)
    assert opened.variant.image_size == 364
    assert [entry.kind for entry in opened.plan.written if POSITIONS in entry.sources] == ["InterpolatePositions"]
    tower = "visual_encoder.blocks.0.mlp.fc1.weight"
    eva = open_file(own_files(variant(OPT)).vision)[tower.removeprefix("visual_encoder.")]
    assert opened.tensors.tensors[tower].digest() == eva.digest()


def test_two_trainings_in_a_row(command: Callable[..., Outcome], tmp_path: Path):
    model = {
        "model_type": "pretrain_opt2.7b", "pretrained": "A/checkpoint_best.pth", "load_finetuned": False,
        "freeze_vit": True,
    }  # fmt: skip
    refused(command, trainers(tmp_path, part(OPT, *QFORMER), model), "pretrained: 'A/checkpoint_best.pth'")


def test_a_language_model_in_a_folder(command: Callable[..., Outcome], tmp_path: Path):
    """Named as it is refused, and taken from the base where there is one."""
    path = trainers(tmp_path, part(OPT, *QFORMER), {"model_type": "pretrain_opt2.7b", "opt_model": "./opt-2.7b"})
    refused(command, path, "opt_model: './opt-2.7b'")
    own = own_files(variant(OPT))
    assert open_source(variant(OPT), path, own.language.parent).files.language == own.language


@pytest.mark.parametrize(
    ("name", "prefixes", "settings", "taken"),
    [
        (COCO, (*QFORMER, "visual_encoder."), {"load_finetuned": False}, True),  # as LAVIS's own recipe trains it
        (COCO, (*QFORMER, "visual_encoder."), {"load_pretrained": False}, True),
        (OPT, QFORMER, {"load_pretrained": False}, True),
        (OPT, QFORMER[:2], {"load_pretrained": False}, False),
        (OPT, (*QFORMER, "visual_encoder."), {"pretrained": "A.pth"}, False),  # which may hold a language model
        (OPT, ("",), {"pretrained": "A.pth", "load_finetuned": False}, True),
        (OPT, ("",), {"opt_model": "./opt-2.7b"}, False),  # its tokenizer is in no checkpoint
    ],
)
def test_a_setting_is_let_pass_where_the_checkpoint_holds_all_that_it_could_change(
    tmp_path: Path, name: str, prefixes: tuple[str, ...], settings: dict[str, Any], taken: bool
):
    model = variant(name)
    path = trainers(tmp_path, part(name, *prefixes), {"model_type": model.lavis_type, **settings})
    if taken:
        _ = open_source(model, path).plan
    else:
        with pytest.raises(RequestError, match="--base"):
            open_source(model, path)


def test_a_model_named_otherwise_than_it_was_trained_is_compared_with_its_own_types_defaults(tmp_path: Path):
    """A training of the pretrain type that is called COCO's would be laid over COCO's tower."""
    path = trainers(tmp_path, part(OPT, *QFORMER), {"model_type": "pretrain_opt2.7b", "load_finetuned": False})
    with pytest.raises(RequestError, match=r"model_type: 'pretrain_opt2.7b' \(of tiny-blip2-opt-2.7b-coco"):
        open_source(variant(COCO), path)
    unknown = trainers(tmp_path, part(OPT, *QFORMER), {"model_type": "of_my_own", "load_finetuned": False})
    assert open_source(variant(OPT), unknown).plan.written


def test_a_folder_is_what_was_trained_on_and_that_is_said(
    source_copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    folder, model = source_copy(OPT), variant(OPT)
    settings = {"model_type": model.lavis_type, "pretrained": "A.pth"}
    trainers(tmp_path, part(OPT, *QFORMER), settings).replace(folder / model.checkpoint)
    assert open_source(model, folder).plan.written
    assert "pretrained: 'A.pth' (default of" in caplog.text
    assert "its folder is taken as all that it was trained on" in caplog.text


def test_a_folder_without_the_fine_tuned_file_beneath_is_refused(source_copy: Callable[[str], Path], tmp_path: Path):
    """COCO's tower is in COCO's file alone, which is not in the folder if a training has its name."""
    folder, model = source_copy(COCO), variant(COCO)
    trainers(tmp_path, part(COCO, *QFORMER), {"model_type": model.lavis_type}).replace(folder / model.checkpoint)
    with pytest.raises(RequestError, match=r"lacks visual_encoder\.\S+ and \d+ more tensors"):
        open_source(model, folder)
    trainers(tmp_path, part(COCO, *QFORMER, "visual_encoder."), {"model_type": model.lavis_type}).replace(
        folder / model.checkpoint
    )
    assert open_source(model, folder).plan.written


@pytest.mark.parametrize("verb", ["capture", "check", "verify"])
def test_every_verb_that_puts_a_source_together_refuses(converted, tmp_path: Path, verb: str):
    path = trainers(
        tmp_path, {"ln_vision.bias": torch.zeros(44)}, {"model_type": "pretrain_opt2.7b", "pretrained": "A.pth"}
    )
    run = converted(OPT)
    calls: dict[str, Callable[[], object]] = {
        "capture": lambda: api.capture(OPT, path, output=tmp_path / "tape.safetensors"),
        "check": lambda: api.check(run, path),
        "verify": lambda: api.verify(run, source=path, figures=False, output=tmp_path / "report.json"),
    }
    with pytest.raises(RequestError, match=r"pretrained: 'A\.pth'"):
        calls[verb]()


# Runs in LAVIS's environment: its own configuration of each type, its own choice of the file, and of what it resumes
LAVIS = """
import json, sys, types
from omegaconf import OmegaConf
from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.models import blip2_models
from lavis.models.base_model import BaseModel
from lavis.runners.runner_base import RunnerBase

class Probe(BaseModel):
    def load_checkpoint(self, url_or_filename): self.loaded = url_or_filename
    def load_from_pretrained(self, url_or_filename): self.loaded = url_or_filename

out = {"types": {}, "loaded": []}
for arch in ("blip2_opt", "blip2_t5"):
    for kind in registry.get_model_class(arch).PRETRAINED_MODEL_CONFIG_DICT:
        config = OmegaConf.create({"model": {"arch": arch, "model_type": kind}})
        out["types"][kind] = OmegaConf.to_container(Config.build_model_config(config))["model"]
for kind, settings in json.load(sys.stdin):
    probe = Probe()
    probe.load_checkpoint_from_config(OmegaConf.create({**out["types"][kind], **settings}))
    out["loaded"].append(probe.loaded)
trainer = types.SimpleNamespace(config=types.SimpleNamespace(run_cfg=OmegaConf.create({})))
out["resume_ckpt_path"] = RunnerBase.resume_ckpt_path.fget(trainer)
print(json.dumps(out))
"""


@pytest.mark.lavis
def test_the_table_is_laviss_own_and_so_is_which_file_lies_beneath():
    """Its configuration files, merged by its own loader; and for settings of each kind, the file that it would load."""
    lavis = find_lavis()
    assert lavis is not None
    tried = [
        (kind, {name: value for name, value in settings.items() if name in DEFAULTS[kind]})
        for kind, (settings, _, _) in itertools.product(DEFAULTS, SETTINGS.values())
    ]
    done = subprocess.run(
        [str(lavis.python), "-W", "ignore", "-c", LAVIS], input=json.dumps(tried), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {kind for kind, model in found["types"].items() if "vit_model" not in model} == set(DEFAULTS)
    for kind, defaults in DEFAULTS.items():
        merged = {"load_pretrained": True, **found["types"][kind], "resume_ckpt_path": found["resume_ckpt_path"]}
        assert {name: merged[name] for name in defaults} == defaults
        assert "load_pretrained" not in found["types"][kind]
    own = {model.lavis_type: model for model in map(variant, RELEASED)}
    for (kind, settings), loaded in zip(tried, found["loaded"], strict=True):
        config = {"model": {"model_type": kind, **settings}}
        if not changed(own[kind], config):
            assert loaded == LAVIS_URL + own[kind].checkpoint, (kind, settings)


def test_what_is_let_pass_is_a_whole_model_without_the_base():
    """The names by which a checkpoint is judged are those of the released files themselves."""
    for name in (OPT, T5, COCO):
        model = variant(name)
        held = set(open_checkpoint(own_files(model).checkpoints[0])[0])
        config = {"model": {"model_type": model.lavis_type, "load_pretrained": False}}
        assert wrong_base(model, config, held) == ""
        needed = held & {one for entry in entries(model) if not entry.optional for one in entry.sources}
        assert all(wrong_base(model, config, held - {one}) for one in needed)
