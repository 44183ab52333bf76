"""What the suite starts hears Ctrl-C, also in the background of a script, where SIGINT is ignored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()

# As a shell without job control starts a command behind an `&`
STARTS = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
import interrupts
if sys.argv[2] == "heard":
    interrupts.heard()
subprocess.run([sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"])
"""


def ignores(how: str) -> bool:
    command = [sys.executable, "-c", STARTS, str(Path(__file__).parent), how]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_what_the_suite_starts_hears_ctrl_c_also_in_the_background_of_a_script() -> None:
    assert ignores("as it is")
    assert not ignores("heard")
    assert "\ninterrupts.heard()\n" in CONFTEST
