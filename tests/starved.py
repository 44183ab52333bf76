"""The command line with less and less memory: `python tests/starved.py SPARE ... -- verify RUN`.

The command is run once for each SPARE; for "-" they are read from stdin, one a line. Each run is a fork of one process
that has everything imported, and may take SPARE bytes more than that has: cold processes would spend most of their
time on importing torch. Prints a line of JSON for each: spare, status (negative for a signal) and said, what it wrote.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoProcessor, Blip2ForConditionalGeneration  # noqa: F401, which would take memory later

from blip2nb import api, cli  # noqa: F401
from blip2nb.proof import verify  # noqa: F401


def held() -> int:
    """Bytes that count against RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData:")))


def run(spare: int, arguments: list[str]) -> dict[str, object]:
    """Fork, and run the command with so many bytes to spare."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            status = 70  # whatever happens, this child returns nowhere
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                limit = held() + spare
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
                sys.argv = ["blip2nb", *arguments]
                cli.main()
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    return {"spare": spare, "status": os.waitstatus_to_exitcode(ended), "said": text[-2000:]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    at = sys.argv.index("--")
    for line in sys.argv[1:at] if sys.argv[1:at] != ["-"] else sys.stdin:
        print(json.dumps(run(int(line), sys.argv[at + 1 :])), flush=True)
