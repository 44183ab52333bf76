"""The mapping takes every tensor of every variant exactly once, and says precisely what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, T5Config

from blip2nb.errors import RequestError
from blip2nb.families.captioners.configuration import model_config
from blip2nb.families.captioners.mapping import entries, plan, recognise, rules, unused_by, variant_sources
from blip2nb.handles import Run
from blip2nb.variants import RELEASED, VARIANTS, Variant, variant
from blip2nb.weights.rules import FuseQueryValueBias, MappingError, Rename
from blip2nb.weights.sources import open_folder

TWIN = variant("tiny-blip2-flan-t5-xl")
REQUIRED = sorted(name for entry in entries(TWIN) if not entry.optional for name in entry.sources)
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def state_dict_of_transformers(model: Variant) -> dict[str, tuple[int, ...]]:
    """Name to shape, from the full-size model built without memory."""
    language = model.language
    if language.kind == "opt":
        text = OPTConfig(
            hidden_size=language.width,
            word_embed_proj_dim=language.width,
            ffn_dim=language.mlp,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            vocab_size=language.vocabulary,
        )
    else:
        text = T5Config(
            d_model=language.width,
            d_ff=language.mlp,
            d_kv=language.head_width,
            num_layers=language.layers,
            num_heads=language.heads,
            vocab_size=language.vocabulary,
            feed_forward_proj="gated-gelu",
        )
    config = Blip2Config(**model_config(model, text.to_dict(), image_token=50265, newline=50118))
    with torch.device("meta"):
        whole = Blip2ForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}


@pytest.mark.parametrize("name", RELEASED)
def test_targets_are_transformers_own_state_dict_at_full_size(name: str):
    model = variant(name)
    targets = [(entry.target, entry.shape) for entry in entries(model) if entry.target is not None]
    assert dict(targets) == state_dict_of_transformers(model)
    assert len(targets) == {"opt": 1248, "t5": 1291}[model.language.kind]


@pytest.mark.parametrize("name", RELEASED)
def test_every_source_name_is_taken_once_and_only_aliases_are_tied(name: str):
    model = variant(name)
    whole = entries(model)
    sources = [source for entry in whole for source in entry.sources]
    assert len(sources) == len(set(sources)) == {"opt": 1288, "t5": 1331}[model.language.kind]
    assert {entry.target for entry in whole if entry.kind == "Tied"} == {
        "opt": {"language_model.lm_head.weight"},
        "t5": {"language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"},
    }[model.language.kind]
    assert all(entry.of in sources for entry in whole if entry.kind == "Tied")
    assert [entry.sources for entry in whole if entry.target is None] == [("Qformer.bert.embeddings.position_ids",)]


@given(st.sampled_from(rules(TWIN)))
def test_two_rules_taking_one_name_is_an_error_that_names_it(rule):
    taken = [entry.sources[0] for entry in entries(TWIN) if entry.rule is rule]
    with pytest.raises(MappingError, match="Two rules take") as error:
        entries(TWIN, (*rules(TWIN), rule))
    assert any(name in str(error.value) for name in taken)


def test_two_rules_writing_one_name_is_an_error_that_names_it():
    again = Rename("somewhere.else", "qformer.layernorm.weight", "q")
    with pytest.raises(MappingError, match=r"Two rules take qformer\.layernorm\.weight: .* and somewhere\.else"):
        entries(TWIN, (*rules(TWIN), again))


@given(st.sampled_from(REQUIRED))
@settings(max_examples=8)
def test_a_missing_tensor_is_named(name: str):
    held = variant_sources(TWIN)
    del held[name]
    with pytest.raises(RequestError, match="1 tensor is missing") as error:
        plan(TWIN, held)
    assert f": {name}." in str(error.value)


@given(st.sampled_from(REQUIRED))
@settings(max_examples=8)
def test_an_unknown_tensor_is_named_with_the_nearest_rule(name: str):
    held = {**variant_sources(TWIN), f"{name}_ema": (1,)}
    with pytest.raises(RequestError, match="1 tensor is not in the mapping") as error:
        plan(TWIN, held)
    assert f": {name}_ema (the nearest rule takes {name})" in str(error.value)


@given(st.sampled_from(REQUIRED), st.lists(st.integers(0, 2000), max_size=4).map(tuple))
@settings(max_examples=8)
def test_a_misshapen_tensor_is_named_with_both_shapes(name: str, shape: tuple[int, ...]):
    held = variant_sources(TWIN)
    expected = held[name]
    if shape == expected:
        shape = (*shape, 1)
    with pytest.raises(RequestError, match="1 tensor has another shape") as error:
        plan(TWIN, {**held, name: shape})
    assert f"{name} is {shape}, expected {expected}" in str(error.value)


@pytest.mark.parametrize("model", VARIANTS)
def test_a_source_of_any_other_variant_is_recognised_and_named(model: str):
    for other in VARIANTS:
        if other != model:
            with pytest.raises(RequestError) as error:
                plan(variant(model), variant_sources(variant(other)))
            assert f"belong to another variant: expected {model}, found what {other} holds" in str(error.value)
            assert f"Convert them as {other}." in str(error.value)


def test_an_opt_source_given_for_a_t5_model_is_recognised_without_its_aliases_too():
    held = variant_sources(variant("blip2-opt-2.7b"))
    del held["opt_model.lm_head.weight"]
    assert recognise(held) == "blip2-opt-2.7b"
    with pytest.raises(RequestError, match=r"Convert them as blip2-opt-2\.7b\."):
        plan(variant("blip2-flan-t5-xl"), held)


def test_a_whole_source_is_planned_with_and_without_what_may_be_missing():
    held = variant_sources(TWIN)
    whole = plan(TWIN, held)
    assert (len(whole.tied), len(whole.dropped)) == (2, 1)
    bare = plan(TWIN, {name: held[name] for name in REQUIRED})
    assert (bare.written, bare.tied, bare.dropped) == (whole.written, (), ())


@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 200), st.sampled_from(["norm1.weight", "attn.qkv.weight"]))
def test_blocks_past_the_last_one_are_left_out_and_the_last_one_never(name: str, number: int, leaf: str):
    model = variant(name)
    rule = unused_by(model, f"visual_encoder.blocks.{number}.{leaf}")
    assert (rule is not None) == (number >= model.vision.layers)


def test_what_is_left_out_is_reported_and_a_wrong_name_in_the_last_block_is_not_left_out():
    held = variant_sources(TWIN)
    last = TWIN.vision.layers - 1
    beyond = [f"visual_encoder.blocks.{last + 1}.attn.q_bias", "visual_encoder.norm.weight", "visual_encoder.head.bias"]
    assert set(plan(TWIN, {**held, **dict.fromkeys(beyond, (3,))}).unused) == set(beyond)
    with pytest.raises(RequestError, match=rf"visual_encoder\.blocks\.{last}\.norm3\.weight"):
        plan(TWIN, {**held, f"visual_encoder.blocks.{last}.norm3.weight": (44,)})


@st.composite
def biases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one width and dtype with any bits at all: subnormals, infinities and NaN among them."""
    dtype = draw(st.sampled_from(list(BITS)))
    width = draw(st.integers(1, 70))
    limits = torch.iinfo(BITS[dtype])
    bits = st.lists(st.integers(limits.min, limits.max), min_size=width, max_size=width)
    query, value = (torch.tensor(draw(bits), dtype=BITS[dtype]).view(dtype) for _ in "qv")
    return query, value


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


FUSE = next(rule for rule in rules(TWIN) if isinstance(rule, FuseQueryValueBias))


@given(biases())
def test_fusing_query_and_value_bias_goes_back_bit_for_bit(pair):
    query, value = pair
    fused = FUSE.forward(query, value)
    assert fused.shape == (3 * len(query),)
    assert same_bits(fused[: len(query)], query)
    assert same_bits(fused[2 * len(query) :], value)
    assert all(same_bits(one, other) for one, other in zip(FUSE.inverse(fused), pair, strict=True))


@given(biases(), st.data())
def test_a_key_bias_that_is_not_zero_cannot_go_back(pair, data):
    query, _ = pair
    fused = FUSE.forward(*pair)
    at = data.draw(st.integers(len(query), 2 * len(query) - 1))
    fused[at] = data.draw(st.sampled_from([1.0, -1e-4, float("nan"), float("inf")]))
    with pytest.raises(MappingError, match="key's third of a fused bias should be zero"):
        FUSE.inverse(fused)


@pytest.mark.parametrize(
    ("query", "value"), [(torch.zeros(4), torch.zeros(5)), (torch.zeros(4), torch.zeros(4, dtype=torch.float16))]
)
def test_biases_that_are_not_alike_are_not_fused(query: torch.Tensor, value: torch.Tensor):
    with pytest.raises(MappingError, match="should be alike"):
        FUSE.forward(query, value)


@pytest.mark.parametrize("name", ["tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"])
def test_what_is_cut_from_a_file_is_what_is_computed_back(converted: Callable[[str], Run], name: str):
    """`revert` and a converted base take the bytes from where they lie, the proof computes: the same of every rule."""
    saved = open_folder(converted(name).model)
    written = [entry for entry in entries(variant(name)) if not entry.optional]
    assert len(written) > 100
    for entry in written:
        cut = entry.parts(saved[str(entry.target)])
        assert tuple(cut) == entry.sources
        back = entry.rule.inverse(saved[str(entry.target)].tensor())
        assert all(same_bits(one.tensor(), other) for one, other in zip(cut.values(), back, strict=True))


def test_rules_are_plain_data():
    assert all(dataclasses.is_dataclass(rule) for name in VARIANTS for rule in rules(variant(name)))
    assert len(set(rules(TWIN))) == len(rules(TWIN))
