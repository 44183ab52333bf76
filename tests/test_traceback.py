"""Where an exception becomes a sentence or a value, --verbose still shows where it came from."""

import logging

from blip2nb import forms
from blip2nb.catalogue import bench
from blip2nb.catalogue.bench import Bench
from blip2nb.catalogue.cases import Broken
from blip2nb.weights import download


def fails(*arguments, **named):
    raise OSError("the cause")


def logged(caplog):
    return [record for record in caplog.records if record.exc_info and str(record.exc_info[1]) == "the cause"]


def test_a_server_that_does_not_answer_gives_no_size_and_a_traceback(caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.DEBUG, "blip2nb")
    monkeypatch.setattr(download, "_announced_size", fails)
    part = download.Part("eva_vit_g.pth", tmp_path / "eva_vit_g.pth", "", None, False, "https://example.org")
    assert download.remote_size(part) is None
    assert logged(caplog)


def test_a_diagnosis_that_stops_is_no_answer_and_a_traceback(caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.DEBUG, "blip2nb")
    monkeypatch.setattr(bench, "findings", fails)
    broken = object.__new__(Bench)
    vars(broken).update(tape=None, source=lambda: None)
    assert broken.findings(Broken(tmp_path, None, {})) == ((), "OSError: the cause")
    assert logged(caplog)


def test_an_unexpected_error_says_how_to_see_more(command, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, "blip2nb")
    monkeypatch.setattr(forms, "dumps", fails)
    ended = command("variants", "--json")
    assert ended.status == 3
    assert "unexpected OSError: the cause. Please report this" in ended.err
    assert "`blip2nb --verbose" in ended.err
    assert logged(caplog)
