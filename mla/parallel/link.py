"""What a collective costs on a link, by a latency (alpha) and a bandwidth (beta) for each kind. No torch.

A rank of n sends its part of a tensor in so many steps, one message in each, as in R. Thakur, R. Rabenseifner
and W. Gropp, *Optimization of Collective Communication Operations in MPICH* (2005), for long messages:

- all-reduce, a ring: 2 (n - 1) steps and 2 (n - 1) / n of the tensor (its reduce-scatter and all-gather)
- all-gather, a ring: n - 1 steps, and in each the tensor that one rank has
- all-to-all, pairwise: n - 1 steps and (n - 1) / n of the tensor

A collective takes steps * alpha + bytes sent / beta. Libraries choose other algorithms for small tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mla.errors import UsageError, did_you_mean

ALL_REDUCE, ALL_GATHER, ALL_TO_ALL = KINDS = ("all-reduce", "all-gather", "all-to-all")

IDEAL = "ideal"  # collectives that take no time
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_PREFIXES = {"k": 1, "m": 2, "g": 3, "t": 4}
_NUMBER = r"([0-9.]+(?:e[-+]?[0-9]+)?|inf)"
_LINE = re.compile(
    rf"\s*alpha={_NUMBER}\s*(ns|us|ms|s)\s*,\s*beta={_NUMBER}\s*([kmgt])(i?)b/s\s*", re.IGNORECASE
)
_SYNTAX = "a link is written as in 'alpha=5us,beta=300GB/s'"


@dataclass(frozen=True)
class Call:
    """One collective of a forward: among how many ranks, and the bytes that each sends in it."""

    kind: str
    ranks: int
    sent: int

    @classmethod
    def all_reduce(cls, nbytes: int, ranks: int) -> Call:
        """Return the sum of a tensor of so many bytes, which every rank has and gets."""
        return cls(ALL_REDUCE, ranks, 2 * nbytes * (ranks - 1) // ranks)

    @classmethod
    def all_gather(cls, nbytes: int, ranks: int) -> Call:
        """Return the gathering of a tensor of so many bytes from each rank to all."""
        return cls(ALL_GATHER, ranks, nbytes * (ranks - 1))

    @classmethod
    def all_to_all(cls, nbytes: int, ranks: int) -> Call:
        """Return the exchange in which each rank has so many bytes, an equal part of them for each."""
        return cls(ALL_TO_ALL, ranks, nbytes * (ranks - 1) // ranks)

    @property
    def steps(self) -> int:
        """Messages that a rank sends, one after the other."""
        return (self.ranks - 1) * (2 if self.kind == ALL_REDUCE else 1)


@dataclass(frozen=True)
class Line:
    """Seconds of a message without bytes, and bytes per second; infinitely many cost nothing."""

    alpha: float = 0.0
    beta: float = math.inf

    def seconds(self, call: Call) -> float:
        """Return what a collective takes."""
        return call.steps * self.alpha + call.sent / self.beta

    def __str__(self) -> str:
        return f"alpha={1e6 * self.alpha:.6g}us,beta={self.beta / 1e9:.6g}GB/s"


@dataclass(frozen=True)
class Link:
    """A line for each kind of collective. Without any, collectives take no time."""

    lines: Mapping[str, Line]

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read "alpha=5us,beta=300GB/s", the same by kind ("all-reduce:...;all-gather:..."), or "ideal".

        Raises `UsageError`.
        """
        if text.strip() == IDEAL:
            return cls({})
        lines: dict[str, Line] = {}
        for part in text.split(";"):
            kind, colon, numbers = part.strip().rpartition(":")
            if colon and kind not in KINDS:
                raise UsageError(f"link '{text}': unknown collective '{kind}'.{did_you_mean(kind, KINDS)}")
            line = _line(numbers, text)
            lines |= {kind: line} if colon else dict.fromkeys(KINDS, line)
        return cls(lines)

    def __str__(self) -> str:
        if not self.lines:
            return IDEAL
        lines = set(self.lines.values())
        if len(lines) == 1 and len(self.lines) == len(KINDS):
            return str(lines.pop())
        return ";".join(f"{kind}:{line}" for kind, line in self.lines.items())

    @property
    def ideal(self) -> bool:
        """Whether nothing is known of the link, so that collectives count nothing."""
        return not self.lines

    def missing(self, kinds: Sequence[str]) -> list[str]:
        """Return which of these kinds the link has no line for; an ideal link lacks none."""
        return [] if self.ideal else [kind for kind in kinds if kind not in self.lines]

    def seconds(self, calls: Sequence[Call]) -> float:
        """Return what collectives take one after the other. Raises KeyError for a kind without a line."""
        return 0.0 if self.ideal else sum(self.lines[call.kind].seconds(call) for call in calls)


def fit(small: tuple[Call, float], large: tuple[Call, float]) -> Line:
    """Return the line through the seconds of two collectives of one kind among as many ranks.

    Where noise would make the latency or the time per byte negative, that is 0.
    """
    (less, early), (more, late) = small, large
    per_byte = max(0.0, (late - early) / (more.sent - less.sent))
    alpha = max(0.0, (early - less.sent * per_byte) / less.steps)
    return Line(alpha, 1 / per_byte if per_byte else math.inf)


def _line(text: str, whole: str) -> Line:
    match = _LINE.fullmatch(text)
    try:
        alpha, beta = (float(match[1]), float(match[3])) if match else (math.nan, math.nan)
    except ValueError:  # as in 1.2.3
        alpha = beta = math.nan
    if match is None or not (alpha < math.inf and beta > 0):
        raise UsageError(f"{_SYNTAX}, got '{whole}'.")
    unit = (1024 if match[5] else 1000) ** _PREFIXES[match[4].lower()]
    return Line(alpha * _TIMES[match[2].lower()], beta * unit)
