"""Sizes in words."""

from __future__ import annotations


def as_bytes(size: float) -> str:
    """Bytes as people read them: three digits, in the decimal units of disks."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"
