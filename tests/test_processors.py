"""No limit is what one processor rounds: whoever made a recording rightly raises no alarm, and has a name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2nb.handles import Run
from blip2nb.lavis_env.reference import shipped_tape
from blip2nb.proof.takes import Measured
from blip2nb.trace import Stage, compare, computing
from blip2nb.trace.metrics import CEILING, FEW, THRESHOLD, UNIT, judge
from blip2nb.trace.precision import one_by_one
from blip2nb.trace.repeats import repeated
from blip2nb.trace.results import Comparison
from blip2nb.variants import variant

ROOT = Path(__file__).parent.parent
OPT = "tiny-blip2-opt-2.7b"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def badly_rounded(exact: torch.Tensor, units: int = 1) -> torch.Tensor:
    """Float32 values, each so many units in the last place farther from the exact one than the nearest."""
    value = exact.float()
    away = torch.where(value.double() >= exact, torch.inf, -torch.inf)
    for _ in range(units):
        value = torch.nextafter(value, away)
    return value


# -- what a function is


class TwoMatrices(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.function = torch.nn.Linear(16, 40), torch.nn.Linear(40, 16), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.function(self.fc1(x)))


TABLE = [Stage("block", "0", "0", inputs={"x": ":x"}, modules={"fc1": "fc1", "fc2": "fc2"})]


def compared(
    theirs: Callable[[torch.Tensor], torch.Tensor],
    ours: Callable[[torch.Tensor], torch.Tensor],
    fault: Callable[[TwoMatrices], object] = lambda block: None,
) -> Comparison:
    torch.manual_seed(0)
    reference = torch.nn.Sequential(TwoMatrices(theirs)).eval()
    candidate = torch.nn.Sequential(TwoMatrices(ours)).eval()
    candidate.load_state_dict(reference.state_dict())
    fault(candidate[0])
    return compare(reference, candidate, TABLE, noise(2, 10, 16))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu"])
def test_a_function_is_named_however_badly_a_library_rounds_it(name: str) -> None:
    """The candidate's own function rounds nothing at all, so that it says nothing about the reference's rounding."""
    right = computing.ACTIVATIONS[name]
    found = compared(lambda x: badly_rounded(right(x.double()), 4), torch.relu)
    assert (found.findings[0].part, found.findings[0].causes[0].id) == ("activation", "activation")
    assert f"relu, the reference has {name}" in found.findings[0].causes[0].words
    assert found.findings[0].causes[0].proven


@pytest.mark.parametrize("name", computing.ACTIVATIONS)
def test_near_functions_are_told_apart_however_badly_both_are_rounded(name: str) -> None:
    x = noise(40, 16).double()
    value = computing.ACTIVATIONS[name](x)
    said = computing.activation([x], badly_rounded(value, 4), UNIT)
    assert said is not None
    assert said.name == name
    off = value + 4 * FEW * value.norm() / value.numel() ** 0.5 * noise(40, 16, seed=1).sign()
    assert computing.activation([x], off, UNIT) is None  # no rounding of any of them


def test_a_function_that_another_library_rounds_less_is_no_fault() -> None:
    """Erf is right to a few units of its largest value, which a small gelu has twice as much of."""
    worse = lambda x: badly_rounded(torch.nn.functional.gelu(x.double()), 2).to(x.dtype)  # noqa: E731
    exact = lambda x: torch.nn.functional.gelu(x.double()).to(x.dtype)  # noqa: E731

    class Function(torch.nn.Module):
        def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x) if x.dtype == torch.float32 else torch.nn.functional.gelu(x)

    table = [Stage("function", "0", "0", inputs={"x": ":x"})]
    for theirs, ours in ((worse, exact), (exact, worse)):
        pair = (torch.nn.Sequential(Function(one)).eval() for one in (theirs, ours))
        assert compare(*pair, table, noise(2, 10, 16)).faults == []


def test_nor_is_it_one_beside_a_fault() -> None:
    right = torch.nn.functional.gelu
    worse = lambda x: badly_rounded(right(x.double()), 2).to(x.dtype)  # noqa: E731
    exact = lambda x: right(x.double()).to(x.dtype)  # noqa: E731
    for theirs, ours in ((worse, exact), (exact, worse)):
        ours = right if ours is worse else ours
        found = compared(theirs, ours, lambda block: block.fc2.bias.data.copy_(block.fc2.bias.data.roll(1)))
        assert [(one.module, one.causes[0].id) for one in found.findings] == [("0.fc2", "bias_shifted")]


def test_the_eps_of_a_norm_is_told_to_a_few_roundings_however_badly_it_is_rounded() -> None:
    x = noise(30, 64).double()
    params = {"norm": (1 + noise(64, seed=1) / 10, noise(64, seed=2))}
    eps = {right: computing.Norm("layer", right, "norm").of(x, params, torch.float64) for right in (1e-6, 3e-6)}
    assert 3 < computing.off(eps[3e-6], eps[1e-6]) / UNIT < 16  # far nearer than any limit for a function
    said = [computing.norm(x, one, params, UNIT / 2) for one in (badly_rounded(eps[1e-6], 2).double(), eps[3e-6])]
    assert [one.eps for one in said if one] == [1e-6, 3e-6]
    assert computing.norm(x, eps[1e-6] + 1e-4 * noise(30, 64, seed=3), params, UNIT) is None


def test_an_attention_that_was_rounded_badly_is_no_other() -> None:
    parts = {name: noise(1, 20, 24, seed=n).double() for n, name in enumerate(("query", "key", "value"))}
    scores, start = computing.Scores(parts, range(20)), computing.Attention(4, 6**-0.5)
    output = scores.output(start)
    assert output is not None
    assert computing.attention(scores, badly_rounded(output, 3).double(), start, UNIT) == start
    scaled = dataclasses.replace(start, scale=start.scale * (1 + 64 * FEW))
    near = scores.output(scaled)
    assert near is not None
    said = computing.attention(scores, badly_rounded(near).double(), start, UNIT)
    assert said is not None
    assert said.scale == pytest.approx(scaled.scale, rel=8 * FEW)


def test_a_small_branch_is_added_once_though_rounding_leaves_its_factor_unsure() -> None:
    """Where one branch is ten thousand times as large as the other, its rounding is much of the small one."""
    pieces = {"large": 1e4 * noise(20, 4).double(), "small": noise(20, 4, seed=1).double()}
    exact = pieces["large"] + pieces["small"]
    assert computing.summed(pieces, badly_rounded(exact, 2).double(), UNIT) == {"large": 1.0, "small": 1.0}
    assert computing.summed(pieces, pieces["large"] + 1.5 * pieces["small"], UNIT) == {"large": 1.0, "small": 1.5}


# -- in what order sums are added


class GemmConvolution(torch.nn.Conv2d):
    """A convolution as one matrix, with the bias added last: as oneDNN takes it for some sizes and processors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.unfold(x, self.kernel_size, stride=self.stride).transpose(1, 2)
        out = torch.nn.functional.linear(patches, self.weight.flatten(1), self.bias)
        return out.transpose(1, 2).unflatten(2, (x.shape[2] // self.stride[0], -1))


class ConvolutionOneByOne(torch.nn.Conv2d):
    """Product by product onto the bias: as oneDNN takes it for others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with one_by_one():
            return super().forward(x)


PATCHES = [Stage("patches", "0", "0", inputs={"x": ":x"})]


@pytest.mark.parametrize("kinds", [(GemmConvolution, ConvolutionOneByOne), (ConvolutionOneByOne, GemmConvolution)])
def test_an_almost_empty_image_is_no_fault_in_whatever_order_patches_are_added_up(kinds: tuple[type, type]) -> None:
    torch.manual_seed(0)
    reference, candidate = (torch.nn.Sequential(kind(3, 64, 14, 14)).eval() for kind in kinds)
    candidate.load_state_dict(reference.state_dict())
    for model in (reference, candidate):
        model[0].bias.data.copy_(noise(64, seed=1))
    empty = 1e-3 * noise(1, 3, 56, 56)
    found = compare(reference, candidate, PATCHES, empty)
    assert found.stages[0].local_error > 3 * UNIT  # they do differ, by more than the threshold times the better one
    assert found.faults == []
    candidate[0].bias.data[3] += 1e-3
    assert [one.causes[0].id for one in compare(reference, candidate, PATCHES, empty).findings] == ["bias_changed"]


class Matrix(torch.nn.Module):
    """A matrix inside a stage; `bias` says how often its bias is added, `slow` that it adds one product at a time."""

    def __init__(self, bias: int = 1, slow: bool = False) -> None:
        super().__init__()
        self.fc, self.bias, self.slow = torch.nn.Linear(588, 64), bias, slow
        self.fc.forward = self._product  # type: ignore[method-assign]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        with one_by_one() if self.slow else contextlib.nullcontext():
            return torch.nn.functional.linear(x, self.fc.weight, self.bias * self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


def test_what_a_matrix_was_used_for_is_told_in_whatever_order_the_reference_adds_up() -> None:
    torch.manual_seed(0)
    reference = torch.nn.Sequential(Matrix(slow=True)).eval()
    candidate = torch.nn.Sequential(Matrix(bias=2)).eval()
    candidate.load_state_dict(reference.state_dict())
    table = [Stage("matrix", "0", "0", inputs={"x": ":x"}, modules={"fc": "fc"})]
    found = compare(reference, candidate, table, 1e-2 * noise(1, 20, 588)).findings
    assert [(one.module, str(one.causes[0].id)) for one in found] == [("0.fc", "bias_changed")]
    assert "twice" in found[0].causes[0].words
    assert found[0].causes[0].proven


def test_adding_one_by_one_is_the_same_convolution() -> None:
    layer = torch.nn.Conv2d(3, 8, (2, 3), (2, 1), padding=(1, 0), dilation=(1, 2))
    x = noise(2, 3, 9, 10)
    with torch.no_grad(), one_by_one():
        slow = layer(x)
    assert computing.off(slow, layer(x)) < 64 * UNIT


def test_what_any_order_is_off_by_hides_no_error_above_it() -> None:
    exact = noise(50, 50).double()
    found, expected = exact + 1e-9, exact * (1 + 40 * UNIT)
    least = lambda _: 20 * UNIT  # noqa: E731
    assert judge(found, expected, exact)["excess"] > THRESHOLD
    assert judge(found, expected, exact, least=least)["excess"] == pytest.approx(2, rel=0.01)
    assert judge(found, exact * (1 + 80 * UNIT), exact, least=least)["excess"] > THRESHOLD
    assert judge(found, exact * (1 + 2 * CEILING), exact, least=lambda _: 1.0)["excess"] > THRESHOLD


def test_a_run_that_is_rounded_otherwise_the_second_time_is_not_random() -> None:
    value = noise(30, 30)
    assert repeated(value, badly_rounded(value.double(), 2))
    assert not repeated(value, value * (1 + 4 * FEW))
    assert not repeated(torch.tensor([1, 2]), torch.tensor([1, 3]))


# -- captions


def test_two_captions_may_be_a_tie_also_where_the_models_agree_bit_for_bit() -> None:
    """On the machine that made the recording nothing differs in a forward pass; a step of a caption may."""
    logits = noise(1, 5, 40)
    found = Comparison((), {"logits": logits}, {}, {})
    assert Measured.of(found, logits).error == pytest.approx(FEW * logits.abs().max().item())
    assert Measured.of(found, logits + 1e-3).error == pytest.approx(1e-3, rel=1e-2)
    one = np.zeros(5, np.float32)
    assert Measured((), ("logits",), (), {"max_abs": 1.0}, one, one, one).error is None


# -- another processor


def test_another_kind_of_processor_says_the_same(
    converted: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that computes with the instructions which every processor has, against what ships and was recorded on
    another machine, and against this process; with a few faults of the catalogue."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import processors

    (tmp_path / OPT).mkdir()
    (tmp_path / OPT / "model").symlink_to(converted(OPT).model)
    torch.save({name: layer() for name, layer in processors.LAYERS.items()}, tmp_path / "here.layers.pt")
    asked = {"scratch": str(tmp_path), "setting": "default", "threads": 2, "settings": ["here"], "twins": [OPT]}
    asked |= {"recordings": {"as shipped": {OPT: str(shipped_tape(variant(OPT)))}}, "faulty": [OPT], "faults": 2}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "benchmarks.processors", "--cell", tmp_path / "asked.json"]
    variables = processors.environment("default", 2)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cell = processors.Cell(**json.loads(done.stdout.splitlines()[-1]))
    assert processors.complaints([cell]) == []
    assert len(cell.causes["as shipped"]) == 2
    assert cell.excess.keys() == {"as shipped", "layers, here"}
    one = dataclasses.replace(cell, causes={"as shipped": {"fault": "one"}})
    other = dataclasses.replace(cell, threads=4, alarms=["as shipped: a"], causes={"as shipped": {"fault": "another"}})
    assert len(processors.complaints([one, other])) == 2  # an alarm, and another cause
