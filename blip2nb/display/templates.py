"""The pages' templates: how they are filled in, and the hash by which a page allows its own style and script."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable

import jinja2
from markupsafe import Markup


@functools.cache
def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """A template beside this module. What it is given is text; a name that it is not given is an error.

    Args:
        name: its file.
        filters: what it calls by these names, beside `breakable` and `source_hash`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("blip2nb", "display"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(breakable=_breakable, source_hash=_source_hash, **filters)
    return environment.get_template(name)


def _source_hash(source: Markup) -> str:
    """What a Content-Security-Policy knows an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line with its last two parts. Every such place costs a browser time."""
    return Markup("<wbr>").join(re.split(r"(?<=\.)(?=[^.]+\.[^.]+$)", name))
