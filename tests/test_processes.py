"""What the kit starts ends with the kit, however that ends; and its kernels open no port."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import Outcome

from blip2nb.errors import OutOfMemory
from blip2nb.lavis_env import kernels, sockets
from blip2nb.lavis_env.environment import Lavis, find_lavis
from blip2nb.sweeps import child

ROOT = Path(__file__).parent.parent
ENDLESS = """
import sys, time
print(sys.argv[1], file=sys.stderr, flush=True)
time.sleep(600)
"""


def gone(processes: list[psutil.Process], within: float = 5) -> bool:
    """A process that nobody has waited for yet is gone as well."""

    def lives(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it ended between the two questions
            return False

    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(map(lives, processes)):
            return True
        time.sleep(0.02)
    return False


def children(pid: int, what: str, within: float = 100) -> list[psutil.Process]:
    """What a process has started, once there is one among them with this in its command."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(pid).children(recursive=True)
            if any(what in " ".join(one.cmdline()) for one in found):
                return found
        time.sleep(0.02)
    raise AssertionError(f"no {what} was started")


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A request's folder with a recorder that says one word and goes on for ever."""
    folder = tmp_path / "request"
    folder.mkdir()
    shutil.copyfile(kernels._FILES["attended.py"], folder / "attended.py")
    (folder / "record_lavis.py").write_text(ENDLESS)
    return folder


@contextlib.contextmanager
def started(code: str, *given: object, **variables: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", code, *map(str, given)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_recorder_ends_with_an_error_from_whoever_listens_to_it(endless: Path, error: type[BaseException]):
    seen: list[psutil.Process] = []
    before = set(psutil.Process().children())  # what other tests have started

    def listen(sentence: str) -> None:
        assert sentence == "request.json"
        seen.extend(set(psutil.Process().children()) - before)
        raise error

    with pytest.raises(error):
        kernels._run_script(Lavis(Path(sys.executable), None), endless, listen)
    assert seen
    assert gone(seen)


def test_a_recorder_ends_with_a_caller_that_was_killed(endless: Path):
    """As where a kernel is closed, or the system ends it for want of memory: the caller can do nothing then."""
    code = (
        "import sys; from pathlib import Path; from blip2nb.lavis_env import environment, kernels\n"
        "python = environment.Lavis(Path(sys.executable), None)\n"
        "kernels._run_script(python, Path(sys.argv[1]), print)"
    )
    with started(code, endless) as caller:
        processes = children(caller.pid, "record_lavis.py")
        caller.kill()
        assert gone(processes)
        assert not endless.exists()


def test_a_recorder_started_by_hand_needs_nobody_who_holds_its_input(endless: Path):
    (endless / "record_lavis.py").write_text("print('recorded')")
    command = [sys.executable, "record_lavis.py", "request.json"]
    done = subprocess.run(command, cwd=endless, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert done.stdout == "recorded\n"


@pytest.mark.lavis
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_recording_that_was_ended(tmp_path: Path, number: signal.Signals):
    temporary, output = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from blip2nb.cli import main; main()"
    )
    given = ("capture", "tiny-blip2-opt-2.7b", "--output", output / "tape.safetensors")
    with started(code, *given, TMPDIR=str(temporary)) as caller:
        processes = children(caller.pid, "record_lavis.py")
        caller.send_signal(number)
        assert gone(processes)
        assert caller.wait(60) == (3 if number == signal.SIGINT else -number)
    assert not list(temporary.iterdir())
    assert not list(output.iterdir())


SESSION = """
import sys
from blip2nb.conversion.files import open_source
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.lavis_env.session import LavisSession
from blip2nb.variants import variant
LavisSession(find_lavis(), open_source(variant("tiny-blip2-opt-2.7b")), "twin")
print("ready", file=open(sys.argv[1], "w"), flush=True)
input()
"""


@pytest.mark.lavis
def test_a_recording_that_runs_out_of_memory_says_so_and_is_no_wrong_request(
    tmp_path: Path, command: Callable[..., Outcome]
):
    found = find_lavis()
    assert found is not None
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -v 600000\nexec {found.python} "$@"\n')
    python.chmod(0o755)
    tape = tmp_path / "tape.safetensors"
    ended = command("capture", "tiny-blip2-opt-2.7b", "--lavis-python", python, "--output", tape)
    assert ended.status == 3
    assert [line for line in ended.said if line.startswith("blip2nb: Memory ran out while LAVIS recorded")]
    assert {path.name for path in tmp_path.iterdir()} == {"python"}


def test_a_recorder_that_the_system_kills_ran_out_of_memory():
    with pytest.raises(OutOfMemory, match="LAVIS's process was killed"):
        kernels._refuse_without_memory("exit status -9", killed=True)
    kernels._refuse_without_memory("KeyError: 'model'")


@pytest.mark.lavis
def test_a_live_lavis_ends_with_its_caller_and_listens_at_no_port(tmp_path: Path):
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # short enough for sockets
    assert find_lavis() is not None, "run `make lavis` first: this test needs LAVIS itself"
    with started(SESSION, tmp_path / "ready", TMPDIR=str(temporary)) as caller:
        processes = children(caller.pid, "ipykernel_launcher")
        end = time.monotonic() + 200
        while not (tmp_path / "ready").exists() and time.monotonic() < end and caller.poll() is None:
            time.sleep(0.05)
        assert (tmp_path / "ready").exists()
        named = [json.loads(path.read_text(encoding="utf-8")) for path in temporary.rglob("kernel.json")]
        assert [one["transport"] for one in named if "transport" in one] == ["ipc"]
        caller.kill()
        assert gone(processes)
    shutil.rmtree(temporary)


# -- kernels through sockets


@pytest.fixture
def tells_transport(tmp_path: Path) -> Path:
    """A notebook that prints how its kernel is reached."""
    code = "import ipykernel, json\nprint(json.load(open(ipykernel.get_connection_file()))['transport'])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    return tmp_path / "in.ipynb"


def printed(executed: Path) -> str:
    return nbformat.read(executed, 4).cells[-1].outputs[0].text.strip()


@pytest.mark.parametrize(("length", "transport"), [(40, "ipc"), (120, "tcp")], ids=["short", "too_long"])
def test_papermill_of_ours_opens_no_port_where_a_path_can_be_short_enough(
    tells_transport: Path, length: int, transport: str
):
    outer = Path(tempfile.mkdtemp(dir="/tmp"))
    temporary = outer / "t".ljust(length - len(str(outer)) - 1, "t")
    temporary.mkdir()
    executed = tells_transport.with_name("out.ipynb")
    command = [sys.executable, "-m", "blip2nb.lavis_env.papermill", tells_transport, executed, "--log-level", "ERROR"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed(executed) == transport
    assert ("TCP" in done.stderr) == (transport == "tcp")
    assert not list(temporary.glob("blip2nb-*"))
    shutil.rmtree(outer)


def test_a_run_of_a_sweep_opens_no_port(tells_transport: Path, capfd: pytest.CaptureFixture[str]):
    executed = tells_transport.with_name("out.ipynb")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        asked = {"input": str(tells_transport), "output": str(executed), "folder": "", "parameters": {}}
        assert child.execute({**asked, "sockets": folder}, lambda **event: None) == {"done": True}
        assert not os.listdir(folder)
    assert printed(executed) == "ipc"
    assert "TCP" not in capfd.readouterr().err


def test_what_make_runs_opens_no_port():
    assert "/papermill " not in (ROOT / "Makefile").read_text()


def test_sockets_are_their_owners_alone():
    with sockets.private() as config:
        folder = Path(config.KernelManager.connection_file).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
