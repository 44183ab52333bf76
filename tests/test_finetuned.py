"""Fine-tuned checkpoints, as LAVIS's own trainer writes them: from the file to the verdict against LAVIS, and back.

The trainer's own method saves them, in LAVIS's environment, after parameters were moved as training moves them.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from records import raw

from blip2nb import api, twins
from blip2nb.conversion.files import Opened, find_files, open_source, own_files
from blip2nb.conversion.recognise import configured, told_by
from blip2nb.families.captioners.mapping import POSITIONS
from blip2nb.handles import Report, Run
from blip2nb.lavis_env import kernels
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.report.manifest import Manifest
from blip2nb.trace.tape import Tape
from blip2nb.variants import variant
from blip2nb.weights.convert import inverse_tensors
from blip2nb.weights.sources import files_in, open_checkpoint
from blip2nb.weights.stored import digest_of

OPT, T5, COCO = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl", "tiny-blip2-opt-2.7b-coco"
QFORMER = ["query_tokens", "Qformer.", "ln_vision.", "opt_proj.", "t5_proj."]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training: of what, which parameters it moved, what its configuration says beside the defaults, and whether the
    language model was held in half precision, as LAVIS does on a GPU."""

    model: str
    trained: list[str]
    config: dict[str, object] = dataclasses.field(default_factory=dict)
    half: bool = False
    distributed: bool = False
    zipped: bool = True
    queries: int = 32


CASES = {
    "qformer": Case(OPT, QFORMER, half=True),
    "qformer_t5": Case(T5, QFORMER, half=True),
    "vision_too": Case(OPT, [*QFORMER, "visual_encoder."]),
    "language_too": Case(T5, [*QFORMER, "t5_model."], half=True),
    "everything": Case(OPT, [""], half=True),
    "distributed": Case(OPT, QFORMER, distributed=True),
    "old_format": Case(T5, QFORMER, zipped=False),
    "larger_images": Case(OPT, QFORMER, {"image_size": 280, "prompt": "a photo of"}),
    "fewer_queries": Case(T5, QFORMER, {"num_query_token": 16}, queries=16),
    "coco": Case(COCO, [*QFORMER, "visual_encoder."]),
}

# Runs in LAVIS's environment, in the folder of a request: real LAVIS builds the model and its trainer saves it
TRAIN = """
import json, sys, types
import torch, record_lavis
from lavis.runners.runner_base import RunnerBase

for path in sys.argv[1:]:
    job = json.load(open(path))
    model, _ = record_lavis.build(record_lavis.read_request(job["request"]))
    generator = torch.Generator().manual_seed(7)
    if job["queries"] != model.query_tokens.shape[1]:
        model.query_tokens = torch.nn.Parameter(model.query_tokens[:, : job["queries"]].clone())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(job["trained"]))
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * parameter.data.std().nan_to_num() * noise
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=0.0)
    for parameter in moved:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if job["half"]:
        model.opt_model.half() if hasattr(model, "opt_model") else model.t5_model.bfloat16()
    trainer = types.SimpleNamespace(
        model=model, optimizer=optimizer, scaler=None, output_dir=job["folder"], unwrap_dist_model=lambda model: model,
        config=types.SimpleNamespace(to_dict=lambda: job["config"]),
    )
    if job["distributed"]:
        trainer.unwrap_dist_model = lambda model: torch.nn.ModuleDict({"module": model})
    RunnerBase._save_checkpoint(trainer, 4, is_best=True)
    if not job["zipped"]:
        saved = torch.load(job["folder"] + "/checkpoint_best.pth", weights_only=True)
        torch.save(saved, job["folder"] + "/checkpoint_best.pth", _use_new_zipfile_serialization=False)
"""


def in_lavis(folder: Path, code: str, arguments: list[str]) -> str:
    found = find_lavis()
    assert found is not None, "run `make lavis` first: these tests need LAVIS itself"
    command = [str(found.python), "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lavis_config(case: Case) -> dict[str, object]:
    """What LAVIS's trainer keeps of a run's configuration, with the defaults of the model type merged in."""
    model = variant(case.model)
    return {
        "run": {"task": "captioning", "max_epoch": 5, "init_lr": 1e-5, "distributed": case.distributed},
        "model": {
            "arch": model.lavis_class,
            "model_type": model.lavis_type,
            "load_finetuned": False,
            "freeze_vit": "visual_encoder." not in case.trained,
            "image_size": model.image_size,
            "num_query_token": model.qformer.queries,
            f"{model.language.kind}_model": model.language_model,
            "prompt": model.prompt,
            **case.config,
        },
        "datasets": {"coco_caption": {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": 224}}}},
    }


@pytest.fixture(scope="module")
def checkpoints(lavis_begins_warm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint_best.pth of each case."""
    folder = tmp_path_factory.mktemp("trained")
    jobs = []
    for name, case in CASES.items():
        opened = open_source(variant(case.model))
        sized = configured(opened.variant, {"image_size": case.config.get("image_size", opened.variant.image_size)})
        request = kernels.prepare(folder / name, dataclasses.replace(opened, variant=sized), "twin")
        job = {**dataclasses.asdict(case), "request": str(request), "folder": str(folder / name)}
        jobs.append(folder / name / "job.json")
        jobs[-1].write_text(json.dumps({**job, "config": lavis_config(case)}))
    in_lavis(folder / "qformer", TRAIN, [str(job) for job in jobs])
    return {name: folder / name / "checkpoint_best.pth" for name in CASES}


# Runs in LAVIS's environment: what each job says. It is recorded as `blip2nb capture` has it recorded; or LAVIS's own
# load_checkpoint reads what was reverted, over a model of its own files, and every parameter is told by hash
WORK = """
import json, sys, torch, record_lavis
from hashing import sha256_as, sha256_of

for path in sys.argv[1:]:
    job = json.load(open(path))
    request = record_lavis.read_request(job["request"])
    if "checkpoint" not in job:
        record_lavis.record(request)
        continue
    model, _ = record_lavis.build(request)
    found = model.load_checkpoint(job["checkpoint"])
    stored = torch.load(job["checkpoint"], weights_only=True)["model"]
    values = dict(model.named_parameters())
    digests = {name: sha256_as(value, sha256_of(stored[name])) for name, value in values.items() if name in stored}
    json.dump([list(stored), list(found.unexpected_keys), digests], open(job["found"], "w"))
"""
REVERTED = [(name, part) for name in ("qformer", "language_too", "coco") for part in ("trained", "all")]
SMALLER = {"width": 24, "layers": 2, "heads": 3, "mlp": 72, "vocabulary": 640}


@dataclasses.dataclass(frozen=True)
class Worked:
    """Runs with LAVIS's recording beside each, and what LAVIS found in the files that were reverted of some."""

    tuned: dict[str, Run]
    based: Run
    smaller: dict[str, Run]
    found: dict[tuple[str, str], list]


@pytest.fixture(scope="module")
def worked(
    checkpoints: dict[str, Path], converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory
) -> Worked:
    """Each checkpoint converted, with nothing said but its path; one over a converted base; other language models."""
    folder = tmp_path_factory.mktemp("worked")
    requests: dict[Path, Path] = {}  # where a recording belongs -> the request for it

    def convert(where: str, opened: Opened, **how: object) -> Run:
        run = api.convert(output=folder / where / "model", **how)
        requests[run.tape_path] = kernels.prepare(folder / where / "request", opened, "of a test")
        return run

    tuned = {name: convert(name, open_source(told_by(one), one), source=one) for name, one in checkpoints.items()}
    path, base = checkpoints["language_too"], converted(CASES["language_too"].model).model
    based = convert("based", open_source(told_by(path), path, base), source=path, base=base)
    smaller = {}
    for name in (OPT, T5):
        model = variant(name)
        source = folder / f"{name} source"
        twins.write_twin(dataclasses.replace(model, language=dataclasses.replace(model.language, **SMALLER)), source)
        smaller[name] = convert(name, open_source(model, source), model=name, source=source)

    jobs = []
    for number, request in enumerate(requests.values()):
        jobs.append(folder / f"{number}.json")
        jobs[-1].write_text(json.dumps({"request": str(request)}))
    found = {}
    for name, part in REVERTED:
        place = folder / f"{name} {part}"
        place.mkdir()
        assert api.revert(tuned[name], place / "back.pth", part=part).no_way_back == {}
        own = kernels.prepare(place / "request", open_source(variant(CASES[name].model)), "twin")
        found[name, part] = place / "found.json"
        jobs.append(place / "job.json")
        jobs[-1].write_text(
            json.dumps({"request": str(own), "checkpoint": str(place / "back.pth"), "found": str(found[name, part])})
        )
    in_lavis(next(iter(requests.values())).parent, WORK, [str(job) for job in jobs])
    for tape, request in requests.items():
        request.with_name("tape.safetensors").rename(tape)
    return Worked(tuned, based, smaller, {what: json.loads(path.read_text()) for what, path in found.items()})


def verified(run: Run, folder: Path) -> Report:
    """Both proofs, by the recording beside the run, which stays as it is."""
    return api.verify(run, proof="both", tape=run.tape_path, output=folder, figures=False)


@pytest.fixture(scope="module")
def tuned(worked: Worked) -> dict[str, Run]:
    return worked.tuned


@pytest.mark.lavis
@pytest.mark.parametrize("name", CASES)
def test_what_was_trained_in_lavis_is_the_same_model_in_transformers(tuned: dict[str, Run], tmp_path: Path, name: str):
    report = verified(tuned[name], tmp_path).content
    assert raw(report)["verdict"] == "explained", raw(report)["summary"]
    assert raw(report)["causes"] == ["post_layernorm_eps"]
    assert raw(report)["weights"]["modules_equal"] is True
    assert raw(report)["weights"]["roundtrip"] is True
    assert raw(report)["pixel_values"]["equal"]
    assert raw(report)["captions"]["equal"] or raw(report)["captions"]["equal_when_fixed"]
    fixed = [stage["fixed"]["excess"] for stage in raw(report)["stages"] if stage["fixed"]["excess"] is not None]
    assert all(0.5 < excess < 2 for excess in fixed)


@pytest.mark.lavis
@pytest.mark.parametrize("name", CASES)
def test_the_report_says_of_each_tensor_which_file_it_came_from(
    tuned: dict[str, Run], checkpoints: dict[str, Path], tmp_path: Path, name: str
):
    """The trained ones from the trainer's file, the others from what it was laid over: told by their values."""
    origins = api.verify(tuned[name], proof="weights", output=tmp_path, figures=False).content.weights.origins
    case, trained = CASES[name], open_checkpoint(checkpoints[name])[0]
    manifest = Manifest.read(tuned[name].model)
    assert set(origins) == set(manifest.parameters)
    for parameter, origin in origins.items():
        assert (origin == "checkpoint_best.pth") == parameter.startswith(tuple(case.trained)), parameter
        if origin == "checkpoint_best.pth":
            assert manifest.parameters[parameter] == trained[parameter].digest()


@pytest.mark.lavis
def test_sizes_and_prompt_are_taken_from_the_training(tuned: dict[str, Run]):
    larger, fewer = (
        json.loads((tuned[name].model / "config.json").read_text()) for name in ("larger_images", "fewer_queries")
    )
    assert larger["vision_config"]["image_size"] == 280
    assert fewer["num_query_tokens"] == 16
    manifest = Manifest.read(tuned["larger_images"].model)
    assert manifest.no_way_back == {POSITIONS: "interpolated from 257 positions"}
    assert manifest.variant.prompt == "a photo of"


@pytest.mark.lavis
def test_copies_the_trainer_leaves_in_its_file_are_accounted_for(tuned: dict[str, Run]):
    tied = Manifest.read(tuned["qformer_t5"].model).tied
    assert tied["t5_model.encoder.embed_tokens.weight"] == "tied to t5_model.shared.weight, cast to BF16"
    assert Manifest.read(tuned["qformer"].model).tied == {
        "opt_model.lm_head.weight": "tied to opt_model.model.decoder.embed_tokens.weight"
    }


@pytest.mark.lavis
@pytest.mark.parametrize("name", ["qformer", "language_too"])
def test_a_converted_directory_serves_as_the_base(
    worked: Worked, tuned: dict[str, Run], checkpoints, converted, tmp_path: Path, name: str
):
    """Vision tower, language model and Q-Former from transformers' files: the same bits, and LAVIS agrees. One of the
    two has no recording yet, so that LAVIS is started for it."""
    base = converted(CASES[name].model).model
    run = (
        worked.based
        if name == "language_too"
        else api.convert(source=checkpoints[name], base=base, output=tmp_path / "mine" / "model")
    )
    one, other = (Manifest.read(each.model) for each in (run, tuned[name]))
    assert one.written == other.written
    assert one.weights_hash == other.weights_hash
    report = verified(run, tmp_path / "proof") if run is worked.based else api.verify(run, proof="both", figures=False)
    assert report.verdict == "explained", raw(report)["summary"]
    assert raw(report)["versions"]["reference"]["salesforce-lavis"] == "1.0.2"
    assert Tape(run.tape_path).metadata["captions"] == Tape(tuned[name].tape_path).metadata["captions"]
    back = [api.revert(each, tmp_path / f"{number}.pth") for number, each in enumerate((run, tuned[name]))]
    held = [set(open_checkpoint(each.path)[0]) for each in back]
    assert held[0] == held[1], "LAVIS loads it instead of the pretrained checkpoint, so it holds what that would"


@pytest.mark.lavis
@pytest.mark.parametrize("name", [OPT, T5])
def test_another_language_model_is_carried_through(worked: Worked, tmp_path: Path, name: str):
    run = worked.smaller[name]
    assert Manifest.read(run.model).variant.language == dataclasses.replace(variant(name).language, **SMALLER)
    report = verified(run, tmp_path)
    assert report.verdict == "explained", raw(report)["summary"]
    assert sum("language" in stage["name"] and ".block." in stage["name"] for stage in raw(report)["stages"]) == (
        2 if name == OPT else 4
    )


# -- the way back


@pytest.mark.lavis
@pytest.mark.parametrize(("name", "part"), REVERTED)
def test_lavis_loads_what_was_reverted_and_has_the_weights_that_went_in(worked: Worked, name: str, part: str):
    run = worked.tuned[name]
    manifest = Manifest.read(run.model)
    held, unexpected, digests = worked.found[name, part]
    assert unexpected == []
    expected = (
        set(manifest.parameters)
        if part == "all"
        else {parameter for parameter, origin in manifest.origins.items() if origin in manifest.checkpoints}
    )
    assert set(held) == expected
    recorded = Tape(run.tape_path).metadata["parameters"]
    assert {parameter: digests[parameter] for parameter in expected} == {p: recorded[p] for p in expected}


@pytest.mark.parametrize("name", [OPT, T5, COCO])
def test_there_and_back_is_the_same_bits(converted: Callable[[str], Run], tmp_path: Path, name: str):
    """The whole model reverted, laid over nothing: its tensors are those that were assembled, and torch reads them."""
    run = converted(name)
    api.revert(run, tmp_path / "back.pth", part="all")
    back = open_checkpoint(tmp_path / "back.pth")[0]
    assert {parameter: stored.digest() for parameter, stored in back.items()} == Manifest.read(run.model).parameters
    loaded = torch.load(tmp_path / "back.pth", weights_only=True, mmap=True)["model"]
    assert {parameter: digest_of(value) for parameter, value in loaded.items()} == Manifest.read(run.model).parameters
    assert all(stored.offset % 64 == 0 and stored.crc32 is not None for stored in back.values())
    api.revert(run, tmp_path / "again.pth", part="all")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "back.pth").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pth", "back.pth"]


def test_what_was_tuned_in_transformers_goes_to_lavis_with_what_has_no_place_there_named(
    converted: Callable[[str], Run], tmp_path: Path
):
    """save_pretrained leaves no manifest, and training in transformers moves key biases too."""
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(converted(OPT).model)
    width = model.config.vision_config.hidden_size
    with torch.no_grad():
        model.query_tokens += 0.5
        model.vision_model.encoder.layers[2].self_attn.qkv.bias[width : 2 * width] += 0.1
    model.save_pretrained(tmp_path / "tuned")
    done = api.revert(tmp_path / "tuned", tmp_path / "back.pth", part="all")
    assert list(done.no_way_back) == ["vision_model.encoder.layers.2.self_attn.qkv.bias"]
    assert "key bias" in str(done)
    assert (done.variant.name, done.variant.lavis_type) == (OPT, "pretrain_opt2.7b")
    run = api.convert(OPT, tmp_path / "back.pth", tmp_path / "model")
    again = Blip2ForConditionalGeneration.from_pretrained(run.model)
    assert torch.equal(again.query_tokens, model.query_tokens)
    held = [one for one, _ in inverse_tensors(run.model, open_source(variant(OPT)).plan)]
    assert len(held) == len(Manifest.read(run.model).parameters)


def test_a_checkpoint_that_is_there_is_not_overwritten_unasked(
    command: Callable[..., Outcome], converted, tmp_path: Path
):
    path = tmp_path / "back.pth"
    path.write_bytes(b"mine")
    refused = command("revert", converted(OPT).model, "--output", path)
    assert (refused.status, path.read_bytes()) == (2, b"mine")
    assert command("revert", converted(OPT).model, "--output", path, "--overwrite").status == 0
    nothing = command("revert", tmp_path, "--output", tmp_path / "other.pth")
    assert nothing.status == 2


# -- what a checkpoint says, and what it may not be


def saved(folder: Path, tensors: dict[str, torch.Tensor], **model: object) -> Path:
    path = folder / "checkpoint_best.pth"
    config = {"arch": "blip2_opt", "model_type": "pretrain_opt2.7b", **model}
    torch.save({"model": tensors, "config": {"model": config}, "epoch": 1}, path)
    return path


def test_a_twin_and_its_original_are_told_apart_by_their_tensors(tmp_path: Path):
    assert told_by(saved(tmp_path, {"ln_vision.bias": torch.zeros(44)})).name == OPT
    assert told_by(saved(tmp_path, {"ln_vision.bias": torch.zeros(1408)})).name == "blip2-opt-2.7b"
    coco = saved(tmp_path, {"ln_vision.bias": torch.zeros(44)}, model_type="caption_coco_opt6.7b")
    assert told_by(coco).name == "tiny-blip2-opt-6.7b-coco"


FOREIGN = {
    "clip_l_by_name": ({"visual_encoder.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(2, 2)}, {}, "CLIP-L"),
    "clip_l_by_config": (
        {"ln_vision.bias": torch.zeros(44)},
        {"vit_model": "clip_L"},
        "'clip_L', expected 'eva_clip_g'",
    ),
    "lora": ({"opt_model.base_model.model.decoder.lora_A.weight": torch.zeros(2, 2)}, {}, "LoRA adapters. Merge them"),
    "instruct": ({"llm_proj.weight": torch.zeros(2, 2)}, {"arch": "blip2_vicuna_instruct"}, "InstructBLIP"),
    "vicuna_by_name": ({"llm_proj.weight": torch.zeros(2, 2)}, {}, "InstructBLIP"),
    "another_architecture": (
        {"ln_vision.bias": torch.zeros(44)},
        {"arch": "blip2_qformer"},
        "'blip2_qformer'; expected",
    ),
    "stage_one": ({"itm_head.weight": torch.zeros(2, 2)}, {}, "image-text matching"),
    "unknown": ({"ln_visual.bias": torch.zeros(44)}, {}, "not in the mapping: ln_visual.bias"),
    "unknown_type": ({"ln_vision.bias": torch.zeros(44)}, {"model_type": "pretrain_opt13b"}, "'pretrain_opt13b'"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_cannot_be_converted_is_refused_in_one_sentence(
    command: Callable[..., Outcome], tmp_path: Path, what: str
):
    tensors, model, words = FOREIGN[what]
    arguments = [] if what in ("unknown_type", "another_architecture") else [OPT]
    ended = command("convert", *arguments, "--source", saved(tmp_path, tensors, **model), "--output", tmp_path / "out")
    assert (ended.status, len(ended.said)) == (2, 1), ended.err
    assert words in ended.said[0]
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_say_what_it_is_needs_a_name(command: Callable[..., Outcome], tmp_path: Path):
    torch.save({"model": {"ln_vision.bias": torch.zeros(44)}}, tmp_path / "mine.pth")
    ended = command("convert", "--source", tmp_path / "mine.pth")
    assert ended.status == 2
    assert "does not say which model it was trained from" in ended.said[0]
    assert command("convert").status == 2


def test_an_image_size_the_patches_do_not_fit_is_refused(command: Callable[..., Outcome], tmp_path: Path):
    path = saved(tmp_path, {"ln_vision.bias": torch.zeros(44)}, image_size=300)
    ended = command("convert", "--source", path, "--output", tmp_path / "out")
    assert ended.status == 2
    assert "multiple of 14" in ended.said[-1]


def test_a_base_is_for_a_checkpoint_alone(command: Callable[..., Outcome], tmp_path: Path):
    folder = own_files(variant(OPT)).vision.parent
    ended = command("convert", OPT, "--source", folder, "--base", folder, "--output", tmp_path / "out")
    assert ended.status == 2
    assert "nothing to lay over" in ended.said[0]


def test_a_base_in_the_released_layout_serves_too(tmp_path: Path):
    folder = own_files(variant(OPT)).vision.parent
    path = saved(tmp_path, {"ln_vision.bias": torch.zeros(44)})
    files = find_files(variant(OPT), path, folder)
    assert files == dataclasses.replace(
        files_in(folder, variant(OPT)), checkpoints=(folder / variant(OPT).checkpoint, path)
    )
