"""Small pieces of the sentences and tables that users read. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from mla.errors import UsageError, did_you_mean

T = TypeVar("T")
K = TypeVar("K")

# Short name -> torch's name of each dtype that a layer can have.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

MAX_LISTED = 8  # words of a sentence's list
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}  # descending: `size` takes the first that fits
_FORMATS = dict.fromkeys(_BYTES, ".3g")


def named_dtype(word: str) -> str:
    """Return torch's name of a dtype: "bfloat16" for "bf16" and "bfloat16". Raises `UsageError`."""
    if word in DTYPES.values():
        return word
    if word not in DTYPES:
        hint = did_you_mean(word, [*DTYPES, *DTYPES.values()])
        raise UsageError(f"unknown dtype '{word}'.{hint} Choose from: {', '.join(DTYPES)}.")
    return DTYPES[word]


def dtype_name(dtype: object) -> str:
    """Return "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def counted(count: int, what: str, plural: str = "s") -> str:
    """Return, for example, "1 pass" and "2 passes"."""
    return f"{count} {what}{plural * (count != 1)}"


def listed(words: Sequence[str]) -> str:
    """Return "a, b and c"; of many, the first and how many more there are."""
    if len(words) > MAX_LISTED:
        words = [*words[:MAX_LISTED], f"{len(words) - MAX_LISTED} more"]
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def numbered(what: str, numbers: Sequence[object]) -> str:
    """Return, for example, "rank 1" and "ranks 1, 2 and 3"."""
    return f"{what}{'s' * (len(numbers) > 1)} {listed(list(map(str, numbers)))}"


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def size(count: int | Decimal | None, unknown: str = "-", **formats: str | Callable[[Any], str]) -> str:
    """Return bytes with a unit, such as "1.5 MiB"; `unknown` for None.

    `formats` maps each allowed unit (GiB, MiB, KiB) to its number format: a format spec, or a function from
    the number to text. The largest unit that `count` reaches is used, otherwise the smallest allowed one.
    Default: any of the three, with three significant digits. A `Decimal` is for counts beyond a float.
    """
    if count is None:
        return unknown
    allowed = [unit for unit in _BYTES if unit in (formats or _FORMATS)]
    unit = next((unit for unit in allowed if count >= _BYTES[unit]), allowed[-1])
    number, style = count / _BYTES[unit], (formats or _FORMATS)[unit]
    return f"{style(number) if callable(style) else format(number, style)} {unit}"
