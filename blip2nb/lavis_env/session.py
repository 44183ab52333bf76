"""LAVIS, live: its model in a Jupyter kernel of its own environment, whose modules can be run and changed from here.

LAVIS cannot share an environment with transformers 5, so its modules stay where they are. A `LavisModule` stands for
one of them: it shows its inputs, its source and its attributes, runs on inputs that are handed to it, and executes
any line of Python beside it.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import queue
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.conversion.files import Opened
from blip2nb.errors import RequestError
from blip2nb.lavis_env import kernels, sockets
from blip2nb.lavis_env.environment import Lavis

if TYPE_CHECKING:
    import torch

_STARTS = 120  # seconds for a kernel's first answer. Chosen: it takes a few; one that lacks ipykernel is told at once
_POLLS = 1  # seconds between two looks at whether a silent kernel is alive. Chosen: nobody waits for it

_BUILD = """
import json, sys
sys.path.insert(0, {folder!r})
import attended; attended.attend()
import torch
import record_lavis
from safetensors.torch import load_file, save_file
from tape import first_tensor

request = record_lavis.read_request("request.json")
model, _ = record_lavis.build(request)
"""

_ENTER = """
module, inputs = record_lavis.enter(model, request, {path!r})
tensors = {{name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}}
save_file(tensors, "out.safetensors")
print(json.dumps({{name: value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)[:200]
                  for name, value in inputs.items() if name not in tensors}}))
"""

_CALL = """
with torch.no_grad():
    output = first_tensor(module(**dict(inputs, **load_file("in.safetensors"))))
save_file({"output": output.contiguous()}, "out.safetensors")
"""


class LavisSession:
    """A kernel of LAVIS's environment that has built LAVIS's model on a run's source.

    Attributes:
        connection_file: `jupyter console --existing FILE` opens a prompt in the same kernel.
        at: the module that was entered last.
    """

    def __init__(self, environment: Lavis, opened: Opened, source: str):
        """Raises RequestError: the environment has no ipykernel, or LAVIS cannot build the model."""
        self._scratch = tempfile.TemporaryDirectory(prefix="blip2nb-")
        self.folder = Path(self._scratch.name)
        request = kernels.prepare(self.folder, opened, source)
        self.source_hash = json.loads(request.read_text(encoding="utf-8"))["source_hash"]
        read, write = os.pipe()
        self._held = os.fdopen(write, "wb")  # closes with this process, however it ends; the kernel ends with it
        try:
            self._manager, self._client = _start(environment, self.folder, read)
        finally:
            os.close(read)
        self.connection_file = self._manager.connection_file
        self.at = ""
        atexit.register(self.close)
        try:
            self.execute(_BUILD.format(folder=str(self.folder)))
        except LavisError as error:
            self.close()
            raise RequestError(f"LAVIS could not build the model: {error}. `blip2nb doctor` checks it.") from error

    def execute(self, code: str) -> str:
        """Run Python in the kernel. Returns what it printed, and the last expression's value as text.

        Raises:
            LavisError: it raised, with the traceback from over there; or the kernel ended.
        """
        shown: list[str] = []
        raised: dict[str, Any] = {}
        request = self._client.execute(code, allow_stdin=False)
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=_POLLS)
            except queue.Empty:
                if not self.alive:
                    raise LavisError(
                        "LAVIS's kernel ended", "most likely there was not the memory for it", []
                    ) from None
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream" and content["name"] == "stdout":
                shown.append(content["text"])
            elif kind == "execute_result":
                shown.append(content["data"]["text/plain"])
            elif kind == "error":
                raised = content
            elif kind == "status" and content["execution_state"] == "idle":
                break
        if raised:
            raise LavisError(raised["ename"], raised["evalue"], raised["traceback"])
        return "".join(shown)

    def module(self, path: str) -> LavisModule:
        """Run LAVIS's forward up to one of its modules. One at a time: the last one is `module` over there."""
        from safetensors.torch import load_file

        plain = json.loads(self.execute(_ENTER.format(path=path)).strip().splitlines()[-1])
        self.at = path
        return LavisModule(path, self, plain | load_file(self.folder / "out.safetensors"))

    @property
    def alive(self) -> bool:
        """Whether the kernel still runs."""
        return bool(self._manager.is_alive())

    def close(self) -> None:
        """End the kernel. Nothing of it stays."""
        atexit.unregister(self.close)
        self._client.stop_channels()
        if self._manager.has_kernel:
            self._manager.shutdown_kernel(now=True)
        self._held.close()
        self._scratch.cleanup()


def _start(environment: Lavis, folder: Path, stdin: int) -> tuple[Any, Any]:
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager

    specs = folder / "kernels"
    spec = specs / "live" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [str(environment.python), "-W", "ignore", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": ""}
    content = {"argv": command, "display_name": "LAVIS", "language": "python", "env": variables}
    spec.write_text(json.dumps(content), encoding="utf-8")
    specifications = KernelSpecManager(kernel_dirs=[str(specs)])
    manager = KernelManager(kernel_name="live", kernel_spec_manager=specifications, **sockets.traits(folder))
    manager.start_kernel(cwd=str(folder), stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=_STARTS)
    except RuntimeError as error:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        raise RequestError(
            f"{environment.python} does not start as a kernel ({error}). It needs ipykernel: pip install it there."
        ) from error
    return manager, client


class LavisError(RuntimeError):
    """What was raised over there, with its traceback."""

    def __init__(self, name: str, value: str, traceback: list[str]):
        super().__init__(f"{name}: {value}")
        self.traceback = "\n".join(traceback)


@dataclasses.dataclass
class LavisModule:
    """A module of LAVIS's model, live in LAVIS's own process.

    Attributes:
        path: where it is in LAVIS's model.
        inputs: the arguments LAVIS calls it with, tensors as torch tensors; what is neither a tensor nor a plain value
            is its text.
    """

    path: str
    session: LavisSession
    inputs: dict[str, Any]

    def __call__(self, **changes: torch.Tensor) -> torch.Tensor:
        """Its main output on its own inputs, some of them replaced. Raises LavisError if it raises over there."""
        from safetensors.torch import load_file, save_file

        self._enter_again()
        save_file({name: value.contiguous() for name, value in changes.items()}, self.session.folder / "in.safetensors")
        self.session.execute(_CALL)
        return load_file(self.session.folder / "out.safetensors")["output"]

    def execute(self, code: str) -> str:
        """Run Python beside it, where it is called `module`, the whole model `model`, and its arguments `inputs`:
        `step.reference.execute("module.eps = 1e-6")`. Returns what that shows."""
        self._enter_again()
        return self.session.execute(code)

    def _enter_again(self) -> None:
        """Another module may have been entered since."""
        if self.session.at != self.path:
            self.session.module(self.path)

    @property
    def source(self) -> Any:
        """The source of its forward, as LAVIS has it, for a notebook to show."""
        from IPython.display import Code

        return Code(self.execute("import inspect; print(inspect.getsource(type(module).forward))"), language="python")

    def __repr__(self) -> str:
        from blip2nb.trace.step import describe

        return f"{self.execute('print(module)').rstrip()}\ncalled by LAVIS with {describe(self.inputs)}"
