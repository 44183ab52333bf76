"""Kernels that are reached through sockets in a folder of one's own, where Jupyter would open TCP ports: those can be
reached by everybody on the machine, and ipykernel warns of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def traits(folder: str | Path) -> dict[str, str]:
    """What a `KernelManager` is to be given so that the sockets of its one kernel lie in `folder`, which must be empty
    of others. Nothing, and so TCP, where a socket's path would be longer than the system allows, or it has none."""
    import zmq

    connection = Path(folder).absolute() / "kernel.json"
    socket = connection.with_name("kernel-ipc-1")  # as jupyter_client names them
    if len(os.fsencode(socket)) > zmq.IPC_PATH_MAX_LEN:
        return {}
    return {"transport": "ipc", "connection_file": str(connection)}


def config(folder: str | Path) -> Any:
    """The same as a configuration, for `papermill.execute_notebook(..., config=config(folder))` and for nbclient."""
    from traitlets.config import Config

    return Config({"KernelManager": traits(folder)})


@contextlib.contextmanager
def private() -> Iterator[Any]:
    """Such a configuration, with a folder that only its owner may enter and that goes with the kernel."""
    with tempfile.TemporaryDirectory(prefix="blip2nb-", ignore_cleanup_errors=True) as folder:
        yield config(folder)
