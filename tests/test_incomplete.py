"""What was not run or could not be judged is said, and is never taken for a proof: the verdict incomplete, exit status
4, and memory that runs out on the way."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import overviews as overview
import pytest
import torch
from conftest import Outcome
from made_up import report as made_up_report
from records import content, raw, record
from test_page import Read

from blip2nb import api, trace
from blip2nb.api import verifying
from blip2nb.catalogue import bench as catalogue_bench
from blip2nb.catalogue.cases import Broken
from blip2nb.display import page, plots
from blip2nb.errors import OutOfMemory, RequestError, memory_ran_out
from blip2nb.families.captioners import huggingface, inputs
from blip2nb.handles import Report, Run
from blip2nb.proof.subject import Subject
from blip2nb.proof.verdict import not_judged
from blip2nb.proof.weights import expected_parameters
from blip2nb.report.store import FORMAT
from blip2nb.report.sweep import Index
from blip2nb.sweeps.sweep import Sweep
from blip2nb.trace import computing
from blip2nb.trace.diagnosis import settings
from blip2nb.trace.results import Comparison
from blip2nb.trace.stage import Stage
from blip2nb.weights import sources

OPT = "tiny-blip2-opt-2.7b"
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"

# -- a stage whose float64 run fails, in anybody's models


class Only32(torch.nn.Module):
    """A layer that refuses float64, or raises what it is told to there."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.linear, self.error = torch.nn.Linear(16, 16), error or AssertionError("float32 only")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise self.error
        return self.linear(x)


class Net(torch.nn.Module):
    def __init__(self, second: torch.nn.Module):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


STAGES = [Stage("first", "first", "first", {"input": ":input"}), Stage("second", "second", "second", {"x": ":x"})]
X = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))


def pair(error: Exception | None = None) -> tuple[Net, Net]:
    """Two models of the same weights."""
    torch.manual_seed(0)
    reference, candidate = Net(Only32()).eval(), Net(Only32(error)).eval()
    candidate.load_state_dict(reference.state_dict())
    return reference, candidate


def compared(factor: float, error: Exception | None = None) -> Comparison:
    """Of models of which one has a row of weights `factor` times as large."""
    reference, candidate = pair(error)
    with torch.no_grad():
        candidate.second.linear.weight[0] *= factor
    return trace.compare(reference, candidate, STAGES, X)


ERRORS = [
    (AssertionError("float32 only"), "AssertionError: float32 only"),
    (RuntimeError("expected scalar type Float"), "RuntimeError: expected scalar type Float"),
    (KeyError("torch.float64"), "KeyError: 'torch.float64'"),
    (RuntimeError(NO_MEMORY), "memory ran out"),
    (MemoryError(), "memory ran out"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out"),
]


@pytest.mark.parametrize(("error", "why"), ERRORS, ids=lambda value: type(value).__name__)
def test_a_stage_whose_float64_run_fails_is_not_judged_by_any_tolerance(error: Exception, why: str):
    found = compared(1 + 1e-6, error)  # 2e-7 off: the old tolerance called it rounding, and 1e-6 a fault
    first, second = found.stages
    assert (first.refereed, first.judged, first.excess) == (True, True, 1.0)
    assert (second.refereed, second.referee_error, second.judged) == (False, why, False)
    assert (second.rounding, second.excess) == (None, None)
    assert 0 < second.local_error < 1e-6
    assert (found.faults, [stage.name for stage in found.unjudged]) == ([], ["second"])
    for shown in (str(found), found._repr_html_()):
        assert "not judged" in shown
        assert why.replace("'", "&#x27;") in shown.replace("'", "&#x27;")


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 + 1e-4])
def test_an_error_that_could_be_rounding_or_a_fault_is_neither_without_its_referee(factor: float):
    found = compared(factor)
    assert 3e-7 < found["second"].local_error < 1e-4
    assert (found.faults, found["second"].judged) == ([], False)


def test_what_needs_no_referee_is_judged_without_it():
    equal = compared(1.0)
    assert (equal["second"].bit_equal, equal["second"].excess, equal.unjudged) == (True, 1.0, [])
    far = compared(1.1)
    assert (far["second"].excess, far["second"].refereed) == (float("inf"), False)
    assert [str(one.causes[0].id) for one in far.findings] == ["weight_changed"]
    lost = compared(float("nan"))
    assert lost.first_divergence is not None
    assert lost.first_divergence.name == "second"


def test_a_float64_run_that_gives_no_numbers_is_no_referee():
    class Overflows(Only32):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * (float("nan") if x.dtype == torch.float64 else 1.0)

    reference, candidate = Net(Overflows()).eval(), Net(Overflows()).eval()
    candidate.load_state_dict(reference.state_dict())
    with torch.no_grad():
        candidate.second.linear.weight[0] *= 1 + 1e-6
    found = trace.compare(reference, candidate, STAGES, X)
    assert (found.faults, [stage.name for stage in found.unjudged]) == ([], ["second"])


def test_what_differs_each_time_is_a_fault_without_a_referee():
    class Noisy(Only32):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 1e-6 * torch.randn(16))

    reference, _ = pair()
    candidate = Net(Noisy()).eval()
    candidate.load_state_dict(reference.state_dict())
    found = trace.compare(reference, candidate, STAGES, X)
    assert found["second"].local_error < 1e-5
    assert [stage.name for stage in found.faults] == ["second"]
    assert [one.causes[0].id for one in found.findings] == ["dropout"]


def test_memory_that_runs_out_in_the_candidate_is_no_fault_of_it():
    class Hungry(Only32):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(NO_MEMORY)

    reference, _ = pair()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trace.compare(reference, Net(Hungry()).eval(), STAGES, X)


# -- memory, recognised in one place


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(NO_MEMORY),
        RuntimeError("unable to mmap 3145355 bytes from file </a>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "x"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OutOfMemory("x"),
    ],
    ids=repr,
)
def test_memory_that_ran_out_is_recognised_also_behind_another_error(error: Exception):
    assert memory_ran_out(error)
    behind = RequestError("model does not load. Convert again.")
    behind.__cause__ = error
    assert memory_ran_out(behind)
    while_handling = RequestError("model does not load. Convert again.")
    while_handling.__context__ = behind
    assert memory_ran_out(while_handling)


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("mat1 and mat2 differ")]
)
def test_other_errors_are_not_taken_for_it(error: Exception):
    assert not memory_ran_out(error)


WITHOUT_MEMORY = """
import resource
from blip2nb.errors import RequestError, memory_ran_out

errors = [RuntimeError("could not create a primitive"), SystemError("error return without exception set")]
print([memory_ran_out(error) for error in errors])
resource.setrlimit(resource.RLIMIT_DATA, (50_000_000, resource.RLIM_INFINITY))
print([memory_ran_out(error) for error in [*errors, RequestError("no such file")]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts mapped memory against RLIMIT_DATA")
def test_whatever_native_code_raises_where_memory_is_used_up_is_lack_of_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[False, False]", "[True, True, False]", ""]


def test_no_place_that_keeps_going_after_an_error_keeps_going_without_memory(
    converted: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Loading, images and the bench turn any error into a word about the model or the file, but not this one."""

    def fails(*_: object, **__: object) -> Any:
        raise RuntimeError(NO_MEMORY)

    run = converted(OPT)
    (tmp_path / "image.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "_decode", fails)
        with pytest.raises(RuntimeError, match="allocate"):
            inputs._read(tmp_path / "image.png")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoProcessor.from_pretrained", fails)
        with pytest.raises(RuntimeError, match="allocate"):
            huggingface.load(run.model)
        with pytest.raises(OutOfMemory, match=r"Memory ran out while verifying .* use a machine with more"):
            api.verify(run, output=tmp_path / "out", figures=False)
    assert not (tmp_path / "out" / "report.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(catalogue_bench, "findings", fails)
        bench = object.__new__(catalogue_bench.Bench)
        bench.tape = bench.source = None  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="allocate"):
            bench.findings(Broken(None, None, run.model))  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        calls: list[object] = []
        patch.setattr(catalogue_bench, "compare", lambda *_, **__: calls.append(1) or fails())
        bench.known, bench.stages = [], []  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="allocate"):
            bench.measure(huggingface.Loaded(torch.nn.Linear(1, 1), None), {})  # type: ignore[arg-type]
        assert len(calls) == 1
    for place in ("Blip2Config.from_pretrained", "Blip2ForConditionalGeneration.__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(f"transformers.{place}", fails)
            with pytest.raises(RuntimeError, match="allocate"):
                expected_parameters(run.model)


def test_a_source_that_does_not_fit_into_memory_is_neither_gone_nor_damaged(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> Any:
        raise RequestError("damaged") from RuntimeError(NO_MEMORY)

    monkeypatch.setattr(sources, "open_folder", fails)
    for look in (lambda: sources.holds_weights(Path()), lambda: Subject(Path(), open_source=fails).source):
        with pytest.raises(RequestError, match="damaged"):
            look()


@pytest.mark.parametrize(("module", "step"), [(settings, "judged_again"), (computing, "norm")])
def test_memory_that_runs_out_in_the_diagnosis_is_no_answer(monkeypatch: pytest.MonkeyPatch, module: Any, step: str):
    """With another eps read off the modules and put right, and with what a module computes told from its outputs."""

    def fails(*_: object, **__: object) -> Any:
        raise RuntimeError(NO_MEMORY)

    def block(eps: float) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8, eps))).eval()

    table = [Stage("block", "0", "0", inputs={"input": ":input"}, modules={"0": "0", "1": "1"})]
    shown = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    found = trace.compare(block(1e-5), block(1e-1), table, shown)
    assert [one.part for one in found.findings] == ["norm"]
    monkeypatch.setattr(module, step, fails)
    with pytest.raises(RuntimeError, match="allocate"):
        trace.compare(block(1e-5), block(1e-1), table, shown)


# -- a verification of which a stage is not judged


@pytest.fixture(scope="module")
def unjudged(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report]:
    """A twin that does not run in float64 at one of its stages."""
    run = Run(tmp_path_factory.mktemp("unjudged"), converted(OPT).model)
    with pytest.MonkeyPatch.context() as patch:
        load = huggingface.load

        def loaded(*given: Any) -> huggingface.Loaded:
            made = load(*given)
            layer = made.model.vision_model.encoder.layers[2]
            layer.register_forward_pre_hook(only_float32, with_kwargs=True)
            return made

        patch.setattr(huggingface, "load", loaded)
        report = api.verify(run, figures=False)
    return run, report


def only_float32(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    given = args[0] if args else kwargs["hidden_states"]
    if given.dtype == torch.float64:
        raise RuntimeError("this layer has no float64")


STAGE = "vision.block.02"


def test_the_verdict_is_incomplete_with_what_is_missing_and_the_command(unjudged: tuple[Run, Report]):
    run, report = unjudged
    assert (report.verdict, report.status(), report.status("weights")) == ("incomplete", 4, 0)
    (missing,) = report.incomplete
    assert (missing.id, missing.proof) == ("stages", "behaviour")
    assert f"1 of {len(report.content.stages)} stages" in missing.words
    assert f"{STAGE} (RuntimeError: this layer has no float64)" in missing.words
    assert missing.words in raw(report)["summary"]
    assert raw(report)["complete_with"].startswith(f"blip2nb verify {run.model} --proof both")
    assert run.report.incomplete == report.incomplete
    (stage,) = [one for one in raw(report)["stages"] if not one["refereed"]]
    assert (stage["name"], stage["excess"], stage["rounding"]) == (STAGE, None, None)


def test_what_was_not_judged_is_shown_as_that(unjudged: tuple[Run, Report]):
    run, report = unjudged
    shown = api.show(run)
    assert "What is missing" in shown
    assert f"1 of {len(report.content.stages)}: {STAGE}" in shown
    assert "this layer has no float64" in report._repr_html_()
    rows = {row["name"]: row for row in page._stages(run.report.content)}
    assert rows[STAGE]["finding"] == "NOT JUDGED: its float64 run failed (RuntimeError: this layer has no float64)"
    assert (rows[STAGE]["times"], rows[STAGE]["wrong"]) == ("–", False)
    assert "1 stage is not judged" in plots.alt_text("depth_trace", report.content, report.arrays)
    drawn = plots.FIGURES["depth_trace"](run.report.content, run.report.arrays, width=7.0)
    assert [one.get_text() for one in drawn.axes[1].texts if one.get_text() == "not judged"] == ["not judged"]
    assert "not judged" in str(plots.table("stage_map", run.report.content, run.report.arrays))


def test_captions_that_differ_while_a_stage_is_not_judged_are_no_fault_yet():
    value = made_up_report(faults={"vision.block.04": 40.0})
    value["stages"][3] |= {"refereed": False, "referee_error": "memory ran out", "excess": None}
    value["captions"]["equal_when_fixed"] = False
    assert [one.id for one in not_judged(content(value | {"images": None}))] == ["stages", "captions"]
    value["stages"][3] |= {"excess": 1.0}
    assert not not_judged(content(value | {"images": None}))


# -- what else is missing


def test_a_cast_model_whose_source_is_gone_is_not_proven_by_its_weights(
    source_copy: Callable[[str], Path], tmp_path: Path, command: Callable[..., Outcome]
):
    source = source_copy(OPT)
    run = api.convert(OPT, source, tmp_path / "run" / "model", dtype="bfloat16")
    asked = ("verify", run.folder, "--proof", "weights", "--no-figures", "--json")
    assert command(*asked).status == 0
    shutil.rmtree(source)
    ended = command(*asked)
    report = json.loads(ended.out)
    assert (ended.status, raw(report)["verdict"]) == (4, "incomplete")
    assert [one["id"] for one in raw(report)["incomplete"]] == ["weights", "not_asked"]
    assert "their source is not here" in raw(report)["summary"]


def test_a_report_of_another_format_is_refused_in_one_sentence_and_made_again(
    unjudged: tuple[Run, Report], tmp_path: Path, command: Callable[..., Outcome]
):
    run = Run(Path(shutil.copytree(unjudged[0].folder, tmp_path / "run")), unjudged[0].model)
    path = run.folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1, "verdict": "weights_only"}))
    ended = command("show", run.folder)
    assert (ended.status, ended.out) == (2, "")
    assert f"has format 1; this version of blip2nb reads format {FORMAT}. Run `blip2nb verify` again." in ended.err
    verifying._forget_another_models(run)
    assert not path.exists()


def test_an_earlier_report_stays_only_while_it_is_of_the_model_as_it_stands(
    unjudged: tuple[Run, Report], tmp_path: Path
):
    folder = Path(shutil.copytree(unjudged[0].folder, tmp_path / "run"))
    model = Path(shutil.copytree(unjudged[0].model, tmp_path / "model", copy_function=shutil.copy2))
    verifying._forget_another_models(Run(folder, model))
    assert (folder / "report.json").is_file()
    (model / "generation_config.json").write_text("{}")
    verifying._forget_another_models(Run(folder, model))
    assert not (folder / "report.json").exists()


def test_a_sweep_ends_with_4_for_what_is_incomplete_unless_that_was_asked(unjudged: tuple[Run, Report]):
    def outcome(name: str, **more: Any) -> dict[str, Any]:
        return {
            "run_name": name, "model_name": OPT, "notebook": "convert", "state": "finished", "seconds": 1.0,
            "folder": name, **more,
        }  # fmt: skip

    def entry(name: str, proof: str, verdict: str = "incomplete") -> dict[str, Any]:
        content = json.loads((unjudged[0].folder / "report.json").read_text()) | {"verdict": verdict}
        return overview.summarise(outcome(name, parameters={"proof": proof}, verdict=verdict), content)

    asked, lacks, bad = entry("asked", "weights"), entry("lacks", "auto"), entry("bad", "auto", "diverges")
    lost = overview.summarise(outcome("asked", state="failed", folder=""))
    found = {
        status: Sweep("out", record(Index, overview.index(runs)))
        for status, runs in ((0, [asked]), (4, [asked, lacks]), (1, [lacks, bad]), (3, [lacks, bad, lost]))
    }
    assert {status: one.status for status, one in found.items()} == {0: 0, 4: 4, 1: 1, 3: 3}
    assert [found[status].index.state for status in (0, 4, 1, 3)] == ["good", "incomplete", "diverges", "failed"]
    assert "1 is not proven in full" in found[4].index.sentence
    suite = ElementTree.fromstring(overview.junit(found[4].index))
    skipped = {case.get("name"): case.find("skipped") for case in suite.iter("testcase")}
    assert skipped["asked"] is None
    assert "this layer has no float64" in str(skipped["lacks"].get("message"))
    assert suite.get("skipped") == "1"
    assert lacks["proofs"]["layers"]["words"].startswith(f"not judged: {STAGE}")
    assert "½" in overview.markdown(found[4].index)
    Read(overview.html(found[4].index))


# -- with less and less memory


class Starved:
    """`blip2nb verify` of a twin with so many bytes to spare; see starved.py."""

    def __init__(self, run: Run):
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("starved.py")), "-", "--", "verify", str(run.folder),
             "--no-figures"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, spare: int) -> bool:
        """Run it, check that it ends as it may, and say whether it came to its verdict."""
        path = self.run.folder / "report.json"
        path.unlink(missing_ok=True)
        self.process.stdin.write(f"{spare}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        ended = json.loads(self.process.stdout.readline())  # type: ignore[union-attr]
        verdict = self.run.report.verdict if path.exists() else None
        assert not list(self.run.folder.glob("*.partial"))
        if ended["status"] == 3:
            assert "blip2nb: Memory ran out" in ended["said"], ended
            assert verdict in (None, "explained")  # the report was whole, and its card or page was not made any more
        elif ended["status"] == 4:
            assert verdict == "incomplete"
            assert "memory ran out" in str(self.run.report.incomplete)
        elif verdict is not None:
            assert (ended["status"], verdict) == (0, "explained"), ended
        else:  # a native library ended the process, with a status of its own
            assert ended["status"] not in (0, 2), ended
        return ended["status"] == 0


@pytest.fixture
def starved(model_copy: Callable[[str], Run]) -> Iterator[Starved]:
    one = Starved(model_copy(OPT))
    yield one
    one.process.stdin.close()  # type: ignore[union-attr]
    assert one.process.wait(60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts mapped memory against RLIMIT_DATA")
def test_with_less_memory_than_it_takes_there_is_no_other_verdict(starved: Starved):
    """Where it begins to fail is found by halves, and the runs just short of it get furthest."""
    fails, works = 0, 128_000_000
    assert starved(works)
    while works - fails > 16_000_000:
        middle = (fails + works) // 2
        fails, works = (fails, middle) if starved(middle) else (middle, works)


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts mapped memory against RLIMIT_DATA")
def test_whatever_the_memory_there_is_no_other_verdict(starved: Starved):
    done = [starved(spare * 1_000_000) for spare in range(0, 160, 2)]
    assert not done[0]
    assert done[-1]
