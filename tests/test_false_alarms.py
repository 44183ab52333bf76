"""No alarm on a right model: the twins as shipped, others with LAVIS live, and the statistics."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.stages import stages
from blip2nb.handles import Run
from blip2nb.lavis_env.reference import SHIPPED_TAPES
from blip2nb.proof.behaviour import tape_images
from blip2nb.trace.comparison import compare
from blip2nb.trace.metrics import THRESHOLD
from blip2nb.trace.results import Comparison
from blip2nb.trace.tape import Tape
from blip2nb.variants import variant

ROOT = Path(__file__).parent.parent
OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def _against_the_shipped_tape(name: str, folder: Path, eps: float) -> Comparison:
    tape, model = Tape(SHIPPED_TAPES / f"{name}.safetensors"), variant(name)
    loaded = huggingface.load(folder)
    loaded.model.vision_model.post_layernorm.eps = eps
    given = huggingface.forward_inputs(loaded, model, tape_images(tape)[0], tape.metadata["texts"])
    return compare(tape, loaded.model, stages(model), given, explain=False)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", [OPT, T5])
def test_a_right_twin_raises_no_alarm(name: str, threads: int, converted: Callable[[str], Run]) -> None:
    torch.set_num_threads(threads)
    try:
        found = _against_the_shipped_tape(name, converted(name).model, eps=1e-5)
    finally:
        torch.set_num_threads(1)
    assert found.faults == []
    judged = [stage for stage in found.stages if stage.excess is not None]
    assert len(judged) == sum(not stage.is_junction for stage in stages(variant(name)))
    excess = [stage.excess for stage in judged]  # another processor moves single stages, but not all of them
    assert 2 / 3 < statistics.median(excess) < 3 / 2
    assert 1 / THRESHOLD < min(excess) <= max(excess) < THRESHOLD
    assert {stage.arrival_error for stage in found.stages} <= {0.0, None}


def test_and_a_wrong_one_does(converted: Callable[[str], Run]) -> None:
    found = _against_the_shipped_tape(OPT, converted(OPT).model, eps=1e-6)
    assert [stage.name for stage in found.faults] == ["vision.post_layernorm"]


@pytest.mark.lavis
def test_other_weights_and_inputs_raise_none_with_lavis_live(tmp_path: Path, lavis_begins_warm: None) -> None:
    from benchmarks.alarm_blocks import BLOCK_INPUTS, BlockJob, shape
    from benchmarks.alarm_lavis import lavis_side
    from benchmarks.alarm_rates import alarms, judged, page
    from benchmarks.alarm_twins import TwinJob

    single = {"dtypes": ("float32",)}
    jobs = [
        TwinJob("held-out", OPT, 1001, inputs=("noise",), **single),
        TwinJob("held-out", T5, 1002, inputs=("batch",), **single),
        BlockJob("held-out", shape("q-former-self"), 1003, **single),
    ]
    with lavis_side(tmp_path) as ask:
        rows = [row for job in jobs for row in job.measure(ask, tmp_path / "job")]
    found = judged(rows, "float32")
    assert (
        len(found) == sum(not stage.is_junction for name in (OPT, T5) for stage in stages(variant(name))) + BLOCK_INPUTS
    )
    assert alarms(found) == []
    assert any(stage["local"] for stage in found)  # they do differ: this is rounding, and not the same code twice
    assert {stage["arrival"] for row in rows for stage in row["stages"]} <= {0.0, None}
    assert f"| held-out | {len(rows)} | 2 | {BLOCK_INPUTS} | {len(found)} |" in page(rows, {})


def test_a_seed_gives_other_weights_and_none_gives_the_twin() -> None:
    from blip2nb.twins import twin_tensors

    own, same, other = (twin_tensors(variant(OPT), seed) for seed in (0, 0, 5))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], same[name]) for name in own)
    assert not any(torch.equal(own[name], other[name]) for name in own)


def test_what_exceeds_the_threshold_is_an_alarm_and_so_is_nan() -> None:
    from benchmarks.alarm_rates import alarms, judged

    stages = [{"excess": value} for value in (0.4, 1.0, 2.9, 3.1, float("inf"), float("nan"), None)]
    found = judged([{"set": "held-out", "run": "", "dtype": "float32", "stages": stages}], "float32", "held-out")
    assert len(found) == 6
    assert [str(stage["excess"]) for stage in alarms(found)] == ["3.1", "inf", "nan"]
    assert judged([{"set": "planted", "run": "", "dtype": "float32", "stages": stages}], "float32") == []


def test_an_error_is_carried_by_as_many_values_as_are_large() -> None:
    from benchmarks.alarm_rows import carrying

    error = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    assert carrying(error) == pytest.approx(20_000, rel=0.1)
    error[:100] *= 1000
    assert 50 < carrying(error) < 200


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_a_tail_is_found_again(shape: float) -> None:
    from benchmarks.alarm_rates import fit_tail

    uniform = np.random.default_rng(1).random(100_000)
    values = -np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape
    tail = fit_tail(values)
    assert tail.shape == pytest.approx(shape, abs=0.06)
    far = float(np.quantile(values, 1 - 1e-4))
    assert 0.3e-4 < tail.beyond(far) < 3e-4
    assert tail.beyond(2 * far) < tail.beyond(far)
