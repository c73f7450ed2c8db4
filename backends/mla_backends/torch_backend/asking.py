"""Asking a device's torch module what not every vendor's has, or has an answer to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect the texts of warnings instead of printing them."""
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield remarks
    remarks += [str(one.message).partition("\n")[0].strip() for one in caught]


def ask(module: ModuleType, name: str) -> Any:
    """Call an optional function of the device module; None if it does not exist or does not know."""
    function = getattr(module, name, None)
    try:
        return function() if function is not None else None
    except (NotImplementedError, RuntimeError, TypeError):
        return None
