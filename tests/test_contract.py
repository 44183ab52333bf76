"""What others build on stays as it is: where one of these fails, somebody's scripts, notebooks or models may, too.

A change that is meant goes into tests/contract/ with `python tests/contract.py`, and into the changelog.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import contract
import pytest

from blip2nb import Run


def test_commands_and_their_options():
    assert contract.commands() == contract.read("commands")


def test_parameters_of_the_notebooks():
    assert contract.notebooks() == contract.read("notebooks")


def test_exit_statuses_and_the_keys_of_what_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", os.fspath(tmp_path / "hub"))
    agreed = contract.read("json")
    for name, found in contract.statuses_and_json(tmp_path):
        assert (name, found) == (name, agreed.pop(name))
    assert not agreed


def test_verdicts_and_tensors_of_the_twins(converted: Callable[[str], Run], tmp_path: Path):
    agreed = contract.read("twins")
    for name, found in contract.twins(converted, tmp_path):
        assert (name, found) == (name, agreed.pop(name))
    assert not agreed


@pytest.mark.parametrize("name", [contract.OPT, contract.T5])
def test_how_often_a_sample_of_faults_is_found_and_called_by_its_name(name: str, converted: Callable[[str], Run]):
    assert contract.rate(name, contract.bench_of(converted(name))) == contract.read("rates")[name]
