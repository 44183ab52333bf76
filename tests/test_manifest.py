"""The manifest of a converted directory can be read for as long as it is understood, and says so where it is not."""

import dataclasses
import json

import pytest

from blip2nb.errors import RequestError
from blip2nb.report.manifest import FORMAT, MANIFEST, Manifest

TWIN = "tiny-blip2-opt-2.7b"


def test_a_directory_from_before_there_was_a_format_is_read(model_copy):
    path = model_copy(TWIN).model / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.pop("format") == FORMAT == 1
    path.write_text(json.dumps(content), encoding="utf-8")
    assert Manifest.read(path.parent).format == 1


@pytest.mark.parametrize("form", [FORMAT + 1, "new"])
def test_another_format_is_not_called_damaged(tmp_path, form):
    content = {"format": form, "a field that is not known": 1}
    (tmp_path / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RequestError, match=rf"has format {form!r}, expected {FORMAT}: another blip2nb"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"model": "m"}'])
def test_what_is_no_manifest_is_called_damaged(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="is damaged"):
        Manifest.read(tmp_path)


def test_a_field_without_a_default_is_a_new_format():
    """Directories of this format lack it, and would all have to be converted again."""
    fields = {one.name for one in dataclasses.fields(Manifest) if one.default is one.default_factory}
    assert (FORMAT, fields) == (
        1,
        {"model", "variant", "dtype", "weights_hash", "parameters", "origins", "checkpoints", "written", "shards",
         "tied", "dropped", "unused", "no_way_back", "bytes_by_kind", "versions"},
    )  # fmt: skip
