"""The first proof: it passes on what is right, and finds what is wrong, rules that are wrong in both directions too."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_weights
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import raw

from blip2nb import api
from blip2nb.errors import RequestError
from blip2nb.families.captioners import mapping
from blip2nb.families.captioners.mapping import entries, rules
from blip2nb.handles import Run
from blip2nb.lavis_env import reference
from blip2nb.proof.subject import Subject
from blip2nb.proof.weights import prove_weights
from blip2nb.report.manifest import Manifest
from blip2nb.trace.tape import Tape
from blip2nb.variants import TWINS, variant
from blip2nb.weights.rules import FuseQueryValueBias, MappingError, Rename, Rule, Tied

Converted = Callable[[str], Run]
OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"


def recording(name: str) -> Tape:
    """LAVIS's own, with a hash of every parameter of its modules."""
    return Tape(reference.SHIPPED_TAPES / f"{name}.safetensors")


def proof(run: Run) -> dict[str, Any]:
    return raw(prove_weights(Subject(run.model, recording(Manifest.read(run.model).model))))


def verify(run: Run, how: str) -> Any:
    return api.verify(run, proof=how, tape=recording(run_name(run)).path if how == "both" else "", figures=False)


def run_name(run: Run) -> str:
    return Manifest.read(run.model).model


@pytest.mark.parametrize("name", TWINS)
def test_a_right_conversion_passes_with_every_parameter_of_lavis_checked(converted: Converted, name: str):
    found = proof(converted(name))
    assert (found["missing"], found["unexpected"]) == ([], [])
    assert (found["roundtrip"], found["roundtrip_differences"]) == (True, [])
    assert (found["modules_equal"], found["modules_different"]) == (True, [])
    whole = [entry for entry in entries(variant(name)) if not isinstance(entry.rule, Tied)]
    parameters = {source for entry in whole for source in entry.sources} - {"Qformer.bert.embeddings.position_ids"}
    assert set(recording(name).metadata["parameters"]) == parameters
    assert found["modules_checked"] == len(parameters)
    assert found["written"] == sum(1 for entry in whole if entry.target is not None)


@pytest.mark.parametrize("name", TWINS)
def test_the_weights_proof_alone_is_incomplete_and_says_what_completes_it(model_copy: Converted, name: str):
    run = model_copy(name)
    report = verify(run, "weights")
    assert report.verdict == "incomplete"
    assert [one.id for one in report.incomplete] == ["not_asked"]
    assert (report.status("weights"), report.status()) == (0, 4)
    assert raw(report)["complete_with"].startswith("blip2nb ")
    assert str(run.folder) in raw(report)["complete_with"]
    assert raw(report)["weights"]["modules_equal"] is None


# -- rules that are wrong both ways, so that the round trip alone would pass


@pytest.fixture
def convert_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, tuple[Rule, ...]], Run]]:
    """Convert by other rules; the proof that follows uses them too."""

    def convert(name: str, table: tuple[Rule, ...]) -> Run:
        monkeypatch.setattr(mapping, "rules", lambda model: table)
        return api.convert(name, output=tmp_path / "model", overwrite=True)

    return convert


def exchanged(table: tuple[Rule, ...], first: Rule, second: Rule) -> tuple[Rule, ...]:
    """The table with two rules writing to each other's targets."""
    swap = {first: second.target, second: first.target}
    return tuple(dataclasses.replace(rule, target=swap[rule]) if rule in swap else rule for rule in table)


def interchangeable(name: str) -> list[tuple[Rule, Rule]]:
    """Every two rules that names and shapes alone cannot tell apart."""
    model = variant(name)
    found = []
    for pair in itertools.combinations((rule for rule in rules(model) if isinstance(rule, Rename)), 2):
        with contextlib.suppress(MappingError):  # their layers are not counted alike
            own, swapped = (entries(model, table) for table in (pair, exchanged(pair, *pair)))
            if {(entry.target, entry.shape) for entry in swapped} == {(entry.target, entry.shape) for entry in own}:
                found.append(pair)
    return found


PAIRS = [(name, *pair) for name in (OPT, T5) for pair in interchangeable(name)]


def test_the_two_norms_of_a_block_are_among_the_rules_that_shapes_cannot_tell_apart():
    block = "visual_encoder.blocks.{block}."
    norms = tuple(f"{block}norm{number}.{{weight|bias}}" for number in (1, 2))
    assert {name for name, one, two in PAIRS if (one.source, two.source) == norms} == {OPT, T5}


@pytest.mark.parametrize(("name", "one", "two"), PAIRS, ids=lambda value: getattr(value, "source", value))
def test_two_exchanged_targets_are_found_though_the_round_trip_passes(convert_with, name: str, one: Rule, two: Rule):
    model = variant(name)
    wrong = {entry.sources[0] for entry in entries(model) if entry.rule in (one, two)}
    found = proof(convert_with(name, exchanged(rules(model), one, two)))
    assert (found["roundtrip"], found["missing"], found["unexpected"]) == (True, [], [])
    assert found["modules_equal"] is False
    assert {sentence.split(" is not ")[0] for sentence in found["modules_different"]} == wrong


class ExchangedFusion(FuseQueryValueBias):
    """Query and value the wrong way round, and back the wrong way round."""

    def forward(self, query, value):
        return super().forward(value, query)

    def inverse(self, fused):
        query, value = super().inverse(fused)
        return value, query


@pytest.mark.parametrize("name", TWINS)
def test_query_and_value_exchanged_in_the_fusion_are_found(convert_with, name: str):
    model = variant(name)
    table = tuple(
        ExchangedFusion(rule.source, rule.target, rule.shape) if isinstance(rule, FuseQueryValueBias) else rule
        for rule in rules(model)
    )
    found = proof(convert_with(name, table))
    assert found["roundtrip"] is True
    wrong = {f"visual_encoder.blocks.{n}.attn.{leaf}_bias" for n in range(model.vision.layers) for leaf in "qv"}
    assert {sentence.split(" is not ")[0] for sentence in found["modules_different"]} == wrong


@pytest.mark.parametrize(
    ("name", "part", "choice", "one", "two"),
    [
        (OPT, "crossattention.self.", "{key|value}", "key", "value"),
        (OPT, ".attention.self.", "{query|key|value}", "query", "key"),
        (OPT, "self_attn.", "{q|k|v|out}", "v", "out"),
        (T5, "SelfAttention.", "{q|k|v}", "q", "k"),
        (T5, "EncDecAttention.", "{q|k|v}", "k", "v"),
        (T5, "DenseReluDense.", "{wi_0|wi_1}", "wi_0", "wi_1"),
    ],
)
def test_alternatives_exchanged_within_one_rule_are_found(convert_with, name: str, part, choice, one: str, two: str):
    model = variant(name)
    (rule,) = (rule for rule in rules(model) if part + choice in rule.source)
    split = {
        word: dataclasses.replace(
            rule,
            source=rule.source.replace(choice, word),
            target=rule.target.replace(choice, {one: two, two: one}.get(word, word)),
        )
        for word in choice.strip("{}").split("|")
    }
    table = (*(each for each in rules(model) if each is not rule), *split.values())
    found = proof(convert_with(name, table))
    assert found["roundtrip"] is True
    wrong = {entry.sources[0] for entry in entries(model, table) if entry.rule in (split[one], split[two])}
    assert {sentence.split(" is not ")[0] for sentence in found["modules_different"]} == wrong


def test_wrong_rules_make_the_verdict_diverge_and_the_sentence_name_the_module(convert_with):
    model = variant(OPT)
    one, two = (next(rule for rule in rules(model) if f".norm{n}." in rule.source) for n in (1, 2))
    report = verify(convert_with(OPT, exchanged(rules(model), one, two)), "both")
    assert report.verdict == "diverges"
    assert raw(report)["weights"]["roundtrip"] is True
    first = "visual_encoder.blocks.0.norm1.weight is not vision_model.encoder.layers.0.layer_norm1.weight"
    assert first in raw(report)["summary"]
    assert raw(report)["first_divergence"]["stage"] == "vision.block.00"


# -- damage after the conversion


def header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


@pytest.mark.parametrize("name", [OPT, T5])
def test_any_one_flipped_bit_is_found_and_its_tensor_named(model_copy: Converted, name: str):
    run = model_copy(name)
    path = run.model / "model.safetensors"
    tensors, start = header(path)
    targets = sorted(set(tensors) - {"__metadata__"})
    sources = {entry.target: entry.sources for entry in entries(variant(name)) if not entry.optional}
    fused = "vision_model.encoder.layers.3.self_attn.qkv.bias"
    value, sign = 132.5 / 264, 133.5 / 264  # bytes in the key's third of a fused bias, which LAVIS does not have

    @given(st.sampled_from(targets), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    @example(fused, value, 0)
    @example(fused, sign, 7)
    @settings(max_examples=40)
    def found(target: str, place: float, bit: int) -> None:
        begin, end = tensors[target]["data_offsets"]
        at = start + begin + int(place * (end - begin))
        with open(path, "r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << bit]))
        try:
            content = proof(run)
        finally:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([byte]))
        assert content["roundtrip"] is False
        named = " ".join(content["roundtrip_differences"])
        assert any(one in named for one in (target, *sources[target])), named

    found()
    assert proof(run)["roundtrip"] is True


TENSOR = "qformer.encoder.layer.1.attention.output.LayerNorm.bias"
NAMED = "layer.1.attention.output.LayerNorm.bias"  # in either library's words
FUSED = "vision_model.encoder.layers.4.self_attn.qkv.bias"


def key_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FUSED][len(tensors[FUSED]) // 2] = 0.25


DAMAGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda tensors: tensors.pop(TENSOR), TENSOR),
    "one_too_many": (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra"),
    "tied_with_values_of_its_own": (
        lambda tensors: tensors.update({"language_model.lm_head.weight": torch.zeros(512, 40, dtype=torch.float16)}),
        "language_model.lm_head.weight",
    ),
    "another_shape": (lambda tensors: tensors.update({TENSOR: tensors[TENSOR][1:].clone()}), NAMED),
    "not_a_number": (lambda tensors: tensors[TENSOR].fill_(float("nan")), NAMED),
    "another_value": (lambda tensors: tensors[TENSOR].add_(1e-3), NAMED),
    "key_bias": (key_bias, FUSED),
}


@pytest.mark.parametrize("how", ["weights", "both"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_diverges_and_the_tensor_is_named(model_copy: Converted, damage: str, how: str):
    run = model_copy(OPT)
    change, named = DAMAGES[damage]
    edit_weights(run.model / "model.safetensors", change)
    report = verify(run, how)
    assert report.verdict == "diverges"
    assert named in raw(report)["summary"]


@pytest.mark.parametrize("how", ["weights", "both"])
def test_a_lossy_cast_is_said_to_be_one(tmp_path: Path, how: str):
    report = verify(api.convert(T5, output=tmp_path / "model", dtype="float16"), how)
    assert raw(report)["weights"]["roundtrip"] is None
    assert "bit for bit" not in raw(report)["summary"]
    assert "float16" in raw(report)["summary"]


def test_a_lossless_cast_goes_back_bit_for_bit(tmp_path: Path):
    found = proof(api.convert(OPT, output=tmp_path / "model", dtype="float32"))
    assert (found["roundtrip"], found["modules_equal"]) == (True, True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_model_is_compared_in_what_it_was_cast_to(tmp_path: Path, dtype: str):
    run = api.convert(T5, output=tmp_path / "model", dtype=dtype)
    assert json.loads((run.model / "config.json").read_text())["dtype"] == dtype
    report = api.verify(run, figures=False)
    assert (report.verdict, raw(report)["computed_in"], raw(report)["faults"]) == ("match", dtype, [])
    assert f"to the rounding of {dtype}" in raw(report)["summary"]
    edit_weights(
        run.model / "model.safetensors", lambda t: t["vision_model.encoder.layers.2.mlp.fc1.weight"].mul_(1.01)
    )
    broken = api.verify(run, figures=False)
    assert broken.verdict == "diverges"
    assert broken.content.first_divergence.module == "vision_model.encoder.layers.2.mlp.fc1"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_model_is_compared_in_half_precision_where_that_is_asked_for(model_copy, dtype: str):
    run = model_copy(OPT)
    assert api.verify(run, figures=False, dtype=dtype).verdict == "match"
    config = json.loads((run.model / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "quick_gelu"
    (run.model / "config.json").write_text(json.dumps(config))
    report = api.verify(run, figures=False, dtype=dtype)
    assert raw(report)["first_divergence"]["module"] == "vision_model.encoder.layers.0.mlp.activation_fn"
    with pytest.raises(RequestError, match="float32, bfloat16, float16"):
        api.verify(run, figures=False, dtype="int8")


def test_a_fault_beside_the_known_difference_is_the_one_that_is_named(model_copy):
    run = model_copy(OPT)
    config = json.loads((run.model / "config.json").read_text())
    config["qformer_config"]["layer_norm_eps"] = 1e-5  # LAVIS's is 1e-12
    (run.model / "config.json").write_text(json.dumps(config))
    report = api.verify(run, figures=False)
    assert report.verdict == "diverges"
    assert raw(report)["weights"]["modules_equal"] is True
    assert raw(report)["first_divergence"]["stage"] == "qformer.embeddings"
    assert "qformer.layernorm.eps is 1e-05, the reference has 1e-12" in raw(report)["summary"]


@pytest.mark.parametrize(
    ("change", "stage", "words"),
    [
        (
            lambda c: c["vision_config"].update(hidden_act="gelu_new"),
            "vision.block.00",
            "the activation is gelu_new, the reference has gelu (with gelu",
        ),
        (
            lambda c: c["text_config"].update(activation_function="gelu"),
            "language.block.00",
            "the activation is gelu, the reference has relu (with relu",
        ),
        (lambda c: c.update(image_token_index=499), "language.inputs_embeds", "the image's 0 places begin nowhere"),
    ],
)
def test_a_fault_that_no_weight_shows_is_placed_by_the_behaviour(model_copy, change, stage: str, words: str):
    run = model_copy(OPT)
    config = json.loads((run.model / "config.json").read_text())
    change(config)
    (run.model / "config.json").write_text(json.dumps(config))
    report = api.verify(run, figures=False)
    assert report.verdict == "diverges"
    assert raw(report)["weights"]["modules_equal"] is True
    assert raw(report)["first_divergence"]["stage"] == stage
    assert words in raw(report)["summary"]
