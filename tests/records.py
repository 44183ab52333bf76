"""Records for tests: whole ones made of the few fields that matter, and what is in them as JSON has it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from blip2nb.forms import made_of, plain
from blip2nb.report.schema import Content

T = TypeVar("T")


def record(form: type[T], value: Mapping[str, Any] | T) -> T:
    """A record of some of its fields, as JSON has them; the others are empty. One that is whole stays as it is."""
    if isinstance(value, form):
        return value
    assert isinstance(value, Mapping)
    return made_of(form, _filled(form, value))


def content(value: Mapping[str, Any] | Content) -> Content:
    """The content of a report."""
    return record(Content, value)


def raw(report: Any) -> Any:
    """A record, or the content of a report, as JSON has it."""
    return report if isinstance(report, dict) else plain(getattr(report, "content", report))


def _filled(form: Any, value: Any) -> Any:
    """A value with what its form asks for and it does not say."""
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [one for one in inner if one is not type(None)]
        return _filled(kinds[0], value) if len(kinds) == 1 else value
    if dataclasses.is_dataclass(value):
        return value
    if dataclasses.is_dataclass(form):
        hints = typing.get_type_hints(form)
        given = {name: _filled(hints.get(name, Any), one) for name, one in value.items()}
        needed = {
            one.name
            for one in dataclasses.fields(form)
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        }
        return {name: _empty(hints[name]) for name in needed} | given
    if origin is tuple and isinstance(value, list | tuple) and inner[1:] == (Ellipsis,):
        return [_filled(inner[0], one) for one in value]
    if origin is not None and isinstance(value, Mapping):
        return {name: _filled(inner[1], one) for name, one in value.items()}
    return value


def _empty(form: Any) -> Any:
    origin = typing.get_origin(form)
    if origin in (typing.Union, types.UnionType):
        return None if type(None) in typing.get_args(form) else _empty(typing.get_args(form)[0])
    if dataclasses.is_dataclass(form):
        return _filled(form, {})
    simple: dict[Any, Any] = {tuple: [], str: "", int: 0, float: 0.0, bool: False}
    return simple.get(origin or form, {})
