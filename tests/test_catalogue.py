"""The catalogue of faults: each is put in and taken out again bit for bit, changes what it says, and is found."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from records import raw
from safetensors import safe_open
from torch import nn

import blip2nb
from benchmarks.faults import drawn, pairs
from blip2nb.catalogue import any_model
from blip2nb.catalogue.bench import Bench
from blip2nb.catalogue.captioners import CATALOGUE
from blip2nb.catalogue.cases import write
from blip2nb.catalogue.marks import Expected, judge
from blip2nb.catalogue.planting import Target, first_middle_last, same_bits
from blip2nb.conversion.files import open_source
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.lavis_env.reference import shipped_tape
from blip2nb.trace import Stage, compare
from blip2nb.trace.causes import CAUSES, Cause
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.tape import Tape
from blip2nb.variants import variant

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
Benches = Callable[[str], Bench]
KNOWN = "vision.post_layernorm"  # its eps is a known difference of today's transformers


@pytest.fixture(scope="module")
def benches(converted: Callable[[str], Run]) -> Benches:
    def bench(name: str) -> Bench:
        tape = Tape(shipped_tape(variant(name)))
        return Bench(converted(name).model, tape, lambda: open_source(variant(name)))

    return functools.cache(bench)


def state(model: nn.Module) -> list:
    """All that planting could leave behind: parameters, their places, modules, their classes and attributes, hooks."""
    found: list = []
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        children = [(name, id(child)) for name, child in module.named_children()]
        own = [(name, id(one)) for name, one in module._parameters.items()]
        found.append((path, id(module), type(module), plain, hooks, children, own, "forward" in vars(module)))
    return found


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def test_every_fault_says_what_it_is():
    for name, fault in CATALOGUE.items():
        assert fault.name == name
        assert fault.kind in ("files", "code", "configuration", "inputs")
        assert {fault.cause, *fault.also} <= set(CAUSES)
        assert fault.words.endswith(".")
        assert fault.cause not in fault.also


@pytest.mark.parametrize("name", [OPT, T5])
def test_a_live_model_is_as_it_was_afterwards_bit_for_bit(benches: Benches, name: str):
    model = benches(name).right.loaded.model
    before, weights = state(model), bits(model)
    for fault in any_model.CATALOGUE.values():
        targets = first_middle_last(fault.targets(model))
        for target in random.Random(fault.name).sample(targets, min(3, len(targets))):
            with fault.planted(model, target):
                changed = {
                    one for one, value in model.named_parameters() if not same_bits(value, weights.get(one, value))
                }
                if fault.kind == "files":
                    assert changed, f"{fault.name} changes nothing at {target}"
                    assert changed <= set(target.names), f"{fault.name} changes what it does not name"
                else:
                    assert state(model) != before, f"{fault.name} changes nothing at {target}"
            assert state(model) == before, f"{fault.name} left something behind at {target}"
            left = [one for one, value in model.named_parameters() if not same_bits(value, weights[one])]
            assert not left, f"{fault.name} left other weights behind"


@pytest.mark.parametrize("name", [OPT, T5])
def test_a_fault_in_the_files_changes_a_copy_and_only_what_it_names(benches: Benches, name: str, tmp_path: Path):
    bench = benches(name)
    original = snapshot(bench.right.folder)
    stored = [fault for fault in CATALOGUE.values() if fault.kind in ("files", "configuration")]
    for number, fault in enumerate(stored):
        for case in drawn(bench.cases(fault), 1, False, fault.name):
            (placed,) = case.faults
            copy = Path(shutil.copytree(bench.right.folder, tmp_path / str(number), copy_function=os.link))
            write(fault, copy, placed.target)
            differ = different(bench.right.folder, copy)
            if fault.kind == "files":
                assert differ
                assert differ <= set(placed.target.names)
            else:
                assert differ in ({"config.json"}, {"processor_config.json"})
    assert snapshot(bench.right.folder) == original, "a copy's files are links to these, and were written through"


@pytest.mark.parametrize("name", ["bias_missing", "rounded_tensor", "eps_configured", "image_resample"])
def test_what_is_in_the_files_already_is_refused(benches: Benches, name: str, tmp_path: Path):
    bench, fault = benches(OPT), CATALOGUE[name]
    (placed,) = bench.cases(fault)[0].faults
    copy = Path(shutil.copytree(bench.right.folder, tmp_path / "copy"))
    write(fault, copy, placed.target)
    with pytest.raises(ValueError, match=r"changes nothing|already"):
        write(fault, copy, placed.target)


def different(one: Path, other: Path) -> set[str]:
    """What differs in two directories: names of tensors, and of files that hold none."""
    found = set()
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        if path.suffix != ".safetensors":
            found |= {path.name} if path.read_bytes() != (other / path.name).read_bytes() else set()
            continue
        with safe_open(path, "pt") as mine, safe_open(other / path.name, "pt") as its:
            assert mine.metadata() == its.metadata()
            assert list(mine.keys()) == list(its.keys())
            found |= {name for name in mine.keys() if not same_bits(mine.get_tensor(name), its.get_tensor(name))}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", [OPT, T5])
def test_a_fault_in_the_inputs_is_in_what_the_model_is_called_with(benches: Benches, name: str, tmp_path: Path):
    bench = benches(name)
    right = bench.right
    for fault in CATALOGUE.values():
        for case in bench.cases(fault) if fault.kind == "inputs" else ():
            with case.planted(right, tmp_path / "copy") as broken:
                values = ((right.inputs[one], value) for one, value in broken.inputs.items() if one != "use_cache")
                assert not all(same_bits(before, after) for before, after in values), case
                assert broken.loaded is right.loaded


def test_the_same_seed_plants_the_same_and_another_something_else(benches: Benches):
    model = benches(OPT).right.loaded.model
    parameters = dict(model.named_parameters())
    fault = any_model.CATALOGUE["value_changed"]
    target = next(one for one in fault.targets(model) if one.names[0].endswith("fc1.weight"))
    (first,), (again,), (other,) = (fault.changed(parameters, target, seed).values() for seed in (0, 0, 1))
    assert same_bits(first, again)
    assert not same_bits(first, other)


def test_a_fault_is_not_offered_where_it_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0].bias.zero_()
    model[0].weight.copy_(torch.eye(4))
    for name, there in (("bias_missing", "1"), ("bias_shifted", "1"), ("transposed", "1")):
        assert [one.modules for one in any_model.CATALOGUE[name].targets(model)] == [(there,)]
    exact = [one.modules for one in any_model.CATALOGUE["rounded_tensor"].targets(model) if one.form == "bfloat16"]
    assert exact == [("1",), ("1",)]  # its weight and its bias; ones and zeros fit any dtype
    with (
        pytest.raises(ValueError, match="changes nothing"),
        any_model.CATALOGUE["bias_missing"].planted(model, Target(("0",), ("0.bias",))),
    ):
        pass


class Own(nn.Module):
    """A model that has nothing of BLIP-2: one attention with a residual, and torch's own layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_it_serves_a_model_of_ones_own():
    torch.manual_seed(0)
    reference, candidate = Own().eval(), Own().eval()
    candidate.load_state_dict(reference.state_dict())
    stages = [Stage(f"layer.{n}", f"layers.{n}", f"layers.{n}", inputs={"src": ":src"}) for n in range(3)]
    x = torch.randn(1, 5, 8)
    assert compare(reference, candidate, stages, x).faults == []
    planted = []
    for name in (
        "transposed",
        "bias_shifted",
        "norms_swapped",
        "layers_swapped",
        "eps",
        "norm_after",
        "weight_doubled",
    ):
        fault = any_model.CATALOGUE[name]
        for target in fault.targets(candidate):
            with fault.planted(candidate, target):
                found = [stage.module for stage in compare(reference, candidate, stages, x).faults]
            whole = {".".join(module.split(".")[:2]) for module in target.modules}
            assert not found or set(found) == whole, (name, target)
            planted += [name] if found else []
    assert len(set(planted)) >= 6


# -- found by the kit


@pytest.mark.parametrize("name", [OPT, T5])
def test_what_is_planted_is_what_the_stages_show(benches: Benches, name: str, tmp_path: Path):
    """Without any diagnosis: the stages that a fault says it arises at are the ones that measure more than rounding."""
    bench = benches(name)
    at_once = ("qkv_swapped", "norms_swapped", "layers_swapped", "residual", "activation", "image_mean", "text_first")
    for fault in map(CATALOGUE.__getitem__, at_once):
        for case in drawn(bench.cases(fault), 1, False, name):
            with case.planted(bench.right, tmp_path / "copy") as broken:
                found = compare(bench.tape, broken.loaded.model, bench.stages, broken.inputs).faults
            assert [one.name for one in found if one.name != KNOWN] == list(case.stages), case


def said(stage: str, module: str, *causes: str) -> Finding:
    named = tuple(Cause(one, "", module) for one in causes)
    return Finding(stage, module, "", None, None, None, None, causes=named)


def test_marks_are_given_for_what_was_said():
    order = ["a", "b", "c"]
    expected = [Expected(("b",), ("b",), Target(("m.one", "m.two")), frozenset({"eps", "scale"}))]
    right = judge(expected, [said("b", "m.two", "scale", "unknown")], order)
    assert right.right
    assert right.three
    late = judge(expected, [said("b", "m", "unknown", "residual", "eps"), said("c", "m.one", "eps")], order)
    assert (late.detected, late.stage, late.module, late.first, late.three, late.extra) == (*[True] * 3, False, True, 1)
    early = judge(expected, [said("a", "m.one", "eps"), said("b", "m.one.inner", "eps")], order)
    assert (early.detected, early.stage, early.module, early.first, early.extra) == (True, False, False, True, 1)
    assert not judge(expected, [], order).detected
    both = [*expected, Expected(("c",), ("c",), Target(("n",), whole=True), frozenset({"tied"}))]
    assert judge(both, [said("b", "m.one", "eps"), said("c", "n.inner", "tied")], order).right
    assert not judge(both, [said("b", "m.one", "eps")], order).detected


def test_where_a_fault_hardly_shows_it_may_be_found_or_not():
    """It arises at a, b and c, and is above what rounding can hide from b on."""
    expected = [Expected(("a", "b", "c"), ("b", "c"), Target(("m",)), frozenset({"eps"}))]
    found = {stage: said(stage, "m", "eps") for stage in "abc"}
    for stages, right in (("abc", True), ("bc", True), ("b", True), ("c", False), ("", False)):
        marks = judge(expected, [found[stage] for stage in stages], ["a", "b", "c"])
        assert marks.right == right, stages


# -- asked for


@pytest.mark.parametrize("name", [OPT, T5])
def test_an_answer_shows_what_was_planted_and_what_was_said(benches: Benches, name: str):
    answer = benches(name).ask(benches(name).case("head_count", "vision.block.02"))
    assert answer.shows == ("vision.block.02",)
    assert answer.visible
    assert answer.first is answer.findings[0]
    for text in (repr(answer), answer._repr_html_()):
        for word in (*answer.rows()[1], "head_count", "vision.block.02", "Stage, module and cause are right."):
            assert word in text
    assert raw(answer.report)["first_divergence"]["stage"] == "vision.block.02"


def test_what_no_output_depends_on_is_visible_in_the_weights(benches: Benches):
    answer = benches(OPT).ask(benches(OPT).case("key_bias"))
    assert answer.shows == ()
    assert answer.comparison.faults == []
    assert answer.visible
    assert answer.marks is not None
    assert answer.marks.right


def test_what_cannot_be_seen_need_not_be_found(benches: Benches):
    bench = benches(OPT)
    unseen = "qformer.encoder.layer.2.crossattention.attention.key"  # softmax cancels a key's bias
    hidden = bench.ask(bench.case("bias_left_out", unseen))
    assert (hidden.visible, hidden.shows) == (False, ())
    assert "cannot be seen" in hidden.summary
    seen = bench.ask(bench.case("bias_left_out", unseen.replace("key", "query")))
    assert seen.visible
    assert seen.marks.right


def test_several_at_once_are_each_marked(benches: Benches):
    bench = benches(OPT)
    both = bench.case("bias_shifted", "vision.block.00") + bench.case("head_count", "language.block.03")
    answer = bench.ask(both)
    assert answer.marks is not None
    assert answer.marks.right
    assert [row[1] for row in answer.rows() if row[0] == "stage"] == ["vision.block.00", "language.block.03"]


def test_asking_leaves_the_model_the_files_and_the_generator_as_they_were(benches: Benches):
    bench = benches(OPT)
    folder, model = bench.right.folder, bench.right.loaded.model
    files, before, weights = snapshot(folder), state(model), bits(model)
    torch.manual_seed(7)
    chance = torch.random.get_rng_state()
    for fault in ("dropout", "weight_missing", "eps_configured", "prompt"):
        bench.ask(bench.case(fault))
    assert snapshot(folder) == files
    assert state(model) == before
    assert all(same_bits(one, weights[name]) for name, one in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), chance)


def test_a_fault_or_place_that_is_not_there_is_refused_with_the_nearest(benches: Benches):
    bench = benches(OPT)
    with pytest.raises(RequestError, match=r"no fault 'head_cuont'\. Did you mean 'head_count'"):
        bench.case("head_cuont")
    with pytest.raises(
        RequestError, match=r"head_count does not fit at 'vision\.block\.2'\. Did you mean 'vision\.block\.02'"
    ):
        bench.case("head_count", "vision.block.2")
    with pytest.raises(RequestError, match=r"start_configured cannot be made in tiny-blip2-opt-2\.7b"):
        bench.case("start_configured")
    module = "vision_model.encoder.layers.2.self_attn"
    assert bench.case("head_count", module).faults[0].target.modules == (module,)


def test_the_verb_breaks_a_copy_of_a_run(converted: Callable[[str], Run]):
    run = converted(OPT)
    before = snapshot(run.folder)
    answer = blip2nb.break_it(run, "transposed", "language.block.01")
    assert answer.marks is not None
    assert answer.marks.right
    assert snapshot(run.folder) == before


def test_the_verb_says_where_a_recording_is_missing(model_copy: Callable[[str], Run]):
    run = model_copy(OPT)
    manifest = run.model / "blip2nb.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "weights_hash": "0" * 64}))
    with pytest.raises(RequestError, match=r"no recording of LAVIS that fits .* blip2nb capture"):
        blip2nb.break_it(run, "transposed")


def test_the_catalogue_is_listed_as_a_table(benches: Benches):
    for listing in (blip2nb.faults(), benches(OPT).catalogue()):
        for text in (repr(listing), listing._repr_html_()):
            assert all(name in text for name in CATALOGUE)
    counted = {row[0]: row[2] for row in benches(OPT).catalogue().rows()}
    assert counted["start_configured"] == "0"
    assert counted["image_resample"] == "3"


def test_pairs_do_not_touch_one_another(benches: Benches):
    bench = benches(OPT)
    names = ("qkv_swapped", "eps", "residual", "image_mean")
    singles = [case for name in names for case in bench.cases(CATALOGUE[name])]
    for case in pairs(singles, 20, "seed"):
        one, other = case.faults
        assert not set(one.stages) & set(other.stages)


# -- apart from the rest
