"""papermill's own command line, with kernels that open no TCP port:

python -m blip2nb.lavis_env.papermill in.ipynb out.ipynb
"""

from __future__ import annotations

from typing import Any

from papermill import cli
from papermill.engines import NBClientEngine, papermill_engines

from blip2nb.lavis_env import sockets


class Engine(NBClientEngine):
    """papermill's own engine, that is told where the kernel's sockets lie."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **named: Any) -> Any:
        with sockets.private() as config:
            named["shutdown_kernel"] = "immediate"  # the notebook is written; tidying up takes seconds
            return super().execute_managed_notebook(nb_man, kernel_name, config=config, **named)


if __name__ == "__main__":
    papermill_engines.register(None, Engine)
    cli.papermill(prog_name="papermill")
