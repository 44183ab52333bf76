"""Finding the LAVIS environment. Imports nothing heavy: whether there is one is asked before anything runs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from blip2nb.errors import RequestError

KERNEL = "lavis"
_CHECKOUT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Lavis:
    """A Python that has LAVIS. `kernel` is its Jupyter kernel's name, where it is one."""

    python: Path
    kernel: str | None


@dataclasses.dataclass(frozen=True)
class LavisOptions:
    """Which LAVIS is to record, and how.

    Attributes:
        python: of an environment with LAVIS; "" for the one that is found, "none" for none.
        device: "cpu" or a GPU's name.
        notebook: run notebooks/lavis.ipynb on LAVIS's kernel instead of the bare script.
    """

    python: str | Path = ""
    device: str = "cpu"
    notebook: bool = False


def find_lavis(lavis_python: str | Path = "") -> Lavis | None:
    """The LAVIS environment to use: the one given, $BLIP2NB_LAVIS_PYTHON, the Jupyter kernel `lavis`, or .venv-lavis.
    "none" does without, even where there is one.

    Raises:
        RequestError: the one given does not exist.
    """
    given = str(lavis_python or os.environ.get("BLIP2NB_LAVIS_PYTHON", ""))
    if given == "none":
        return None
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise RequestError(
                f"lavis_python {given} does not exist. Expected the python of an environment with LAVIS."
            )
        return Lavis(path, None)
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec(KERNEL)
        if Path(spec.argv[0]).is_file():
            return Lavis(Path(spec.argv[0]), KERNEL)
    except NoSuchKernel:
        pass
    own = _CHECKOUT / ".venv-lavis" / "bin" / "python"
    return Lavis(own, None) if own.is_file() else None
