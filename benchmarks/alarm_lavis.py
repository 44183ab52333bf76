"""A process of LAVIS's environment that `false_alarms` has record twins and blocks; it runs `lavis_side`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.process import BenchmarkError
from benchmarks.processors import SETTINGS
from blip2nb.conversion.files import open_source
from blip2nb.lavis_env import kernels
from blip2nb.lavis_env.environment import find_lavis
from blip2nb.variants import TWINS, variant

Ask = Callable[..., dict[str, Any]]
"""Takes a job's fields, gives what LAVIS's side answered when the job was done."""

OLD_PROCESSOR = SETTINGS["default"]
"""What makes MKL, PyTorch and oneDNN compute with the instructions that every x86 processor has."""


@contextlib.contextmanager
def lavis_side(folder: Path, old: bool = False) -> Iterator[Ask]:
    """A process of LAVIS's environment: call what this yields with a job's fields, and it is done when that returns.

    Args:
        old: have it compute as on a processor of another kind, without wide vectors, which adds up in another order.

    Raises:
        BenchmarkError: there is no such environment, or LAVIS failed.
    """
    environment = find_lavis()
    if environment is None:
        raise BenchmarkError("This needs LAVIS's environment: make lavis.")
    folder.mkdir(exist_ok=True)
    kernels.prepare(folder / "recorder", open_source(variant(TWINS[0])), "twin")
    command = [str(environment.python), "-W", "ignore", str(Path(__file__).with_name("lavis_side.py"))]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    variables |= OLD_PROCESSOR if old else {}
    variables.pop("PYTHONPATH", None)
    with (
        (folder / "lavis.log").open("w+") as log,
        subprocess.Popen(
            [*command, str(folder / "recorder")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(**job: Any) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                log.seek(0)
                raise BenchmarkError(f"LAVIS failed: {log.read()[-2000:]}")
            return json.loads(answer)

        yield ask
        process.stdin.close()
