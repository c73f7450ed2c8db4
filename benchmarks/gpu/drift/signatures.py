"""The signature of a function, read from source text; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Argument:
    """One argument; `default` is its source text, None if the argument is required."""

    name: str
    default: str | None
    keyword: bool = True  # can be passed by name
    place: bool = True  # can be passed by place


@dataclass(frozen=True)
class Signature:
    """What a function takes, without self."""

    arguments: tuple[Argument, ...]
    any_place: bool  # *args
    any_keyword: bool  # **kwargs

    def find(self, name: str) -> Argument | None:
        """Return the argument of this name."""
        return next((argument for argument in self.arguments if argument.name == name), None)

    def takes(self, name: str) -> bool:
        """Return whether a call may pass `name` by keyword."""
        found = self.find(name)
        return self.any_keyword if found is None else found.keyword

    def placed(self, count: int) -> Sequence[str]:
        """Return the names of the arguments that a call with so many values by place gives."""
        return [argument.name for argument in self.arguments if argument.place][:count]


def signature(function: Function, method: bool) -> Signature:
    """Return the signature of a definition; of a method without its first argument."""
    found = function.args
    placed = [*found.posonlyargs, *found.args]
    none: list[ast.expr | None] = [None]
    defaults = none * (len(placed) - len(found.defaults)) + list(found.defaults)
    arguments = [
        Argument(one.arg, _text(default), keyword=number >= len(found.posonlyargs))
        for number, (one, default) in enumerate(zip(placed, defaults, strict=True))
    ][method and not _is_static(function) :]
    arguments += [
        Argument(one.arg, _text(default), place=False)
        for one, default in zip(found.kwonlyargs, found.kw_defaults, strict=True)
    ]
    return Signature(tuple(arguments), found.vararg is not None, found.kwarg is not None)


def decorated(function: Function, name: str) -> bool:
    """Return whether a decorator is called `name`, however it is reached."""
    found = (one.func if isinstance(one, ast.Call) else one for one in function.decorator_list)
    return any(ast.unparse(one).rpartition(".")[2] == name for one in found)


def _is_static(function: Function) -> bool:
    return decorated(function, "staticmethod")


def _text(default: ast.expr | None) -> str | None:
    return None if default is None else ast.unparse(default)
