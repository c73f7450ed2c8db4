"""Result files as one HTML page, or as pictures."""

from __future__ import annotations

import importlib

from mla.errors import MLAError


class PageError(MLAError):
    """The page cannot be made."""


def require() -> None:
    """Raise `PageError` unless the libraries of the extra `report`, which all modules here need, load."""
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise PageError(
                f"a report needs {name}, which cannot be imported ({error}): `pip install {name}`, or in a "
                "checkout `pip install '.[report]' ./backends`."
            ) from error
