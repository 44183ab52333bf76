"""Dotted paths of modules: putting them together and taking them apart."""

from __future__ import annotations


def join(path: str, name: str) -> str:
    """The path of what lies in a module at a name; either may be "", the module itself."""
    return f"{path}.{name}".strip(".")


def relative(path: str, root: str) -> str:
    """A path as seen from a module that holds it: "" for that module itself."""
    return path.removeprefix(root).removeprefix(".")
