"""Options that several commands share, and the words they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mla.errors import UsageError


def key_values(options: Sequence[str]) -> dict[str, str]:
    """Split `-O` options at their "=". Raises `UsageError`."""
    pairs = [option.partition("=") for option in options]
    for option, (key, equals, _) in zip(options, pairs, strict=True):
        if not key or not equals:
            raise UsageError(f"-O wants KEY=VALUE, got '{option}'.")
    return {key: value for key, _, value in pairs}


FILE = click.Path(path_type=Path)


class Word(click.Argument):
    """An argument that explains itself in the help, as options do."""

    def __init__(self, names: Sequence[str], *, help: str, **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return name and explanation."""
        return self.human_readable_name, self.help or ""


def percent(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read "3%" or "3" as 0.03."""
    if value is None:
        return None
    try:
        found = float(value.removesuffix("%")) / 100
    except ValueError:
        found = -1.0
    if not 0 <= found < 10:
        raise click.BadParameter(f"'{value}' is no percentage, such as 3%.")
    return found
