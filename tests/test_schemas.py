"""What is written is what docs/schemas says, nothing less and nothing more."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import Outcome

from blip2nb import Run, api

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "docs" / "schemas"
OPT = "tiny-blip2-opt-2.7b"


def schema(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


def objects(value: Any) -> list[dict[str, Any]]:
    """Every part of a schema that describes an object by its fields."""
    if isinstance(value, list):
        return [found for one in value for found in objects(one)]
    if not isinstance(value, dict):
        return []
    own = [value] if "properties" in value and isinstance(value["properties"], dict) else []
    return own + [found for one in value.values() for found in objects(one)]


def test_they_are_those_of_the_code():
    """`python docs/schemas.py` writes them."""
    spec = importlib.util.spec_from_file_location("schemas", ROOT / "docs" / "schemas.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.schemas() == {path.name: path.read_text(encoding="utf-8") for path in SCHEMAS.glob("*.json")}


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.name)
def test_they_are_closed_and_leave_no_field_open(path: Path):
    whole = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(whole)
    for one in objects(whole):
        assert one["additionalProperties"] is False, one.get("title")
        assert set(one["required"]) == set(one["properties"]), one.get("title")
        assert all(one["properties"].values()), f"{one.get('title')} has a field that may be anything"


def valid(value: Any, name: str) -> None:
    jsonschema.validate(value, schema(name), cls=jsonschema.Draft202012Validator)


def test_what_is_written_fits_them(converted: Callable[[str], Run], command: Callable[..., Outcome], tmp_path: Path):
    model = converted(OPT).model
    valid(json.loads((model / "blip2nb.json").read_text(encoding="utf-8")), "blip2nb.json")
    outputs = tmp_path / "outputs"
    run = api.convert(OPT, output_dir=outputs)
    api.verify(run, figures=False)
    valid(json.loads((run.folder / "report.json").read_text(encoding="utf-8")), "report.json")

    def printed(*arguments: object) -> Any:
        return json.loads(command(*arguments, "--json").out)

    valid(printed("variants"), "variants.output")
    valid(printed("keys", OPT), "keys.output")
    valid(printed("plan", OPT, "--output", run.model), "plan.output")
    valid(printed("convert", OPT, "--output", run.model), "convert.output")
    valid(printed("convert", "--check", run.model), "convert-check.output")
    valid(printed("verify", run.model, "--proof", "weights", "--no-figures", "--output", outputs / "b"), "report.json")
    valid(printed("show", run.folder), "report.json")
    valid(printed("revert", run.model, "--output", tmp_path / "back.pth"), "revert.output")
    valid(printed("diff", run.folder, run.folder), "diff.output")
    valid(printed("figures", run.folder, "--output", tmp_path / "figures"), "figures.output")
    valid(printed("doctor", "--lavis-python", "none"), "doctor.output")
    valid(printed("sweep", OPT, "--gather", "--output", outputs), "index.json")
    valid(json.loads((outputs / "index.json").read_text(encoding="utf-8")), "index.json")
    valid(printed("clean", "--output-dir", outputs), "clean.output")
    valid(printed("clean", f"{OPT}/model", "--yes", "--output-dir", outputs), "clean-name.output")


def test_a_field_too_many_is_refused():
    with pytest.raises(jsonschema.ValidationError, match="was unexpected"):
        valid({"repository": "x", "more": 1}, "push.output")
