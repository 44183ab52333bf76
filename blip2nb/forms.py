"""Frozen data classes as JSON and back, checked, and the JSON Schema of them: one way for everything that is kept."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

INFINITE = 1e9
"""What stands for infinity in JSON, which has no word for it: thirty times what an output that is all wrong has, 2²⁵ of
its roundings. What is larger still counts as infinite, too."""


@dataclass_transform(frozen_default=True)
def record(made: type[T]) -> type[T]:
    """A frozen data class that takes no field it does not know when it is read."""
    made.__pydantic_config__ = {"extra": "forbid", "json_schema_serialization_defaults_required": True}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(made)


def plain(value: Any) -> Any:
    """A record as JSON has it: mappings, lists, texts and numbers, NaN as null and infinity as INFINITE."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return _finite(value) if isinstance(value, float) else value


def settled(value: T) -> T:
    """A record as it will be read again: NaN as None and infinity as INFINITE, at any depth."""
    return mapped(value, lambda one: _finite(one) if isinstance(one, float) else one)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A record, or what records are made of, with every text, number and truth in it changed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: mapped(getattr(value, one.name), change) for one in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return {change(name): mapped(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return tuple(mapped(one, change) for one in value)
    return change(value)


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else math.copysign(INFINITE, value) if math.isinf(value) else value


def there(value: T | None) -> T:
    """A part of a record that may be missing, and is known not to be here. Raises ValueError where it is."""
    if value is None:
        raise ValueError("This record has no such part.")
    return value


def dumps(value: Any) -> str:
    """A record, or a list of them, as the text of a JSON file."""
    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def reads(form: type[T], text: str | bytes) -> T:
    """The record that a JSON text holds. Raises ValueError, in one line, where it does not fit."""
    from pydantic import ValidationError

    adapter: TypeAdapter[T] = _adapter(form)  # type: ignore[arg-type]
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise ValueError(_first(error)) from error


class OtherFormat(ValueError):
    """A JSON file is of another format than this version of the kit reads; `found` is what it says."""

    def __init__(self, found: object):
        super().__init__(f"it has format {found!r}")
        self.found = found


def reads_format(form: type[T], text: str | bytes, known: int, unsaid: int | None = None) -> T:
    """The record that a JSON text holds, where its field `format` says `known`.

    Args:
        unsaid: the format of a file that does not say it.

    Raises:
        OtherFormat: it is of another one, whatever else it holds.
        ValueError: it is no JSON, or does not fit.
    """
    from pydantic_core import from_json

    content = from_json(text)
    if (found := content.get("format", unsaid) if isinstance(content, dict) else unsaid) != known:
        raise OtherFormat(found)
    return made_of(form, content)


def made_of(form: type[T], value: Any) -> T:
    """The record that plain values hold. Raises ValueError, in one line, where they do not fit."""
    from pydantic import ValidationError

    adapter: TypeAdapter[T] = _adapter(form)  # type: ignore[arg-type]
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def _first(error: Any) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}"


def schema(form: Any) -> dict[str, Any]:
    """The closed JSON Schema of what `dumps` writes of a record."""
    return _adapter(form).json_schema(mode="serialization")


@functools.cache  # building one takes some milliseconds
def _adapter(form: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # takes a tenth of a second

    return TypeAdapter(form)
