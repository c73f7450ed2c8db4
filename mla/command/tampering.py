"""What a plugin has replaced of the program that judges it: our functions, the clock, the reference ops.

A plugin is trusted code in this process and can do anything. This names what is done openly: `watch` notes
every function, class and method before a plugin is loaded, and `found` names those that are others now. Of
modules that are loaded later, every function must be at home in this project, in Python or in torch.
"""

from __future__ import annotations

import builtins
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

OURS = ("mla", "mla_backends")
# Packages that our modules import from, also after a plugin has been loaded.
KNOWN = {"torch", "triton", "numpy", "safetensors", "transformers"}
KNOWN |= {"rich", "click", "msgspec", "pluggy", "matplotlib"}
# Functions outside of our packages that every number goes through.
_OUTSIDE: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (time, tuple(name for name in dir(time) if name.endswith(("_ns", "counter", "monotonic", "time")))),
    (gc, ("enable", "disable", "isenabled", "collect")),
    (statistics, tuple(name for name in statistics.__all__ if callable(getattr(statistics, name)))),
    (math, ("isfinite", "isnan", "sqrt", "ceil", "floor")),
    (builtins, ("abs", "all", "any", "float", "int", "len", "max", "min", "range", "round", "sorted", "sum")),
)
# Functions of torch that outputs are copied, poisoned and compared with.
_TORCH = ("empty", "equal", "full", "isfinite", "matmul", "mm", "bmm", "ones", "randn", "zeros")

_UNSTEADY = ("__annot", "__class")  # attributes of classes that Python itself replaces

# A function, and the code that it runs.
_Noted = tuple[Any, tuple[Any, ...]]


class _Notes:
    """Everything that is to stay as it is, by the place where it is looked up."""

    def __init__(self) -> None:
        self.places = {place: _noted(names) for place, names in _our_places()}
        self.outside = {module.__name__: _noted(_picked(module, names)) for module, names in _OUTSIDE}
        self.packages = {name.partition(".")[0] for name in list(sys.modules)} | set(sys.stdlib_module_names)


_notes: _Notes | None = None


def watch() -> None:
    """Note what there is; call it before a plugin is loaded. Later calls start anew."""
    global _notes
    _notes = _Notes()


def found() -> list[str]:
    """Return what has been replaced since `watch`, and by which module: "time.time_ns by module x".

    Empty before the first `watch`.
    """
    if _notes is None:
        return []
    replaced = [one for place, names in _our_places() for one in _differences(_notes, place, names)]
    for module, names in _OUTSIDE:
        replaced += _changed(module.__name__, _notes.outside[module.__name__], _picked(module, names))
    return list(dict.fromkeys([*replaced, *_reference_ops()]))


def in_torch() -> list[str]:
    """Return the functions and methods of torch that other packages have replaced, as vendors' stacks do."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    offered = {f"torch.{name}": getattr(torch, name, None) for name in _TORCH}
    methods = {f"torch.Tensor.{name}": value for name, value in _functions(vars(torch.Tensor)).items()}
    strangers = (
        (name, _stranger(value, {"torch", *sys.stdlib_module_names}))
        for name, value in {**offered, **methods}.items()
    )
    return [f"{name} by module {by}" for name, by in strangers if by]


def _our_places() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every module and class of ours that is loaded, by name, with its functions."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in OURS or not isinstance(module, ModuleType):
            continue
        names = _functions(vars(module))
        yield name, {key: value for key, value in names.items() if not key.startswith("__")}
        for value in names.values():
            if isinstance(value, type) and value.__module__ == name:
                yield f"{name}.{value.__qualname__}", _functions(vars(value))


def _functions(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what can be called, or makes an attribute out of a call."""
    return {
        name: value
        for name, value in list(names.items())
        if (callable(value) or hasattr(type(value), "__get__")) and not name.startswith(_UNSTEADY)
    }


def _picked(module: ModuleType, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, name, None) for name in names}


def _noted(names: Mapping[str, Any]) -> dict[str, _Noted]:
    return {name: (value, _codes(value)) for name, value in names.items()}


def _differences(notes: _Notes, place: str, names: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has changed at a place that was noted, and strangers among what is new there."""
    before = notes.places.get(place, {})
    yield from _changed(place, before, names)
    known = {*OURS, *KNOWN, *notes.packages}
    for name, value in names.items():
        if name not in before and (by := _stranger(value, known)):
            yield f"{place}.{name} by module {by}"


def _changed(place: str, before: Mapping[str, _Noted], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the functions that are others than before, or run other code."""
    for name, (value, codes) in before.items():
        current = now.get(name)
        if current is not value or _codes(current) != codes:
            homes = _homes(current)
            yield f"{place}.{name} by module {homes[0] if homes else 'unknown'}"


def _reference_ops() -> Iterator[str]:
    """Yield the reference ops that are not of our own classes, or have methods of their own."""
    module = sys.modules.get("mla.reference")
    for kind, op in dict(getattr(module, "REFERENCE", {})).items():
        own = _functions(getattr(op, "__dict__", {}))
        if by := next(filter(None, (_stranger(one, {"mla"}) for one in (type(op), *own.values()))), ""):
            yield f"mla.reference.REFERENCE['{kind}'] by module {by}"


def _stranger(value: Any, known: set[str]) -> str:
    """Return the first module that a function is at home in and that is of none of the known packages."""
    homes = (home for home in _homes(value) if not home.startswith("namedtuple_"))  # made by Python
    return next((home for home in homes if home.partition(".")[0] not in known), "")


def _homes(value: Any) -> list[str]:
    """Return the modules whose code runs when a function is called, its wrappers first.

    The names that a wrapper took over from what it wraps do not count.
    """
    if isinstance(value, type):
        return [value.__module__]
    layers = list(_layers(value))
    homes = [one.__globals__.get("__name__", "unknown") for one in layers if hasattr(one, "__globals__")]
    return homes or [getattr(value, "__module__", None) or type(value).__module__]


def _codes(value: Any) -> tuple[Any, ...]:
    """Return the code that a function runs, and its defaults: both can be replaced in place."""
    if isinstance(value, type):
        return ()
    plain = type(value) is FunctionType and not value.__dict__  # most are: these wrap nothing
    found = [value] if plain else [one for one in _layers(value) if hasattr(one, "__code__")]
    return tuple((id(one.__code__), id(one.__defaults__), id(one.__kwdefaults__)) for one in found)


def _layers(value: Any) -> Iterator[Any]:
    """Yield a function, and what it wraps, from outside to inside."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, property):
            waiting += [one.fget, one.fset]
        elif isinstance(one, (functools.cached_property, functools.partial)):
            waiting.append(one.func)
        else:
            waiting += [getattr(one, name, None) for name in ("__func__", "__wrapped__")]
