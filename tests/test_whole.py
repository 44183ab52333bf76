"""Small files are there whole or not at all, and no report beside another's arrays, whenever a process is killed."""

import itertools
import os
import sys

import numpy as np
import psutil
import pytest

from blip2nb.errors import RequestError
from blip2nb.handles import Report, Run
from blip2nb.report.runs import Origin
from blip2nb.report.schema import Content
from blip2nb.sweeps.leftovers import note_processes
from blip2nb.whole import write_whole

REMOVED, RENAMED = "os.remove", "os.rename"


def killed_before_step(number, job):
    """Do a job in a process of its own that is killed before it removes or renames its nth file. Whether it was."""
    child = os.fork()
    if not child:
        steps = itertools.count(1)

        def look(event, arguments):
            if event in (REMOVED, RENAMED) and next(steps) == number:
                os._exit(9)

        sys.addaudithook(look)
        job()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def report(number):
    return Report(Content(verdict="match", seconds=number), {"number": np.full(3, number)})


def test_a_report_that_was_cut_off_is_never_beside_the_arrays_of_another(tmp_path):
    for number in itertools.count(1):
        report(1).save(tmp_path)
        killed = killed_before_step(number, lambda: report(2).save(tmp_path))
        if killed and not (tmp_path / "report.json").exists():
            with pytest.raises(RequestError, match="`blip2nb verify` writes one"):
                Report.load(tmp_path)
            continue
        found = Report.load(tmp_path)
        assert found.arrays["number"].tolist() == [found.content.seconds] * 3
        if not killed:
            break
    assert number > 3
    assert found.content.seconds == 2
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "arrays.safetensors"}


def test_what_a_run_remembers_and_its_processes_are_new_files_and_not_written_over(tmp_path):
    """What is written over is empty for a moment. Another name of the old file shows that it was left as it was."""
    run = Run(tmp_path, tmp_path / "model")
    writers = {
        "run.json": lambda: run.remember(Origin.of(tmp_path / "source")),
        "processes.json": lambda: note_processes(tmp_path, [psutil.Process()]),
    }
    for name, write in writers.items():
        (tmp_path / name).write_text("before", encoding="utf-8")
        os.link(tmp_path / name, tmp_path / "link")
        write()
        assert (tmp_path / "link").read_text(encoding="utf-8") == "before"
        (tmp_path / "link").unlink()
    assert run.source == str(tmp_path / "source")
    assert {path.name for path in tmp_path.iterdir()} == set(writers)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "page"
    write_whole(path, "é\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")  # no character at all
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]
