"""Python processes that begin with what takes long to import: each is forked from one process that has imported it, and
has the arguments, working folder, environment and streams of whoever started it.

    python warm.py SOCKET lavis.models          # that process, with the modules that it imports
    python warm.py SOCKET -c "print(1)"         # what stands for `python -c "print(1)"`, `python -m …`, `python FILE`
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KERNELS = "ipykernel.kernelapp torch transformers.models.blip_2.modeling_blip_2 transformers.models.auto"
LAVIS = "torch transformers lavis.models lavis.models.blip2_models.blip2_opt lavis.models.blip2_models.blip2_t5"


@contextmanager
def python(executable: str | Path, modules: str, folder: Path) -> Iterator[Path]:
    """Give a command that stands for this Python: its processes begin with these modules."""
    address, command = folder / "socket", folder / "python"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {address} "$@"\n')
    command.chmod(0o755)
    with subprocess.Popen([executable, __file__, str(address), *modules.split()], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield command
        finally:
            server.kill()


def kernel(command: Path, name: str) -> Path:
    """Make it a kernel, and give what has to be in JUPYTER_PATH."""
    specification = command.parent / "kernels" / name / "kernel.json"
    specification.parent.mkdir(parents=True)
    start = [str(command), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    shown = "Python 3 (ipykernel)" if name == "python3" else name
    specification.write_text(json.dumps({"argv": start, "display_name": shown, "language": "python"}))
    return command.parent


def _serve(address: str, modules: list[str]) -> None:
    for module in modules:
        __import__(module)
    sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()  # or the first collection in each process would copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        os.write(1, b"ready\n")
        while True:
            asking, _ = listening.accept()
            if not os.fork():
                listening.close()
                _become(asking)
            asking.close()


def _become(asking: socket.socket) -> None:
    said, streams, *_ = socket.recv_fds(asking, 1 << 20, 3)
    request = json.loads(said)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    threading.Thread(target=_end_with, args=(asking,), daemon=True).start()
    status = 0
    try:
        _run(request["arguments"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    asking.send(bytes([status]))
    os._exit(status)


def _run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does."""
    while arguments[0] == "-W":
        arguments = arguments[2:]
    kind, *rest = arguments
    sys.path[0] = "" if kind in ("-m", "-c") else os.path.dirname(os.path.abspath(kind))
    sys.argv = arguments if kind not in ("-m", "-c") else [kind, *rest[1:]]
    if rest[:1] == ["ipykernel_launcher"]:  # which read who its parent is when it was imported
        sys.argv.append(f"--IPKernelApp.parent_handle={os.getppid()}")
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def _end_with(asking: socket.socket) -> None:
    """Ctrl-C there is Ctrl-C here, and the end there the end here."""
    while asking.recv(1):
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(1)


def _ask(address: str, arguments: list[str]) -> int:
    request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        signal.signal(signal.SIGINT, lambda number, frame: server.send(b"i"))
        return (server.recv(1) or b"\xff")[0]  # when it has ended; of one that was killed nothing comes


if __name__ == "__main__":
    if os.path.exists(sys.argv[1]):
        sys.exit(_ask(sys.argv[1], sys.argv[2:]))
    _serve(sys.argv[1], sys.argv[2:])
