"""Sweeps through real Dask, papermill and kernels: nothing is lost, nothing is done twice, nothing is half-written."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

import blip2nb
from blip2nb.errors import RequestError
from blip2nb.report.sweep import Outcome
from blip2nb.sweeps import cluster
from blip2nb.sweeps import sweep as sweeping
from blip2nb.sweeps.asked import expand
from blip2nb.sweeps.place import HIDDEN, RECORD, place

BIN = Path(sys.executable).parent

PROBE = """
import os, pathlib, time
def note(word):
    with open(os.environ["PROBE_LEDGER"], "a") as ledger:
        share = os.environ.get("BLIP2NB_CORES", "all")
        ledger.write(f"{word} {label} {time.time()} {os.getpid()} {share}\\n")
note("begins")
pathlib.Path(output_dir, run_name, "half.txt").write_text("half")
time.sleep(seconds)
if fault == "raise": raise ValueError("on purpose")
if fault == "die": os.kill(os.getpid(), 9)
pathlib.Path(output_dir, run_name, "whole.txt").write_text("whole")
note("ends")
"""


@pytest.fixture(autouse=True)
def _cores(monkeypatch):
    monkeypatch.setenv("BLIP2NB_CORES", "2")  # so that runs are beside each other, on whatever machine


class Probe:
    """A notebook that runs on a real kernel in about a second, and a ledger of who began and ended when."""

    def __init__(self, folder):
        self.folder, self.ledger = folder, folder / "ledger"
        self.path, self.output = folder / "probe.ipynb", folder / "out"
        self.write(PROBE)

    def write(self, body):
        declared = 'label: str = "a"\nseconds: float = 0.0\nfault: str = ""\ninput_file: str = ""\n'
        declared += 'output_dir: str = ""\nrun_name: str = ""'
        cells = [nbformat.v4.new_code_cell(declared, metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_markdown_cell("## At work"), nbformat.v4.new_code_cell(body)]
        spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), self.path)

    def list(self, *rows):
        """A list of runs: one for each label, or mapping with a label."""
        rows = [{"label": row} if isinstance(row, str) else row for row in rows]
        runs = [{"run_name": row["label"], "notebook": str(self.path), **row} for row in rows]
        path = self.folder / "runs.yaml"
        path.write_text(json.dumps(runs))
        return path

    def noted(self, word):
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return [line.split()[1] for line in lines if line.startswith(word)]

    def pids(self):
        return {int(line.split()[3]) for line in self.ledger.read_text().splitlines()}

    def wait_for(self, word, count):
        eventually(lambda: len(self.noted(word)) >= count)

    def whole(self):
        """The runs in the output folder; each is what it looks like."""
        found = []
        for path in self.output.iterdir():
            if path.is_dir() and path.name != HIDDEN and not path.name.endswith("--failed"):
                assert json.loads((path / RECORD).read_text())["state"] == "finished"
                assert (path / "whole.txt").read_text() == "whole"
                assert nbformat.read(path / "probe.ipynb", 4).cells[-1].execution_count
                found.append(path.name)
        return sorted(found)


def eventually(condition, patience=90):
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def alive(pids):
    def lives(pid):
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return set(filter(lives, pids))


@pytest.fixture
def probe(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_LEDGER", str(tmp_path / "ledger"))
    return Probe(tmp_path)


def sweep(probe, *rows, **how):
    return blip2nb.sweep(probe.list(*rows), output=probe.output, **how)


def states(found):
    return {run.run_name: run.state for run in found.runs}


def test_what_is_finished_is_known_by_what_it_was_made_of(probe, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("one")
    rows = [{"label": "a", "input_file": str(data)}, "b", "c"]
    first = sweep(probe, *rows)
    assert (first.status, states(first)) == (0, dict.fromkeys("abc", "finished"))
    assert probe.whole() == ["a", "b", "c"]
    assert not (probe.output / HIDDEN).exists()
    again = sweep(probe, *rows)
    assert all(run.earlier for run in again.runs)
    os.utime(data)  # touched, not changed
    sweep(probe, *rows)
    assert sorted(probe.noted("ends")) == ["a", "b", "c"]
    data.write_text("two")
    sweep(probe, *rows)
    assert sorted(probe.noted("ends")) == ["a", "a", "b", "c"]
    sweep(probe, rows[0], {"label": "b", "seconds": 0.1}, "c")
    assert sorted(probe.noted("ends")) == ["a", "a", "b", "b", "c"]
    (probe.output / "c" / RECORD).unlink()  # a folder of that name is not a finished run
    sweep(probe, "c")
    shutil.rmtree(probe.output / "c")
    sweep(probe, "c")
    assert probe.noted("ends").count("c") == 3
    notebook = nbformat.read(probe.path, 4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="ran by hand")]
    nbformat.write(notebook, probe.path)
    sweep(probe, "c")
    assert probe.noted("ends").count("c") == 3, "outputs are not what a notebook does"
    probe.write(f"{PROBE}\n1 + 1")
    sweep(probe, "c")
    assert probe.noted("ends").count("c") == 4


def test_a_run_that_fails_is_kept_and_stops_no_other(probe):
    rows = ["a", {"label": "b", "fault": "raise"}, {"label": "c", "fault": "die"}, "d"]
    found = sweep(probe, *rows)
    assert found.status == 3
    assert states(found) == {"a": "finished", "b": "failed", "c": "failed", "d": "finished"}
    assert probe.whole() == ["a", "d"]
    raised, died = (run for run in found.runs if run.state == "failed")
    assert raised.error == "ValueError: on purpose"
    assert "raise ValueError" in raised.traceback
    assert "\x1b" not in raised.traceback
    assert "kernel died" in died.error
    kept = nbformat.read(probe.output / raised.folder / raised.executed, 4)
    assert any(one.get("ename") == "ValueError" for cell in kept.cells for one in cell.get("outputs", []))
    for name in ("index.html", "summary.md", "junit.xml"):
        assert "on purpose" in (probe.output / name).read_text()
    mended = sweep(probe, "a", "b", "c", "d")
    assert mended.status == 0
    assert not list(probe.output.glob("*--failed"))
    assert probe.noted("ends").count("a") == 1


def test_a_run_that_hangs_is_ended_and_so_are_its_processes(probe):
    found = sweep(probe, {"label": "a", "seconds": 600}, "b", timeout="8s")
    assert states(found) == {"a": "failed", "b": "finished"}
    assert "Not finished after 8 s" in found.runs[0].error
    assert not alive(probe.pids())


BROKEN = """
import blip2nb
from safetensors.torch import load_file, save_file
run = blip2nb.convert("tiny-blip2-opt-2.7b", output_dir=output_dir, run_name=run_name)
if broken:
    weights = load_file(run.model / "model.safetensors")
    weights["query_tokens"] = weights["query_tokens"].flip(1).contiguous()
    save_file(weights, run.model / "model.safetensors", metadata={"format": "pt"})
report = blip2nb.verify(run, figures=False, proof=proof)
assert report.verdict in ("match", "explained", "incomplete"), report.content.summary
"""


REAL = ("right", {"label": "wrong", "broken": True}, {"label": "half", "proof": "weights"})


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory, warm_kernels):
    """A sweep of real conversions, one of them wrong, in a folder where one was converted by hand before."""
    folder = tmp_path_factory.mktemp("verdicts") / "für's Ganze"
    folder.mkdir()
    probe = Probe(folder)
    probe.write(BROKEN)
    notebook = nbformat.read(probe.path, 4)
    notebook.cells[0].source += "\nbroken: bool = False\nproof: str = 'auto'"
    nbformat.write(notebook, probe.path)
    run = blip2nb.convert("tiny-blip2-opt-2.7b", output_dir=probe.output, run_name="right")
    written = (run.model / "model.safetensors").stat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", warm_kernels)
        return probe, written, sweep(probe, *REAL)


def test_a_model_that_diverges_is_a_finding_and_not_a_failure(verdicts):
    probe, _, found = verdicts
    assert found.status == 1
    assert {run.run_name: (run.state, run.verdict) for run in found.runs} == {
        "right": ("finished", "explained"),
        "wrong": ("finished", "diverges"),
        "half": ("finished", "incomplete"),
    }
    assert {path.name for path in (probe.output / "wrong").iterdir()} >= {"report.json", "probe.ipynb", RECORD}
    again = sweep(probe, *REAL)
    assert (again.status, [run.earlier for run in again.runs]) == (1, [True, True, True])


def test_reports_are_kept_and_models_not_but_for_one_that_was_there_before(verdicts):
    probe, written, _ = verdicts
    assert not (probe.output / "wrong" / "model").exists()
    kept = (probe.output / "right" / "model" / "model.safetensors").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_what_a_run_says_of_its_place_is_where_it_lies(verdicts):
    probe, _, found = verdicts
    for name in ("right", "wrong", "half"):
        for path in (probe.output / name).glob("*.*"):
            assert HIDDEN.encode() not in path.read_bytes()
    assert found.address == str(probe.output)


def command(probe, *arguments, rows, **how):
    return subprocess.Popen(
        [BIN / "blip2nb", "sweep", probe.list(*rows), "--output", probe.output, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_ends_cleanly_and_goes_on_later(number, probe):
    rows = ["a", {"label": "b", "seconds": 600}, "c", {"label": "d", "seconds": 600}, "e"]
    running = command(probe, "--workers", 2, rows=rows)
    probe.wait_for("begins b", 0)
    eventually(lambda: {"b", "d"} <= set(probe.noted("begins")))
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(number)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 3
    assert "stopped; the same command goes on from here" in said
    assert "Traceback" not in said
    eventually(lambda: not alive({one.pid for one in family} | probe.pids()))
    index = json.loads((probe.output / "index.json").read_text())
    assert {run["run_name"] for run in index["runs"] if run["state"] == "not run"} >= {"b", "d"}
    before = probe.whole()
    ended = probe.noted("ends")
    quick = [{"label": row["label"], "seconds": 0.0} if isinstance(row, dict) else row for row in rows]
    assert sweep(probe, *quick).status == 0
    assert probe.whole() == ["a", "b", "c", "d", "e"]
    assert all(probe.noted("ends").count(name) == ended.count(name) for name in before)


def test_a_sweep_that_is_killed_leaves_no_process_and_no_half_run(probe):
    rows = ["a", {"label": "b", "seconds": 600}]
    running = command(probe, "--workers", 2, rows=rows)
    eventually(lambda: "a" in probe.noted("ends") and "b" in probe.noted("begins") and (probe.output / "a").exists())
    running.kill()
    running.wait()
    eventually(lambda: not alive(probe.pids()))
    assert probe.whole() == ["a"]
    found = sweep(probe, "a", "b")
    assert found.status == 0
    assert [run.earlier for run in found.runs] == [True, False]


def test_two_sweeps_on_one_folder_the_second_is_told_so(probe):
    running = command(probe, rows=[{"label": "a", "seconds": 600}])
    probe.wait_for("begins", 1)
    with pytest.raises(RequestError, match="Another sweep is writing to"):
        sweep(probe, "b")
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)


def workers_of(pid):
    """Dask's worker processes below a process."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between being listed and being asked
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_worker_that_is_killed_is_replaced_and_its_runs_are_made_again(probe):
    rows = [{"label": label, "seconds": 1.5} for label in "abcd"]
    running = command(probe, "--workers", 2, rows=rows)
    for killed in (2, 4):
        probe.wait_for("begins", killed)
        for one in workers_of(running.pid):
            one.kill()
    running.communicate(timeout=120)
    assert running.returncode == 0
    assert probe.whole() == ["a", "b", "c", "d"]
    index = json.loads((probe.output / "index.json").read_text())
    assert [run["run_name"] for run in index["runs"]] == ["a", "b", "c", "d"]
    assert not (probe.output / HIDDEN).exists()
    eventually(lambda: not alive(probe.pids()))


def test_a_run_that_costs_every_worker_takes_no_other_with_it(probe):
    """It kills the worker that made it, which is the parent of its notebook's process, each time."""
    probe.write(f"{PROBE}\nif fault == 'worker': os.kill(psutil.Process(os.getppid()).ppid(), 9); time.sleep(600)")
    notebook = nbformat.read(probe.path, 4)
    notebook.cells[-1].source = f"import psutil\n{notebook.cells[-1].source}"
    nbformat.write(notebook, probe.path)
    found = sweep(probe, {"label": "a", "fault": "worker"}, *"bcde", workers=2)
    assert states(found) == {"a": "failed", **dict.fromkeys("bcde", "finished")}
    assert "Every worker that began it was lost" in found.runs[0].error
    assert probe.whole() == ["b", "c", "d", "e"]


@pytest.fixture
def dask_cluster(tmp_path, probe):
    """A scheduler and two workers, as the commands of Dask start them. Gives the address and the workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [BIN / "dask", *words, "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
        )
        for words in (
            ["scheduler", "--host", "127.0.0.1", "--port", address.rsplit(":", 1)[1]],
            *[["worker", address, "--nthreads", "1", "--memory-limit", "4GB", "--no-nanny"]] * 2,
        )
    ]
    yield address, started[1:]
    for one in reversed(started):
        one.kill()
        one.wait()


def test_a_running_cluster_serves_and_may_lose_a_worker(dask_cluster, probe):
    address, workers = dask_cluster
    rows = [{"label": label, "seconds": 2} for label in "abcd"]
    running = command(probe, "--scheduler", address, rows=rows)
    probe.wait_for("begins", 2)
    workers[0].kill()
    said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert probe.whole() == ["a", "b", "c", "d"]
    eventually(lambda: not alive(probe.pids()))


def test_a_cluster_that_is_stopped_with_ends_its_runs(dask_cluster, probe):
    running = command(probe, "--scheduler", dask_cluster[0], rows=[{"label": "a", "seconds": 600}])
    probe.wait_for("begins", 1)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    eventually(lambda: not alive(probe.pids()))
    assert probe.whole() == []


def test_no_scheduler_is_one_sentence(probe):
    running = command(probe, "--scheduler", "tcp://127.0.0.1:9", rows=["a"])
    said = running.communicate(timeout=120)[1].strip().splitlines()
    assert running.returncode == 2
    assert said[-1].startswith("blip2nb: No Dask scheduler answers at tcp://127.0.0.1:9")


def test_runs_that_do_not_fit_beside_each_other_are_not_beside_each_other(probe):
    tasks = [sweeping._task(run, place(probe.output)) for run in expand([probe.list(*"abcd")])]
    needs = dict(zip("abcd", (int(cluster.memory() * share) for share in (0.7, 0.6, 0.2, 0.2)), strict=True))
    with place(probe.output).lock(), cluster.local(4) as client:
        done = list(cluster.run(client, tasks, needs, 2, lambda event: None, 4))
    assert {one.state for one in done} == {"finished"}
    spans, shares = {}, {}
    for line in probe.ledger.read_text().splitlines():
        word, label, at, _, shares[label] = line.split()
        spans.setdefault(label, {})[word] = float(at)
    assert shares == {"a": "2", "b": "2", "c": "1", "d": "1"}, "cores, by how many runs may be beside each"
    for _, at in [(label, span["begins"]) for label, span in spans.items()]:
        beside = sum(needs[label] for label, span in spans.items() if span["begins"] <= at <= span["ends"])
        assert beside <= cluster.memory()


def test_a_model_that_fits_nowhere_fails_alone_and_before_it_runs(probe):
    runs = expand(["blip2-flan-t5-xxl", "tiny-blip2-opt-2.7b"], parameters={"proof": "both"})
    need, small = (sweeping._Need.of(run, 24_000_000_000) for run in runs)
    assert re.fullmatch(
        r"Running blip2-flan-t5-xxl in float32 takes 61.1 GB of memory; the largest .* 24 GB\. Use .*", need.refused
    )
    assert not small.refused
    alone = sweeping._Need.of(expand(["blip2-flan-t5-xxl"])[0], 24_000_000_000)
    assert not alone.refused
    assert alone.memory < 2_000_000_000, "its weights alone are proven, which takes little"


def test_a_line_for_each_run_does_the_same_by_hand_and_can_be_gathered(probe):
    listed = probe.list("a", {"label": "it's", "run_name": "b"})
    printed = subprocess.run(
        [BIN / "blip2nb", "sweep", listed, "--output", probe.output, "--print"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(printed) == 2
    for name in "ab":
        (probe.output / name).mkdir()  # which the kit's own notebooks do themselves
    there = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    side_by_side = "tr '\\n' '\\0' | xargs -0 -P 2 -I{} sh -c '{}'"
    subprocess.run(side_by_side, shell=True, check=True, env=there, input="\n".join(printed), text=True)
    assert sorted(probe.noted("ends")) == ["a", "it's"]
    assert {path.name for path in probe.output.glob("*.ipynb")} == {"a.ipynb", "b.ipynb"}
    found = sweeping.gather(expand([listed]), probe.output)
    assert states(found) == {"a": "not run", "b": "not run"}, "they left no report"


@pytest.fixture
def ftp(tmp_path):
    """A real FTP server in a process of its own, writable, which ends a connection that is idle for a second: a place
    that is reached by address alone. Gives the address."""
    (tmp_path / "far").mkdir()
    log = tmp_path / "ftp.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "pyftpdlib", "-i", "127.0.0.1", "-p", "0", "-w", "-d", "far", "--timeout", "1"],
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        address = re.compile(r"FTP server on (\S+:\d+)")
        eventually(lambda: address.search(log.read_text()))
        yield f"ftp://{address.search(log.read_text())[1]}/sweep"
    finally:
        server.kill()
        server.wait()


def test_runs_can_be_left_at_an_address(ftp, probe, tmp_path):
    rows = ["a", {"label": "b", "fault": "raise"}]
    found = blip2nb.sweep(probe.list(*rows), output=ftp)
    assert states(found) == {"a": "finished", "b": "failed"}
    probe.output = tmp_path / "far" / "sweep"
    assert probe.whole() == ["a"]
    assert {path.name for path in probe.output.iterdir()} == {
        "a", "b--failed", "index.html", "index.json", "junit.xml", "summary.md",
    }  # fmt: skip
    again = blip2nb.sweep(probe.list("a", "b"), output=ftp)
    assert [run.earlier for run in again.runs] == [True, False]
    assert probe.whole() == ["a", "b"]
    assert not (probe.output / "b--failed").exists()


def test_a_run_that_was_cut_off_on_its_way_to_an_address_is_not_there(ftp, tmp_path):
    where = place(ftp)
    workshop = where.begin("a", "0" * 64)
    (workshop / "a" / "report.json").write_text("{}")
    (workshop / "a" / "zzz").symlink_to(tmp_path / "nowhere")
    (workshop / "a" / "yyy.txt").write_text("")
    os.chmod(workshop / "a" / "yyy.txt", 0o000)
    record = Outcome("a", "", "probe", {}, "0" * 64, "finished", folder="a")
    where.publish(workshop, "a", record)
    assert place(ftp).records() == {"a": record}
    (tmp_path / "far/sweep/a" / RECORD).unlink()
    assert place(ftp).records() == {}
    assert place(ftp).read("a/report.json") == b"{}"


def test_an_address_whose_server_ends_idle_connections_is_reached_again(ftp, tmp_path):
    where = place(ftp)
    for name in "ab":
        workshop = where.begin(name, "0" * 64)
        time.sleep(2)  # a run, for longer than the server's patience
        where.publish(workshop, name, Outcome(name, "", "probe", {}, "0" * 64, "finished", folder=name))
    assert set(where.records()) == {"a", "b"}
    time.sleep(2)
    where.write({"summary.md": "two"})
    assert (tmp_path / "far/sweep/summary.md").read_text() == "two"


def test_an_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(RequestError) as error:
        place("ftp://me:hunter2@127.0.0.1/sweep")
    assert "hunter2" not in str(error.value)
    with pytest.raises(RequestError, match="nosuch"):
        place("nosuch://bucket/sweep")
