"""The instruction sets that the kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


class BuildError(Exception):
    """The kernels could not be built or may not run here; the message is one clause saying why."""


@dataclass(frozen=True)
class Level:
    """One instruction set that the kernels can be compiled for."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]  # processor flags, as Linux names them


_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _V4 | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_bf16"}


def _level(name: str, needs: frozenset[str]) -> Level:
    """Name every instruction set to the compiler: -march=x86-64-v4 needs GCC 11, these do not."""
    spelt = {"avx512_bf16": "avx512bf16", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16"}
    return Level(name, tuple(sorted(f"-m{spelt.get(flag, flag)}" for flag in needs)), needs)


# Best first; the last one runs anywhere.
LEVELS = (
    _level("amx", _AMX),
    _level("avx512_bf16", _BF16),
    _level("avx512", _V4),
    _level("avx2", _V3),
    _level("portable", frozenset()),
)


def levels_of(machine: str) -> tuple[Level, ...]:
    """Return the levels that processors of this kind may have; `machine` as `platform.machine()` names it."""
    return LEVELS if machine == "x86_64" else tuple(level for level in LEVELS if not level.needs)
