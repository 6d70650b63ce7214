"""Numbers with their nouns, as people write them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return "1 slab", "0 slabs", "1,234 slabs". `noun` is singular and takes an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
