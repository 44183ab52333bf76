"""Writes docs/schemas: the closed JSON Schema of report.json, blip2nb.json, sweep.json and every --json output."""

import json
from pathlib import Path

from blip2nb import forms
from blip2nb.report.manifest import Manifest
from blip2nb.report.outputs import OUTPUTS
from blip2nb.report.schema import Content
from blip2nb.report.sweep import Index, Outcome

FILES = {"report.json": Content, "blip2nb.json": Manifest, "sweep.json": Outcome, "index.json": Index}


def schemas() -> dict[str, str]:
    """File name -> its content. What a command prints is called after it; what is a file, after that."""
    named = {f"{name}.schema.json": form for name, form in FILES.items()}
    printed = {f"{name}.output.schema.json": form for name, form in OUTPUTS.items() if form not in FILES.values()}
    return {
        name: json.dumps(
            {"$schema": "https://json-schema.org/draft/2020-12/schema", **forms.schema(form)},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
        for name, form in {**named, **printed}.items()
    }


if __name__ == "__main__":
    folder = Path(__file__).with_name("schemas")
    for path in folder.glob("*.json"):
        path.unlink()
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")
