"""From numbers to a cause: what became of a weight, what a part computes, what arrives. Pure functions on tensors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import raw

from blip2nb import trace
from blip2nb.proof.rows import of_comparison
from blip2nb.trace import arrivals, computing
from blip2nb.trace.causes import CAUSES
from blip2nb.trace.metrics import THRESHOLD
from blip2nb.trace.weights import what_changed


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


W, B, P = noise(24, 24), noise(72), noise(1, 17, 24)
QKV = noise(72, 24)


def changed(tensor, change):
    copy = tensor.clone()
    change(copy)
    return copy


# what was done, to which parameter, the cause, and a word that must be said
WEIGHTS = {
    "nan": ("a.fc1.weight", W, lambda t: t[2, 3].fill_(math.nan), "not_a_number", "[2, 3]"),
    "zero bias": ("a.fc1.bias", B, lambda t: t.zero_(), "bias_missing", "zero"),
    "zero queries": ("a.self_attn.q_proj.weight", W, lambda t: t.zero_(), "qkv_missing", "zero"),
    "half": ("a.fc1.weight", W, lambda t: t.copy_(t.half().float()), "rounded_weights", "float16"),
    "bfloat16": ("a.fc1.weight", W, lambda t: t.copy_(t.bfloat16().float()), "rounded_weights", "bfloat16"),
    "transposed": ("a.fc1.weight", W, lambda t: t.copy_(t.T.clone()), "transposed", "transposed"),
    "q and k": (
        "a.qkv.weight",
        QKV,
        lambda t: t.copy_(t.reshape(3, 24, 24)[[1, 0, 2]].reshape(72, 24)),
        "qkv_swapped",
        "key, query, value",
    ),
    "no v bias": ("a.qkv.bias", B, lambda t: t[48:].zero_(), "bias_missing", "value"),
    "no k": ("a.qkv.weight", QKV, lambda t: t[24:48].zero_(), "qkv_missing", "key"),
    "bias by one": ("a.fc1.bias", B, lambda t: t.copy_(t.roll(1)), "bias_shifted", "by 1"),
    "bias cut": ("a.fc1.bias", B, lambda t: t[1:].copy_(t[:-1].clone()), "bias_shifted", "by 1"),
    "heads": (
        "a.self_attn.v_proj.weight",
        W,
        lambda t: t.copy_(t.reshape(4, 6, 24)[[2, 0, 1, 3]].reshape(24, 24)),
        "heads_permuted",
        "[2, 0, 1, 3]",
    ),
    "heads of o": (
        "a.self_attn.out_proj.weight",
        W,
        lambda t: t.copy_(t.reshape(24, 4, 6)[:, [1, 0, 2, 3]].reshape(24, 24)),
        "heads_permuted",
        "columns",
    ),
    "twice": ("a.fc1.weight", W, lambda t: t.mul_(2), "scale", "2 ×"),
    "embedding": ("a.embed_tokens.weight", W, lambda t: t.mul_(24**-0.5), "embedding_scale", "0.204"),
    "positions by one": ("v.position_embedding", P, lambda t: t.copy_(t.roll(1, 1)), "position_shifted", "by 1"),
    "class token last": ("v.position_embedding", P, lambda t: t.copy_(t.roll(-1, 1)), "position_shifted", "by -1"),
    "grid transposed": (
        "v.position_embedding",
        P,
        lambda t: t[:, 1:].copy_(t[:, 1:].reshape(1, 4, 4, 24).transpose(1, 2).reshape(1, 16, 24).clone()),
        "position_order",
        "transposed",
    ),
    "back to front": ("v.position_embedding", P, lambda t: t.copy_(t.flip(1)), "position_order", "back to front"),
    "one value": ("a.fc1.weight", W, lambda t: t[0, 0].add_(1e-6), "weight_changed", "1 of 576"),
    "trained on": ("a.fc1.weight", W, lambda t: t.add_(1e-3 * noise(24, 24, seed=1)), "weight_changed", "of its norm"),
    "another": ("a.fc1.weight", W, lambda t: t.copy_(noise(24, 24, seed=9)), "weight_changed", "little in common"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_became_of_a_weight_is_told_from_the_two_tensors(case):
    name, right, change, cause, word = WEIGHTS[case]
    said = what_changed(name, changed(right, change), right, heads=4)
    assert said is not None
    assert (said.id, word in said.words) == (cause, True), said.words


def test_positions_that_went_through_another_grid_are_interpolated():
    grid = noise(1, 65, 8)
    patches = grid[:, 1:].reshape(1, 8, 8, 8).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(patches, size=(5, 5), mode="bicubic", align_corners=False)
    back = torch.nn.functional.interpolate(small, size=(8, 8), mode="bicubic", align_corners=False)
    found = torch.cat([grid[:, :1], back.permute(0, 2, 3, 1).reshape(1, 64, 8)], 1)
    said = what_changed("v.position_embedding", found, grid)
    assert said is not None
    assert (said.id, "5 × 5" in said.words) == ("position_interpolated", True)


@given(st.integers(0, 10_000), st.sampled_from(["a.fc1.weight", "a.fc1.bias", "v.position_embedding"]))
def test_a_weight_that_is_right_has_no_cause_and_every_cause_has_a_name(seed, name):
    right = noise(6, 8, seed=seed)
    assert what_changed(name, right.clone(), right) is None
    said = what_changed(name, right + noise(6, 8, seed=seed + 1), right)
    assert said is not None
    assert said.id in CAUSES


# -- what a part computes


@pytest.mark.parametrize("name", computing.ACTIVATIONS)
def test_every_activation_is_told_from_what_goes_in_and_comes_out(name):
    x, gate = noise(40, 16).double(), noise(40, 16, seed=1).double()
    y = computing.ACTIVATIONS[name](x).float()
    assert computing.activation([x], y, 1e-6).name == name
    gated = (computing.ACTIVATIONS[name](x) * gate).float()
    assert computing.activation([x, gate], gated, 1e-6).name == name
    assert computing.activation([x], noise(40, 16, seed=2), 1e-6) is None


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 3.3e-4])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_eps_of_a_norm_is_told_also_one_that_nobody_uses(eps, kind):
    x = 0.01 * noise(30, 64).double()
    weight, bias = 1 + noise(64, seed=1) / 10, noise(64, seed=2)
    y = computing.normalised(x, kind, eps) * weight.double() + bias.double()
    said = computing.norm(x, y.float(), {"norm": (weight, bias)}, 1e-6)
    assert said is not None
    assert (said.kind, said.params, said.bias) == (kind, "norm", True)
    assert said.eps == pytest.approx(eps, rel=0.05, abs=1e-10)


def scores(mask=None, bias=None):
    parts = {name: noise(1, 20, 24, seed=n).double() for n, name in enumerate(("query", "key", "value"))}
    return computing.Scores(parts, range(20), mask, bias)


START = computing.Attention(4, 6**-0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 2, "scale": 12**-0.5},
        {"heads": 8, "scale": 3**-0.5},
        {"scale": 1.0},
        {"scale": 24**-0.5},
        {"mask": "causal"},
        {"order": ("key", "query", "value")},
        {"order": ("query", "key", "key")},
        {"order": ("query", "key", "zeros")},
        {"heads_order": (1, 0, 2, 3)},
        {"heads": 2, "scale": 12**-0.5, "mask": "causal"},
        {"scale": 0.3},
    ],
)
def test_an_attention_is_told_from_its_output(change):
    right = dataclasses.replace(START, **change)
    output = scores().output(right)
    assert output is not None
    said = computing.attention(scores(), output.float().double(), START, 1e-6)
    assert said is not None
    assert dataclasses.replace(said, scale=right.scale) == right
    assert said.scale == pytest.approx(right.scale, rel=1e-4)


def test_a_position_bias_that_was_added_or_not_is_told():
    bias = noise(1, 4, 20, 20, seed=7).double()
    with_bias = dataclasses.replace(START, bias=True)
    output = scores(bias=bias).output(with_bias)
    assert output is not None
    assert computing.attention(scores(bias=bias), output, START, 1e-6) == with_bias


def test_which_branches_are_added_and_how_often():
    pieces = {"a": noise(30, 8), "b": noise(30, 8, seed=1), "c": noise(30, 8, seed=2)}
    assert computing.summed(pieces, pieces["a"] + pieces["c"], 1e-6) == {"a": 1.0, "c": 1.0}
    assert computing.summed(pieces, 2 * pieces["b"], 1e-6) == {"b": 2.0}
    assert computing.summed(pieces, noise(30, 8, seed=3), 1e-6) is None


@pytest.mark.parametrize(
    ("change", "id", "word"),
    [
        (lambda y: 1.5 * y, "scale", "1.5 ×"),
        (lambda y: 0 * y, "residual", "nothing"),
        (lambda y: y + noise(8, seed=5), "bias_changed", "every position"),
        (lambda y: y + torch.eye(8)[3] * noise(20, 8, seed=5), "unknown", "1 of 8 channels differ: 3"),
        (lambda y: y + torch.eye(20)[:, [4]], "unknown", "1 of 20 positions differ: 4"),
        (lambda y: y.roll(1, -1), "unknown", "another order"),
    ],
)
def test_the_pattern_of_a_difference_is_put_into_words(change, id, word):
    y = noise(20, 8)
    said = computing.pattern(change(y), y, 1e-7)
    assert said is not None
    assert (said[0], word in said[1]) == (id, True), said


# -- what arrives

IMAGE = noise(1, 3, 8, 8)
ROWS = noise(1, 12, 6)


@pytest.mark.parametrize(
    ("name", "found", "expected", "id", "word"),
    [
        ("pixel_values", IMAGE[:, [2, 1, 0]], IMAGE, "channel_order", "[2, 1, 0]"),
        ("pixel_values", 1.1 * IMAGE + 0.2, IMAGE, "image_mean_std", "1.1 ×"),
        ("pixel_values", IMAGE + 0.05 * noise(1, 3, 8, 8, seed=1), IMAGE, "interpolation", "resized"),
        ("pixel_values", IMAGE.flip(3), IMAGE, "pixels", "mirrored"),
        ("inputs_embeds", torch.cat([ROWS[:, 8:], ROWS[:, :8]], 1), ROWS, "sequence_order", "first should"),
        ("inputs_embeds", 0.5 * ROWS, ROWS, "embedding_scale", "0.5 ×"),
        ("inputs_embeds", ROWS[:, 1:], ROWS, "tokens", "shape"),
        (
            "attention_mask",
            torch.ones(1, 9),
            torch.cat([torch.ones(1, 8), torch.zeros(1, 1)], 1),
            "attention_mask",
            "11%",
        ),
        ("input_ids", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]]), "tokens", "[0, 2]"),
    ],
)
def test_what_arrives_is_told_from_what_should(name, found, expected, id, word):
    cause = arrivals.explain("model", name, found, expected, {})
    assert (cause.id, word in cause.words) == (id, True), cause
    if cause.counter_test is not None:
        assert cause.proven


# -- two models that are not BLIP-2


class Block(torch.nn.Module):
    """Attention and MLP with residuals around them, normed before."""

    def __init__(self, heads=2, activation="gelu"):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1, self.norm2 = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        for norm in (self.norm1, self.norm2):
            torch.nn.init.normal_(norm.weight, 1, 0.1)
        self.query, self.key, self.value, self.out = (torch.nn.Linear(16, 16) for _ in range(4))
        self.fc1, self.fc2 = torch.nn.Linear(16, 40), torch.nn.Linear(40, 16)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) * (16 // self.heads) ** -0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.fc2(computing.ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))


PARTS = ("norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2")
TABLE = [
    trace.Stage(f"block.{n}", f"{n}", f"{n}", inputs={"x": ":x"}, modules=dict(zip(PARTS, PARTS, strict=True)))
    for n in range(3)
]


@pytest.fixture
def models():
    torch.manual_seed(0)
    reference = torch.nn.Sequential(*(Block() for _ in range(3))).eval()
    candidate = torch.nn.Sequential(*(Block() for _ in range(3))).eval()
    candidate.load_state_dict(reference.state_dict())
    return reference, candidate


def swap_norms(block):
    block.norm1, block.norm2 = block.norm2, block.norm1


def shift_bias(block):
    block.fc1.bias.data = block.fc1.bias.data.roll(1)


def wider_eps(block):
    block.norm2.eps = 1e-3


def mask(block):
    forward = block.value.forward
    block.value.forward = lambda x: forward(x) * torch.linspace(0, 1, x.shape[1])[None, :, None]


FAULTS = {
    "heads": (lambda block: setattr(block, "heads", 4), "", "attention", "head_count"),
    "activation": (lambda block: setattr(block, "activation", "relu"), "", "activation", "activation"),
    "eps": (wider_eps, ".norm2", "norm", "eps"),
    "norms": (swap_norms, ".norm1", "norm", "norms_swapped"),
    "bias": (shift_bias, ".fc1", "mlp", "bias_shifted"),
    "positions": (mask, ".value", "value", "unknown"),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_model_is_laid_at_a_modules_door(models, fault, at):
    reference, candidate = models
    plant, module, part, cause = FAULTS[fault]
    plant(candidate[at])
    found = trace.compare(reference, candidate, TABLE, noise(2, 10, 16))
    assert {one.stage for one in found.findings} == {f"block.{at}"}
    first = found.findings[0]
    assert (first.module, first.part, first.causes[0].id) == (f"{at}{module}", part, cause), found
    assert f"block.{at}" in str(found)


def test_two_faults_are_both_found_and_each_alone(models):
    reference, candidate = models
    shift_bias(candidate[0])
    candidate[2].heads = 4
    found = trace.compare(reference, candidate, TABLE, noise(1, 10, 16))
    said = [(one.stage, one.causes[0].id) for one in found.findings]
    assert said == [("block.0", "bias_shifted"), ("block.2", "head_count")]
    assert all(one.causes[0].proven for one in found.findings)
    report = raw(of_comparison(found))["faults"][0]
    assert report["causes"][0]["counter_test"]["passed"]
    assert [place["module"] for place in report["inside"] if place["faulty"]] == ["0.fc1"]


def test_exchanged_layers_are_told_by_the_weights_in_which_they_differ(models):
    reference, candidate = models
    for model in models:  # as they are before training: norms and biases say nothing of the layer
        for name, one in model.named_parameters():
            if one.dim() < 2:
                one.data.fill_(float("norm" in name and name.endswith("weight")))
    whole, part = dict(candidate[0].named_parameters()), dict(candidate[2].named_parameters())
    for name, one in whole.items():
        one.data, part[name].data = part[name].data, one.data
    found = trace.compare(reference, candidate, TABLE, noise(1, 10, 16))
    assert [(one.module, one.part, one.causes[0].id) for one in found.findings] == [
        ("0", "layer", "layers_swapped"),
        ("2", "layer", "layers_swapped"),
    ]
    assert all(one.causes[0].proven for one in found.findings)


def test_layers_whose_attentions_were_exchanged_are_not_exchanged(models):
    reference, candidate = models
    for block in reference:
        for norm in (block.norm1, block.norm2):
            torch.nn.init.normal_(norm.bias)
    candidate.load_state_dict(reference.state_dict())
    for name in ("query", "key", "value", "out"):
        ours, theirs = getattr(candidate[0], name), getattr(candidate[2], name)
        setattr(candidate[0], name, theirs)
        setattr(candidate[2], name, ours)
    found = trace.compare(reference, candidate, TABLE, noise(1, 10, 16))
    assert {one.causes[0].id for one in found.findings} == {"weight_swapped"}


class Positions(torch.nn.Embedding):
    """A table that is looked up past an offset, as OPT's."""

    def __init__(self, offset=2):
        super().__init__(20, 16)
        self.past = offset

    def forward(self, at):
        return super().forward(at + self.past)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shifted_positions_are_told_in_every_precision(dtype):
    torch.manual_seed(0)
    reference, candidate = torch.nn.Sequential(Positions()).eval(), torch.nn.Sequential(Positions(0)).eval()
    candidate.load_state_dict(reference.state_dict())
    stage = trace.Stage("positions", "0", "0", inputs={"at": ":at"})
    found = trace.compare(reference, candidate.to(dtype), [stage], torch.arange(12)[None], known=trace.Known())
    assert [(one.stage, one.causes[0].id) for one in found.findings] == [("positions", "position_shifted")], found
    assert "-2 from" in found.findings[0].causes[0].words


def test_two_models_that_are_the_same_have_no_fault(models):
    found = trace.compare(*models, TABLE, noise(1, 10, 16))
    assert found.findings == ()
    assert max(stage.excess for stage in found.stages) < THRESHOLD
