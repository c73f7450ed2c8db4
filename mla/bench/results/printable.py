"""Strings of a result that may go to a terminal, a table or a page. Needs no torch."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import msgspec

from mla_backends.outside import escaped

T = TypeVar("T")


def printable(value: T) -> T:
    """Return a copy of a result, or of a part of it, with `escaped` strings."""
    return cast(T, _printable(value))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (int, float)):  # samples: many, and no text
            return value
        return type(value)(_printable(one) for one in value)
    if isinstance(value, msgspec.Struct):
        fields = value.__struct_fields__
        return type(value)(**{name: _printable(getattr(value, name)) for name in fields})
    return value
