"""Wrong input gets one sentence and exit status 2, before work starts, and nothing half-written is left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, edit_weights, snapshot

from blip2nb import api
from blip2nb.conversion.files import own_files
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.lavis_env import reference
from blip2nb.variants import variant

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
Copy = Callable[[str], Path]


@pytest.fixture
def refuse(command: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Run a command that should be refused; returns the one sentence it says."""

    def run(*arguments: object) -> str:
        there = snapshot(tmp_path)
        return sentence(command(*arguments), tmp_path, there)

    return run


def sentence(ended: Outcome, folder: Path, there: dict) -> str:
    assert snapshot(folder) == there, "something was left behind"
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert (ended.status, len(ended.said)) == (2, 1), ended.err
    assert ended.said[0].startswith("blip2nb: ")
    return ended.said[0].removeprefix("blip2nb: ")


def in_a_process(*arguments: object, **environment: str) -> Outcome:
    """The command line as a user's shell starts it. An empty value takes a variable away."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    command = [sys.executable, "-m", "blip2nb.cli", *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


# -- weights that are wrong


def checkpoint(folder: Path, name: str = OPT) -> Path:
    return folder / variant(name).checkpoint


def set_one(path: Path, name: str, value: float) -> None:
    edit_weights(path, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def first_shard(folder: Path) -> Path:
    return min((folder / "flan-t5-xl").glob("*.safetensors"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


WRONG: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "a_missing_tensor": (
        OPT,
        lambda at: edit_weights(checkpoint(at), lambda tensors: tensors.pop(NORM)),
        ["1 tensor is missing", NORM],
    ),
    "one_too_many": (
        OPT,
        lambda at: edit_weights(checkpoint(at), lambda tensors: tensors.update(ln_visual=torch.zeros(2))),
        ["1 tensor is not in the mapping: ln_visual", "the nearest rule takes ln_vision"],
    ),
    "another_shape": (
        OPT,
        lambda at: edit_weights(checkpoint(at), lambda tensors: tensors.update({NORM: torch.zeros(45)})),
        [f"{NORM} is (45,), expected (44,)"],
    ),
    "not_a_number": (OPT, lambda at: set_one(checkpoint(at), NORM, float("nan")), [NORM, "1 NaN or infinite"]),
    "infinity": (OPT, lambda at: set_one(at / "eva_vit_g.pth", "cls_token", float("-inf")), ["cls_token in eva"]),
    "not_a_number_in_a_tied_tensor": (
        T5,
        lambda at: [
            set_one(path, name, float("nan"))
            for path in (at / "flan-t5-xl").glob("*.safetensors")
            for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
            if name.encode() in path.read_bytes()
        ],
        ["t5_model.shared.weight", "NaN or infinite"],
    ),
    "a_copy_that_is_no_copy": (
        "tiny-blip2-opt-6.7b-coco",
        lambda at: [
            set_one(path, "lm_head.weight", 3.0)
            for path in (at / "opt-6.7b").glob("*.safetensors")
            if b'"lm_head.weight"' in path.read_bytes()
        ],
        ["opt_model.lm_head.weight should be a copy of opt_model.model.decoder.embed_tokens.weight"],
    ),
    "a_buffer_with_other_values": (
        "tiny-blip2-opt-2.7b-coco",
        lambda at: edit_weights(
            checkpoint(at, "tiny-blip2-opt-2.7b-coco"),
            lambda tensors: tensors["Qformer.bert.embeddings.position_ids"].add_(1),
        ),
        ["Qformer.bert.embeddings.position_ids", "count up from 0"],
    ),
    "weights_of_eight_bits": (
        T5,
        lambda at: edit_weights(first_shard(at), lambda tensors: tensors.update(eight_bits(tensors))),
        ["SelfAttention.q.weight", "dtype"],
    ),
    "a_truncated_pth": (OPT, lambda at: cut(checkpoint(at)), ["is not a whole PyTorch file", "Download or copy"]),
    "a_truncated_safetensors": (T5, lambda at: cut(first_shard(at)), ["is not a whole safetensors file"]),
    "an_index_that_points_outside": (
        T5,
        lambda at: change_json(
            at / "flan-t5-xl" / "model.safetensors.index.json", weight_map={"shared.weight": "../../x.safetensors"}
        ),
        ["'../../x.safetensors'", "a shard must lie beside its index"],
    ),
    "a_missing_part": (OPT, lambda at: (at / "eva_vit_g.pth").unlink(), ["missing: eva_vit_g.pth; found: blip2_pretr"]),
    "no_language_weights": (OPT, lambda at: (at / "opt-2.7b" / "pytorch_model.bin").unlink(), ["should hold one of"]),
    "another_language_model": (
        OPT,
        lambda at: change_json(at / "opt-2.7b" / "config.json", hidden_size=64),
        ["hidden_size should be 40", "found 64"],
    ),
    "no_language_configuration": (OPT, lambda at: (at / "opt-2.7b" / "config.json").unlink(), ["configuration"]),
    "no_opt_tokenizer": (OPT, lambda at: [path.unlink() for path in tokenizer_files(at / "opt-2.7b")], ["tokenizer"]),
    "no_t5_tokenizer": (T5, lambda at: [path.unlink() for path in tokenizer_files(at / "flan-t5-xl")], ["tokenizer"]),
    "a_garbled_tokenizer": (OPT, lambda at: (at / "opt-2.7b" / "vocab.json").write_bytes(b"\xff\0{"), ["tokenizer"]),
    "a_truncated_opt_tokenizer": (OPT, lambda at: cut(at / "opt-2.7b" / "merges.txt"), ["tokenizer"]),
    "a_truncated_t5_tokenizer": (T5, lambda at: cut(at / "flan-t5-xl" / "tokenizer.json"), ["tokenizer"]),
}  # fmt: skip


def eight_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(torch.int8) for name, value in tensors.items() if name.endswith("SelfAttention.q.weight")}


def tokenizer_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if "model" not in path.name and path.name != "config.json"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_source_is_refused_by_name(refuse, source_copy: Copy, tmp_path: Path, wrong: str):
    name, spoil, words = WRONG[wrong]
    folder = source_copy(name)
    spoil(folder)
    said = refuse("convert", name, "--source", folder, "--output", tmp_path / "model")
    for word in words:
        assert word in said


def test_a_refused_conversion_leaves_no_empty_folders(refuse, source_copy: Copy, tmp_path: Path):
    folder = source_copy(OPT)
    set_one(checkpoint(folder), NORM, float("nan"))
    assert NORM in refuse("convert", OPT, "--source", folder, "--output", tmp_path / "runs" / "first" / "model")


def test_the_source_of_another_variant_is_recognised(refuse, source_copy: Copy, tmp_path: Path):
    folder, other = source_copy("tiny-blip2-opt-6.7b"), variant(OPT)
    (folder / "opt-6.7b").rename(folder / other.language_folder)
    checkpoint(folder, "tiny-blip2-opt-6.7b").rename(folder / other.checkpoint)
    said = refuse("convert", OPT, "--source", folder, "--output", tmp_path / "model")
    assert f"expected {OPT}, found what tiny-blip2-opt-6.7b holds" in said


def test_a_checkpoint_of_another_language_model_is_refused(refuse, tmp_path: Path):
    said = refuse("convert", OPT, "--source", own_files(variant(T5)).checkpoints[0], "--output", tmp_path / "model")
    assert f"is a checkpoint for T5 (it holds t5_proj or t5_model), and {OPT} is built on OPT" in said


def test_a_value_too_large_for_the_dtype_is_refused(refuse, source_copy: Copy, tmp_path: Path):
    folder = source_copy(OPT)
    set_one(checkpoint(folder), NORM, 1e5)
    said = refuse("convert", OPT, "--source", folder, "--output", tmp_path / "model", "--dtype", "float16")
    assert f"{NORM} holds values up to 1e+05, too large for F16" in said


def test_the_tokenizer_is_looked_at_before_the_weights_are_written(refuse, source_copy: Copy, tmp_path: Path):
    """Both are wrong: what can be checked at once must be said at once, not after the last gigabyte."""
    folder = source_copy(T5)
    set_one(checkpoint(folder, T5), NORM, float("nan"))
    cut(folder / "flan-t5-xl" / "tokenizer.json")
    assert "tokenizer" in refuse("convert", T5, "--source", folder, "--output", tmp_path / "model")


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(source_copy: Copy, tmp_path: Path):
    folder, marker = source_copy(OPT), tmp_path / "code-ran"
    torch.save({"model": {NORM: torch.zeros(44), "more": RunsCode(marker)}}, checkpoint(folder))
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists(), "the object is harmless: this test would prove nothing"
    marker.unlink()
    there = snapshot(tmp_path)
    ended = in_a_process("convert", OPT, "--source", folder, "--output", tmp_path / "model")
    assert "would run code" in sentence(ended, tmp_path, there)
    assert not marker.exists()


# -- requests that are wrong


def test_a_wrong_model_name_gets_the_nearest_one(tmp_path: Path):
    ended = in_a_process("convert", "tiny-blip2-opt-2.7", "--output", tmp_path / "model")
    assert "Did you mean 'tiny-blip2-opt-2.7b'?" in sentence(ended, tmp_path, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "int8"),
        (["--max-shard-size", "many"], "A shard size such as 5GB or 200MB was expected, found 'many'"),
        (["--max-shard-size", "0"], "A shard size such as 5GB or 200MB was expected"),
        (["--source", "no/such/place"], "source no/such/place does not exist"),
        (["--run-name", "../elsewhere"], "A run's name should be a plain folder name"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_refused_with_what_was_found(refuse, tmp_path: Path, options: list[str], words: str):
    place = [] if "--run-name" in options else ["--output", tmp_path / "model"]
    assert words in refuse("convert", OPT, *place, *options)


def test_released_files_that_cannot_be_fetched_are_named_with_the_way_to_give_them(tmp_path: Path):
    nowhere = "http://127.0.0.1:9"  # no server: there is no network from here on
    ended = in_a_process(
        *("convert", "blip2-opt-6.7b", "--output", tmp_path / "model"),
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
        no_proxy="",
        NO_PROXY="",
        HF_HUB_CACHE="",
        HUGGINGFACE_HUB_CACHE="",
        **{name: str(tmp_path / name) for name in ("HF_HOME", "TORCH_HOME", "BLIP2NB_CACHE")},
    )
    said = sentence(ended, tmp_path, {})
    files = ("eva_vit_g.pth", "blip2_pretrained_opt6.7b.pth", "opt-6.7b/ being facebook/opt-6.7b")
    assert all(word in said for word in (*files, "folder as source"))


# -- places that are wrong


def test_a_folder_with_anothers_files_is_not_written_to(refuse, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "not a conversion of this kit" in refuse("convert", OPT, "--output", tmp_path)


def test_a_folder_with_another_runs_model_is_not_written_to(refuse, model_copy: Callable[[str], Run]):
    model = model_copy(OPT).model
    assert f"holds another run's model ({OPT}, dtype auto" in refuse("convert", T5, "--output", model)
    assert "not the" in refuse("convert", OPT, "--output", model, "--dtype", "float16")


@pytest.mark.parametrize("place", ["file", "file/model"])
def test_a_place_that_is_no_folder_is_refused(refuse, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refuse("convert", OPT, "--output", tmp_path / place)


def test_a_folder_that_is_not_ours_is_not_verified(refuse, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "anothers").mkdir()
    (tmp_path / "anothers" / "config.json").write_text('{"model_type": "blip-2"}')
    assert "expected a directory that `blip2nb convert` wrote" in refuse("verify", tmp_path / "anothers")
    for place in ("empty", "not-there"):
        assert "neither a converted directory nor a run" in refuse("verify", tmp_path / place)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated_weights": (lambda at: cut(at / "model.safetensors"), "is not a whole safetensors file"),
    "no_weights": (lambda at: (at / "model.safetensors").unlink(), "should hold one of model.safetensors"),
    "damaged_manifest": (lambda at: (at / "blip2nb.json").write_text("{"), "blip2nb.json is damaged"),
    "anothers_manifest": (lambda at: (at / "blip2nb.json").write_text('{"model": "x"}'), "blip2nb.json is damaged"),
    "damaged_configuration": (lambda at: (at / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_spoiled_directory_is_not_verified(refuse, model_copy: Callable[[str], Run], spoiled: str):
    model = model_copy(OPT).model
    spoil, words = SPOILED[spoiled]
    spoil(model)
    assert words in refuse("verify", model, "--proof", "weights")


def test_a_tape_that_does_not_fit_is_refused(refuse, model_copy: Callable[[str], Run], tmp_path: Path):
    model = model_copy(OPT).model
    tapes = {
        "of_another": reference.SHIPPED_TAPES / f"{T5}.safetensors",
        "cut": tmp_path / "cut",
        "not_there": tmp_path / "no",
    }
    shutil.copyfile(tapes["of_another"], tapes["cut"])
    cut(tapes["cut"])
    assert "was recorded on other weights" in refuse("verify", model, "--tape", tapes["of_another"])
    assert "is not a tape, or not a whole one" in refuse("verify", model, "--tape", tapes["cut"])
    assert str(tapes["not_there"]) in refuse("verify", model, "--tape", tapes["not_there"])


def test_a_run_without_a_report_cannot_be_shown(refuse, model_copy: Callable[[str], Run], tmp_path: Path):
    run = model_copy(OPT)
    for place in (run.folder, run.model):
        assert "`blip2nb verify` writes one" in refuse("show", place)
    (run.folder / "report.json").write_text("{")
    (run.folder / "arrays.safetensors").write_bytes(b"")
    assert "report.json is damaged" in refuse("show", run.folder)
    assert "neither a converted directory nor a run" in refuse("show", tmp_path / "not-there")


# -- without LAVIS


def test_a_python_for_lavis_that_does_not_exist_is_refused(refuse, tmp_path: Path):
    assert "lavis_python /no/python does not exist" in refuse(
        "capture", OPT, "--lavis-python", "/no/python", "--output", tmp_path / "tape.safetensors"
    )


def test_without_lavis_both_proofs_are_refused_and_the_weights_are_still_proven(
    refuse, command: Callable[..., Outcome], source_copy: Copy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("BLIP2NB_LAVIS_PYTHON", "none")
    fine_tuned = checkpoint(source_copy(OPT))
    set_one(fine_tuned, NORM, 1.5)  # so that no recording fits
    model = api.convert(OPT, fine_tuned, tmp_path / "out" / "model").model
    for arguments in (
        ("verify", model, "--proof", "both"),
        ("capture", OPT, "--output", tmp_path / "tape.safetensors"),
    ):
        said = refuse(*arguments)
        assert f"Recording {OPT} needs an environment with LAVIS, and none was found" in said
        assert "make lavis" in said
    ended = command("verify", model, "--no-figures", "--json")
    assert (ended.status, json.loads(ended.out)["verdict"]) == (4, "incomplete")


def test_a_tokenizer_that_lost_its_configuration_is_refused_before_any_weight_is_written(tmp_path: Path, source_copy):
    """Without tokenizer_config.json transformers would read OPT's tokenizer and quietly leave out the first token."""
    folder = source_copy(OPT)
    (folder / "opt-2.7b" / "tokenizer_config.json").unlink()
    with pytest.raises(RequestError, match=r"should put token \d+ at the start of a text"):
        api.convert(OPT, folder, tmp_path / "model")
    assert not list(tmp_path.glob("*model*"))


def test_whole_numbers_in_place_of_weights_are_refused(tmp_path: Path, source_copy):
    folder = source_copy(OPT)
    content = torch.load(checkpoint(folder), weights_only=True)
    content["model"]["query_tokens"] = content["model"]["query_tokens"].to(torch.int64)
    torch.save(content, checkpoint(folder))
    with pytest.raises(RequestError, match="floating-point weights were expected"):
        api.convert(OPT, folder, tmp_path / "model")
    assert not list(tmp_path.glob("*model*"))
