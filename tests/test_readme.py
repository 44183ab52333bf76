"""What the README shows is what happens."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from records import raw

import blip2nb
from blip2nb.display.text import describe

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks_after(marker: str) -> list[str]:
    """The indented blocks behind a marker, without their indentation."""
    rest = README.split(marker, 1)[1]
    return [textwrap.dedent(block).strip() for block in re.findall(r"(?:^    .*\n|^\n)+", rest, re.M) if block.strip()]


def test_a_model_with_two_faults_gets_the_answer_that_is_shown(tmp_path: Path):
    code, shown = blocks_after("<!-- this example is run by the tests -->")[:2]
    code = code.replace('run_name="two-faults"', 'run_name="two-faults", output_dir=folder')
    code = code.replace("verify(run)", "verify(run, figures=False)")
    space: dict[str, Any] = {"folder": tmp_path}
    exec(code, space)
    report = space["run"].report
    assert report.verdict == "diverges"
    assert {fault["causes"][0]["id"] for fault in raw(report)["faults"]} == {"transposed", "activation"}
    told = describe(blip2nb.Run(tmp_path / "two-faults", tmp_path / "two-faults" / "model"))
    for line in shown.splitlines():
        assert _without_digits(line) in _without_digits(told), line


def _without_digits(text: str) -> str:
    """Another processor rounds otherwise: of measured numbers only that they are there."""
    return re.sub(r"\d\.\d+e[+-]\d+", "#", re.sub(r"[ \n]+", " ", text)).strip()
