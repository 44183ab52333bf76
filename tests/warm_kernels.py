"""Jupyter kernels that begin with PyTorch and transformers imported: each is forked from one process that has imported
them. They are ipykernel's own kernels otherwise, with the working folder, environment and streams that Jupyter gave.

    python warm_kernels.py SOCKET                          # that process
    python warm_kernels.py SOCKET -f CONNECTION_FILE       # what a kernel's specification starts
"""

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Give what JUPYTER_PATH should be for notebooks to begin on such kernels."""
    address, specification = folder / "socket", folder / "kernels" / "python3" / "kernel.json"
    specification.parent.mkdir(parents=True)
    command = [sys.executable, "-S", __file__, str(address), "-f", "{connection_file}"]
    specification.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    with subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield str(folder)
        finally:
            server.kill()


def _serve(address: str) -> None:
    import ipykernel.kernelapp  # noqa: F401
    import torch
    from transformers import AutoProcessor, Blip2ForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or the first collection in each kernel would copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            asking, _ = listening.accept()
            if not os.fork():
                listening.close()
                _become_kernel(asking)
            asking.close()


def _become_kernel(asking: socket.socket) -> None:
    from ipykernel.kernelapp import IPKernelApp

    said, streams, *_ = socket.recv_fds(asking, 1 << 20, 3)
    request = json.loads(said)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.pop("JPY_PARENT_PID", None)  # it has another parent; it listens to whoever asked for it instead
    os.chdir(request["folder"])
    threading.Thread(target=_end_with, args=(asking,), daemon=True).start()
    try:
        IPKernelApp.launch_instance(argv=request["arguments"])
    finally:
        atexit._run_exitfuncs()
        os._exit(0)


def _end_with(asking: socket.socket) -> None:
    while asking.recv(1):
        pass
    os._exit(1)


def _ask(address: str, arguments: list[str]) -> None:
    request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        server.recv(1)  # until the kernel ends


if __name__ == "__main__":
    if sys.argv[2:]:
        _ask(sys.argv[1], sys.argv[2:])
    else:
        _serve(sys.argv[1])
