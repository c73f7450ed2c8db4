"""Small pieces of the sentences and tables that users read. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import TypeVar

from mla.errors import UsageError, did_you_mean

T = TypeVar("T")
K = TypeVar("K")

# Short name -> torch's name of each dtype that a layer can have.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

MAX_LISTED = 8  # words of a sentence's list
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}  # descending: `size` takes the first that fits


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


def size(count: int | Decimal | None, unknown: str = "-", unit: str = "", style: str = ".3g") -> str:
    """Return bytes with a unit, such as "1.5 MiB"; `unknown` for None.

    `unit` is one of GiB, MiB and KiB; by default the largest that `count` reaches, or KiB. `style` is the
    number's format. A `Decimal` is for counts beyond a float.
    """
    if count is None:
        return unknown
    unit = unit or next((name for name, least in _BYTES.items() if count >= least), "KiB")
    return f"{count / _BYTES[unit]:{style}} {unit}"
