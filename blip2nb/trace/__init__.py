"""Recording and comparing activations of any two torch modules. Knows nothing of BLIP-2.

from blip2nb import trace

stages = [trace.Stage("block.0", "blocks.0", "encoder.layers.0", inputs={"hidden_states": ":x"}), …]
trace.compare(reference, candidate, stages, inputs)
"""

from blip2nb.trace.stage import Stage

__all__ = ["Comparison", "Stage", "Tape", "compare"]


def __getattr__(name: str):
    # torch takes seconds to import; a table of stages does not need it
    if name in ("Comparison", "compare"):
        import importlib

        return getattr(importlib.import_module("blip2nb.trace.comparison"), name)
    if name == "Tape":
        from blip2nb.trace.tape import Tape

        return Tape
    raise AttributeError(name)
