"""Whatever a library calls its projections, a fault in an attention is called by its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip2nb import trace
from blip2nb.trace import tape, vocabulary

OUTPUTS = {"c_attn": "c_proj", "Wqkv": "out_proj", "query_key_value": "dense", "in_proj": "o_proj", "qkv": "proj"}
WIDTH = 16


class Attention(torch.nn.Module):
    """Two heads over one projection that makes queries, keys and values, under any name."""

    def __init__(self, fused: str, order: tuple[int, int, int] = (0, 1, 2)):
        super().__init__()
        self.names, self.order, self.num_heads = (fused, OUTPUTS[fused]), order, 2
        self.add_module(fused, torch.nn.Linear(WIDTH, 3 * WIDTH))
        self.add_module(OUTPUTS[fused], torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = map(self.get_submodule, self.names)
        parts = first(x).chunk(3, -1)
        return last(attended(*(parts[number] for number in self.order), self.num_heads))


class Bare(torch.nn.Module):
    """The same from a weight that is in no module, as torch's own attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.in_proj_weight = torch.nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 4)
        self.in_proj_bias = torch.nn.Parameter(torch.randn(3 * WIDTH) / 4)
        self.out_proj = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(attended(*parts, self.num_heads))


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    """What it holds has a name that says nothing."""

    def __init__(self, mixer: torch.nn.Module):
        super().__init__()
        self.norm, self.mixer = torch.nn.LayerNorm(WIDTH), mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(self.norm(x))


def compared(reference: torch.nn.Module, candidate: torch.nn.Module, known: trace.Known | None = None):
    """What is found with `reference` and `candidate` in a block each, of the same weights before anything is done."""
    one, other = (torch.nn.Sequential(Block(mixer)).eval() for mixer in (reference, candidate))
    inside = [name for name, module in one[0].named_modules() if name and list(module.parameters(recurse=False))]
    table = [trace.Stage("block", "0", "0", inputs={"x": ":x"}, modules={name: name for name in inside})]
    shown = torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(1))
    return trace.compare(one, other, table, shown, known=known)


def pair(fused: str, order: tuple[int, int, int] = (0, 1, 2)) -> tuple[Attention, Attention]:
    torch.manual_seed(0)
    reference, candidate = Attention(fused), Attention(fused, order)
    candidate.load_state_dict(reference.state_dict())
    return reference, candidate


def exchange(*tensors: torch.Tensor) -> None:
    """Query and key, or their biases."""
    for tensor in tensors:
        q, k, v = tensor.data.chunk(3)
        tensor.data = torch.cat([k, q, v])


@pytest.mark.parametrize("fused", OUTPUTS)
def test_query_and_key_taken_for_each_other_are_told_whatever_makes_them_is_called(fused):
    (finding,) = compared(*pair(fused, (1, 0, 2))).findings
    assert (finding.module, finding.part) == ("0.mixer", "attention")
    assert (finding.causes[0].id, finding.causes[0].proven) == ("qkv_swapped", True), finding


@pytest.mark.parametrize("fused", OUTPUTS)
def test_a_fused_weight_in_another_order_is_told_part_by_part(fused):
    reference, candidate = pair(fused)
    first = candidate.get_submodule(fused)
    exchange(first.weight, first.bias)
    (finding,) = compared(reference, candidate).findings
    assert (finding.module, finding.part) == (f"0.mixer.{fused}", "qkv")
    assert (finding.causes[0].id, finding.causes[0].proven) == ("qkv_swapped", True), finding
    assert "key, query, value" in finding.causes[0].words


def test_a_fused_weight_in_no_module_is_told_part_by_part():
    torch.manual_seed(0)
    reference, candidate = Bare(), Bare()
    candidate.load_state_dict(reference.state_dict())
    exchange(candidate.in_proj_weight, candidate.in_proj_bias)
    (finding,) = compared(reference, candidate).findings
    assert finding.causes[0].id == "qkv_swapped", finding
    assert finding.causes[0].module == "0.mixer.in_proj_weight"
    candidate.load_state_dict(reference.state_dict())
    candidate.in_proj_bias.data[:WIDTH] = 0
    (finding,) = compared(reference, candidate).findings
    assert (finding.causes[0].id, "query" in finding.causes[0].words) == ("bias_missing", True), finding


@pytest.mark.parametrize("fused", OUTPUTS)
def test_models_that_are_the_same_have_no_fault_under_any_name(fused):
    assert compared(*pair(fused)).findings == ()


@pytest.mark.parametrize("fused", OUTPUTS)
def test_what_an_attention_mixes_is_recorded_whole(fused):
    model = Block(Attention(fused))
    with tape.recording(model, [], [f"mixer.{fused}", f"mixer.{OUTPUTS[fused]}"]) as recorded:
        model(torch.zeros(1, 40, WIDTH))
    assert recorded[f"mixer.{fused}"].shape[1] == 40
    assert recorded[f"mixer.{OUTPUTS[fused]}"].shape[1] == tape.SAMPLE


def test_every_name_has_one_role():
    names = [name for each in vocabulary.ROLES.values() for name in each]
    assert len(names) == len(set(names))
    assert {"query", "key", "value"} <= vocabulary.MIXED <= vocabulary.ROLES.keys()


def test_it_imports_nothing():
    """It is read where the reference lives, whatever is installed there."""
    code = "import sys, vocabulary; print(vocabulary.role_of('h.0.attn.c_attn'), 'torch' in sys.modules)"
    folder = Path(vocabulary.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["qkv", "False"]
