"""Keep the fastest of several ways to do one part of a layer, found by trial before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from mla.errors import MLAError

#: Seconds of trials for every way, and how often each is tried at least.
SECONDS, LEAST = 0.1, 4


class Unavailable(MLAError):
    """A peer that cannot run here; the sentence says why, and `peer` which one it is, once that is known."""

    peer: str | None = None

    def of(self, peer: str) -> Unavailable:
        """Return this error with the peer's name."""
        self.peer = peer
        return self


def fastest(ways: Mapping[str, Callable[[], object]]) -> str:
    """Return the name of the way with the shortest single time; ways take turns."""
    if len(ways) == 1:
        return next(iter(ways))
    best = dict.fromkeys(ways, float("inf"))
    end, done = time.perf_counter() + SECONDS * len(ways), 0
    while done < LEAST or time.perf_counter() < end:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
        done += 1
    return min(best, key=best.__getitem__)


def built(
    what: str, makers: Mapping[str, Callable[[], Callable[..., object]]]
) -> dict[str, Callable[..., object]]:
    """Make every way that this machine and these shapes allow. Raises `Unavailable` when none is left."""
    made, refused = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
        # torch and its extensions refuse dtypes, shapes and processors with the first; a build without a
        # library lacks its ops, which is the second.
        except (RuntimeError, AttributeError) as error:
            refused.append(f"{name}: {str(error).partition(chr(10))[0]}")
    if not made:
        raise Unavailable(f"no way to compute {what}: {'; '.join(refused)}.")
    return made
