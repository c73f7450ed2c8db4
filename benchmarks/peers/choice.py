"""Choose the fastest of several candidates for one part of a layer, by trial runs before timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from mla.errors import MLAError

# Seconds of trials per candidate.
SECONDS = 0.1
# Minimum number of trials of each.
LEAST = 4


class Unavailable(MLAError):
    """A peer that cannot run here; the message says why, and `peer` is its name, once known."""

    peer: str | None = None

    def of(self, peer: str) -> Unavailable:
        """Return this error with the peer's name."""
        self.peer = peer
        return self


def fastest(candidates: Mapping[str, Callable[[], object]]) -> str:
    """Return the name of the candidate with the shortest single time; trials are interleaved."""
    if len(candidates) == 1:
        return next(iter(candidates))
    best = dict.fromkeys(candidates, float("inf"))
    end, done = time.perf_counter() + SECONDS * len(candidates), 0
    while done < LEAST or time.perf_counter() < end:
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            best[name] = min(best[name], time.perf_counter() - start)
        done += 1
    return min(best, key=best.__getitem__)


def built(
    what: str, makers: Mapping[str, Callable[[], Callable[..., object]]]
) -> dict[str, Callable[..., object]]:
    """Build the candidates that support this machine and shapes. Raises `Unavailable` if none does."""
    made, refused = {}, []
    for name, make in makers.items():
        try:
            made[name] = make()
        # RuntimeError: torch and its extensions reject a dtype, shape or processor.
        # AttributeError: this build of torch lacks the library and so its ops.
        except (RuntimeError, AttributeError) as error:
            refused.append(f"{name}: {str(error).partition(chr(10))[0]}")
    if not made:
        raise Unavailable(f"cannot compute {what}: {'; '.join(refused)}.")
    return made
