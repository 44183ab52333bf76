"""Conversions that are killed, stopped, resumed, or run two at once: each brought about for real, at every moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import transformers  # noqa: F401 (or every conversion would start a process for its configuration)
from conftest import Outcome, contents, edit_weights, flip, overwrite, snapshot
from forks import Forks, Large, ended_midway, noted, one_sentence

from blip2nb import api
from blip2nb.conversion.directory import check_model
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.variants import variant
from blip2nb.weights.writer import JOURNAL, clear_away, unfinished_directory

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


# -- killed at any moment


def loadable(folder: Path) -> bool:
    """Whether `from_pretrained` would find a model there: a configuration, and weights with their index."""
    names = {path.name for path in folder.iterdir()}
    return "config.json" in names and bool(names & {"model.safetensors", "model.safetensors.index.json"})


def check_killed(output: Path, whole: dict[str, bytes]) -> None:
    """A killed run left its work hidden, or all of it; and nothing that would load is not the whole."""
    assert {path.name for path in output.iterdir()} <= {".model.partial", ".model.lock", "model", "run.json"}
    for folder in (path for path in output.iterdir() if path.is_dir()):
        if folder.name == "model" or loadable(folder):
            held = contents(folder)
            held.pop(JOURNAL, None)
            assert {name: data for name, data in held.items() if name in whole} == held
            assert {name for name in whole if name.endswith(".safetensors")} <= set(held)
    if (output / "model").exists():
        assert contents(output / "model") == whole


def check_resumed(ended: Outcome, output: Path, whole: dict[str, bytes]) -> None:
    assert ended.status == 0, ended.err
    assert contents(output / "model") == whole
    left = {path.name for path in output.iterdir()} - {"model", "run.json"}
    assert left == set()


def test_killed_at_any_moment_and_run_again_the_result_is_the_same_bytes(tmp_path: Path, forks: Forks, large: Large):
    """Fifty kills, alone and several in a row."""
    moments, longest = random.Random(0), 0.9 * large.seconds
    killed = found = attempt = 0
    while killed < 50:
        output = tmp_path / str(attempt)
        stood = False
        for _ in range(1 if attempt % 2 else 5):
            pid = forks.start(*large.request(output))
            time.sleep(moments.uniform(0.02, longest))
            os.kill(pid, signal.SIGKILL)
            if forks.wait(pid).status == -signal.SIGKILL:
                killed += 1
            else:  # it was done before: this machine is faster now
                longest *= 0.9
            if output.exists():
                check_killed(output, large.whole)
            stood = (output / "model").exists()
            if stood:
                break
        done = len(noted(output))
        ended = forks.run(*large.request(output))
        found += bool(done) and f"going on with an interrupted run: {done} tensors" in ended.err
        check_resumed(ended, output, large.whole)
        shutil.rmtree(output)
        attempt += 1
    assert found >= 5, "hardly any run found what the one before it had done: this test would prove little"


def test_killed_before_any_single_step_and_run_again_the_result_is_the_same_bytes(
    tmp_path: Path, forks: Forks, converted: Callable[[str], Run]
):
    """Every file that is opened, renamed, removed: the kill comes just before it. Moments that chance rarely finds."""
    request = ("convert", OPT, "--max-shard-size", "500KB", "--output")
    (tmp_path / "whole").mkdir()
    listed = tmp_path / "steps"
    ended = forks.run(*request, tmp_path / "whole" / "model", below=str(tmp_path / "whole"), steps=str(listed))
    assert ended.status == 0, ended.err
    whole = contents(tmp_path / "whole" / "model")
    steps = listed.read_text().splitlines()
    different = [number for number, step in enumerate(steps) if step not in steps[:number]]
    assert len(different) > 20
    for number in different:
        output = tmp_path / str(number)
        output.mkdir()
        ended = forks.run(*request, output / "model", below=str(output), die_before=number)
        assert ended.status in (-signal.SIGKILL, 0)  # threads take their steps in another order each time
        check_killed(output, whole)
        check_resumed(forks.run(*request, output / "model"), output, whole)
        shutil.rmtree(output)


def test_killed_while_an_old_model_is_replaced_the_old_or_the_new_is_there(tmp_path: Path, forks: Forks):
    request = ("convert", OPT, "--overwrite", "--output")
    for name, more in (("old", ["--dtype", "bfloat16"]), ("new", [])):
        assert forks.run(*request, tmp_path / name / "model", *more).status == 0
    old, new = (contents(tmp_path / name / "model") for name in ("old", "new"))
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    listed = tmp_path / "steps"
    ended = forks.run(*request, tmp_path / "counted" / "model", below=str(tmp_path / "counted"), steps=str(listed))
    assert ended.status == 0, ended.err
    steps = listed.read_text().splitlines()
    first = next(n for n, step in enumerate(steps) if step.startswith("os.rename") and step.endswith("/model"))
    between = 0
    for number in range(first - 2, len(steps)):
        output = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", output)
        forks.run(*request, output / "model", below=str(output), die_before=number)
        if (output / "model").exists():
            assert contents(output / "model") in (old, new)
        else:
            between += 1
            assert contents(output / ".model.old") == old
            with contextlib.suppress(RequestError), unfinished_directory(output / "model", ""):
                raise RequestError("refused")  # the next run does not get to its end
            assert contents(output / "model") == old, "the old model did not come back"
        ended = forks.run(*request, output / "model")
        assert ended.status == 0, ended.err
        assert contents(output / "model") == new
        assert not {path.name for path in output.iterdir()} & {".model.partial", ".model.old", ".model.lock"}
    assert between >= 1


def test_what_a_kill_after_the_last_step_leaves_beside_the_model_can_be_cleared_away(tmp_path: Path):
    for name in ("model", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / ".model.lock").touch()
    with unfinished_directory(tmp_path / "other", "") as work:
        (work.folder / "config.json").write_text("other")
        clear_away(tmp_path / "other")  # another's, which is being written: left alone
        assert (tmp_path / ".other.lock").exists()
    clear_away(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other"}


def test_nothing_of_a_killed_run_goes_on_writing(tmp_path: Path, forks: Forks):
    """Where transformers is not loaded, another process writes the configuration, and the kill does not reach it."""
    output = tmp_path / "output"
    request = ("convert", OPT, "--output", output / "model")
    begun = subprocess.Popen([sys.executable, "-m", "blip2nb.cli", *map(str, request)], stderr=subprocess.DEVNULL)
    others: list[psutil.Process] = []
    while not others and begun.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one may end between being listed and being asked
            children = psutil.Process(begun.pid).children()
            others = [child for child in children if "".join(child.cmdline()).endswith("captioners.configuration")]
    for other in others:
        other.suspend()  # so that it is still there when the next run ends; without it, this one cannot
    while not noted(output) and begun.poll() is None:
        time.sleep(0.001)
    assert others
    assert begun.poll() is None
    begun.kill()
    begun.wait()
    assert forks.run(*request, "--dtype", "bfloat16").status == 0
    for other in others:
        other.resume()
    psutil.wait_procs(others, timeout=20)
    assert {path.name for path in output.iterdir()} == {"model"}
    assert check_model(output / "model", None) == []
    assert json.loads((output / "model" / "config.json").read_text())["dtype"] == "bfloat16"


# -- resumed work is not trusted


def spot(output: Path, name: str) -> tuple[Path, int, int]:
    """The file of an unfinished run that holds a tensor, where in it the tensor begins, and its bytes."""
    for path in (output / ".model.partial").glob("*.safetensors*"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length else {}
        if name in header:
            begin, end = header[name]["data_offsets"]
            return path, 8 + length + begin, end - begin
    raise AssertionError(f"{name} is in none of them")


def zeros(path: Path, at: int, size: int) -> None:
    overwrite(path, at, bytes(size))


DAMAGE: dict[str, Callable[[Path, list[dict]], object]] = {
    "a_flipped_bit": lambda output, done: [
        flip(path, at + size // 2) for path, at, size in (spot(output, one["target"]) for one in done[:3])
    ],
    "zeros_where_the_journal_says_done": lambda output, done: [zeros(*spot(output, one["target"])) for one in done],
    "a_shard_that_is_gone": lambda output, done: spot(output, done[0]["target"])[0].unlink(),
    "a_shard_cut_short": lambda output, done: os.truncate(spot(output, done[0]["target"])[0], 100),
    "a_garbled_header": lambda output, done: overwrite(spot(output, done[0]["target"])[0], 0, bytes(64)),
    "a_torn_last_line": lambda output, done: cut_journal(output, -40),
    "a_last_line_without_its_end": lambda output, done: cut_journal(output, -1),
    "a_last_line_of_zeros": lambda output, done: add_to_journal(output, bytes(300)),
    "half_a_line_more": lambda output, done: add_to_journal(output, b'{"target": "vision_mod'),
    "a_line_of_something_else": lambda output, done: add_to_journal(output, b"7\n"),
    "a_torn_first_line": lambda output, done: cut_journal(output, 30),
    "a_flipped_bit_in_what_the_journal_says": lambda output, done: flip(
        output / ".model.partial" / JOURNAL,
        (output / ".model.partial" / JOURNAL).read_bytes().index(done[2]["written"].encode()) + 20,
    ),
    "an_empty_journal": lambda output, done: cut_journal(output, 0),
    "a_manifest_and_an_index_of_before": lambda output, done: [
        (output / ".model.partial" / name).write_text("{}") for name in ("blip2nb.json", "model.safetensors.index.json")
    ],
}


def cut_journal(output: Path, size: int) -> None:
    path = output / ".model.partial" / JOURNAL
    path.write_bytes(path.read_bytes()[:size])


def add_to_journal(output: Path, data: bytes) -> None:
    with open(output / ".model.partial" / JOURNAL, "ab") as file:
        file.write(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_an_interrupted_run_left_is_read_back_before_it_is_kept(
    tmp_path: Path, forks: Forks, large: Large, damage: str
):
    ended_midway(forks, large.request(tmp_path), tmp_path, signal.SIGKILL)
    done = noted(tmp_path)
    assert len(done) >= 20
    DAMAGE[damage](tmp_path, done)
    if "line" in damage and "first" not in damage:  # what is noted from here on must be found again
        ended_midway(forks, large.request(tmp_path), tmp_path, signal.SIGKILL, len(done) + 10)
        assert len(noted(tmp_path)) > len(done) + 5
    ended = forks.run(*large.request(tmp_path))
    check_resumed(ended, tmp_path, large.whole)
    anew = damage in ("a_torn_first_line", "an_empty_journal")
    assert ("starting anew" in ended.err) == anew
    assert ("going on with an interrupted run" in ended.err) == (not anew)


def test_an_interrupted_run_of_something_else_is_not_gone_on_with(tmp_path: Path, forks: Forks, large: Large):
    other = large.request(tmp_path, "--dtype", "float32")
    ended_midway(forks, other, tmp_path, signal.SIGKILL)
    ended = forks.run(*large.request(tmp_path))
    assert "starting anew" in ended.err
    check_resumed(ended, tmp_path, large.whole)


def test_a_source_that_changed_since_is_begun_anew(tmp_path: Path, forks: Forks, large: Large):
    source = shutil.copytree(large.source, tmp_path / "source")
    output = tmp_path / "output"
    request = dataclasses.replace(large, source=source).request(output)
    ended_midway(forks, request, output, signal.SIGKILL)
    done = noted(output)
    assert done
    edit_weights(source / variant(OPT).checkpoint, lambda tensors: tensors[NORM].add_(1))
    changed = next(name for one in done for name in one["read"])
    edit_weights(
        source / "eva_vit_g.pth",
        lambda tensors: tensors[changed.removeprefix("visual_encoder.")].add_(1),  # of just the same size
    )
    ended = forks.run(*request)
    assert ended.status == 0, ended.err
    assert "starting anew" in ended.err
    fresh = api.convert(OPT, source, tmp_path / "fresh" / "model", max_shard_size="4MB")
    assert contents(output / "model") == contents(fresh.model)
    assert contents(output / "model") != large.whole


# -- stopped by the user


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_kept_hidden_and_gone_on_with(tmp_path: Path, forks: Forks, large: Large, number: int):
    ended = ended_midway(forks, large.request(tmp_path), tmp_path, number)
    assert "Traceback" not in ended.err
    if number == signal.SIGINT:
        assert ended.status == 3
        assert {path.name for path in tmp_path.iterdir()} == {".model.partial"}
    else:
        assert ended.status == -signal.SIGTERM
        assert {path.name for path in tmp_path.iterdir()} == {".model.partial", ".model.lock"}
    done = len(noted(tmp_path))
    assert done >= 20
    ended = forks.run(*large.request(tmp_path))
    assert f"going on with an interrupted run: {done} tensors" in ended.err
    check_resumed(ended, tmp_path, large.whole)


def test_stopping_it_again_and_again_does_no_harm(tmp_path: Path, forks: Forks, large: Large):
    moments = random.Random(0)
    for attempt in range(6):
        output = tmp_path / str(attempt)
        pid = forks.start(*large.request(output))
        time.sleep(moments.uniform(0.2, 0.9) * large.seconds)
        for _ in range(5):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.001)
        stopped = forks.wait(pid)
        stood = (output / "model").exists()
        assert stopped.status or stood
        if output.exists():
            check_killed(output, large.whole)
        check_resumed(forks.run(*large.request(output)), output, large.whole)
        shutil.rmtree(output)


def test_ctrl_c_never_makes_the_threads_wait_for_each_other(forks: Forks):
    ended = forks.run("@work_that_is_interrupted", 400)
    assert ended.status == 0, ended.err
    assert int(ended.out) > 40, "it was hardly ever interrupted while it worked: this test would prove little"


def test_ctrl_c_in_a_terminal_reaches_every_process_and_the_next_run_goes_on(
    tmp_path: Path, forks: Forks, large: Large
):
    """As a shell and Jupyter's Stop send it: to the whole group, the process that writes the configuration included."""
    command = [sys.executable, "-m", "blip2nb.cli", *map(str, large.request(tmp_path))]
    begun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 60
    while not noted(tmp_path) and time.monotonic() < until:
        time.sleep(0.001)
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == 3, said
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {".model.partial"}
    ended = forks.run(*large.request(tmp_path))
    assert "going on with an interrupted run" in ended.err
    check_resumed(ended, tmp_path, large.whole)


# -- two at once


def test_of_two_runs_on_one_output_one_wins_and_the_other_is_told(tmp_path: Path, forks: Forks, large: Large):
    """The first is held up while the second begins."""
    pid = forks.start(*large.request(tmp_path))
    while not (tmp_path / ".model.partial").exists():
        time.sleep(0.0005)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert not (tmp_path / "model").exists(), "it was done too soon"
        said = one_sentence(forks.run(*large.request(tmp_path)))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert f"Another run is writing {tmp_path / 'model'} now" in said
    assert "Wait until it has finished, or name another output" in said
    assert forks.wait(pid).status == 0
    assert contents(tmp_path / "model") == large.whole
    there = snapshot(tmp_path / "model")
    ended = forks.run(*large.request(tmp_path))
    assert ended.status == 0
    assert "already holds this conversion" in ended.err
    assert snapshot(tmp_path / "model") == there
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run.json"}


def test_runs_that_begin_together_leave_one_whole_model(tmp_path: Path, forks: Forks, large: Large):
    refused = 0
    for attempt in range(5):
        output = tmp_path / str(attempt)
        pids = [forks.start(*large.request(output)) for _ in range(3)]
        ended = [forks.wait(pid) for pid in pids]
        assert 0 in [one.status for one in ended]
        for one in ended:
            if one.status:
                assert "Another run is writing" in one_sentence(one)
                refused += 1
        assert contents(output / "model") == large.whole
        assert {path.name for path in output.iterdir()} == {"model", "run.json"}
        shutil.rmtree(output)
    assert refused, "they were never there together: this test would prove nothing"
