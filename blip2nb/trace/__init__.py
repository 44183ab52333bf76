"""Recording and comparing activations of any two torch modules. Knows nothing of BLIP-2.

from blip2nb import trace

stages = [trace.Stage("block.0", "blocks.0", "encoder.layers.0", inputs={"hidden_states": ":x"}), …]
trace.compare(reference, candidate, stages, inputs)
"""

from blip2nb.trace.stage import Stage

__all__ = ["Comparison", "Finding", "Known", "Stage", "Step", "Tape", "compare", "enter_both"]

_HOMES = {
    "Comparison": "results",
    "compare": "comparison",
    "Finding": "diagnosis.findings",
    "Known": "diagnosis.known",
    "Step": "step",
    "enter_both": "step",
    "Tape": "tape",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str):
    # torch takes seconds to import; a table of stages does not need it
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"blip2nb.trace.{_HOMES[name]}"), name)
    raise AttributeError(name)
