"""Peak bandwidth and FLOP rate of a device, measured.

A ceiling is the fastest of several ways to do the same work: torch's own operations and the layer's
projections. Which way is fastest depends on device, threads and footprint. Reading is measured over as many
bytes as a forward moves, because a footprint that fits a cache is read several times faster than one that
does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter_ns as now_ns

import torch

from mla.bench.limits import growth
from mla.bench.limits.ways import OwnFailed, Way, own_ways, product_ways, random_rows, read_ways, wait
from mla.bench.results.schema import Ceiling
from mla.command.console import note
from mla.text import dtype_name, size
from mla_backends.api import Backend
from mla_backends.errors import describe, plugin_code

# Sides of the square matrices that are multiplied; larger ones are skipped once torch takes LONG seconds.
# The small ones are for a busy machine, on which only short work is ever undisturbed.
SIDES, LONG = (256, 512, 1024, 2048, 4096, 8192), 5e-3
# Features of the weight that is streamed: a multiple of the register blocks of any kernel.
FEATURES = 2048
# A way that takes so many times as long as the fastest is not repeated; is not tried again for the same
# work; and, compared with torch's fastest, is not tried at all any more.
SLOW, BEATEN, HOPELESS = 3.0, 1.5, 8.0


class Wrong(Exception):
    """A way whose result is wrong, whatever its time."""


class Microbenchmark:
    """Measures one device in one dtype. `ops` as in `MLA`: which projections are tried next to torch's.

    Measuring something again tries only the ways that were nearly the fastest, unless `anew` is set.
    """

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype, ops: str = "auto") -> None:
        self._backend, self._device, self._dtype = backend, device, dtype
        self._policy = "reference" if ops == "reference" else "auto"
        self._near: dict[str, set[str]] = {}  # work -> ways that are nearly the fastest
        self._hopeless: set[str] = set()  # ways that are not tried again
        self._wrong: set[str] = set()  # and those that never are
        self._sides: list[int] = []  # of squares that are nearly the fastest
        self.anew = False

    def read(self, count: int) -> Ceiling:
        """Return bytes per second of reading about `count` bytes repeatedly."""
        rows = max(16, count // (FEATURES * self._dtype.itemsize) // 16 * 16)
        count = rows * FEATURES * self._dtype.itemsize
        weight = random_rows(rows, FEATURES, self._dtype, self._device)
        work = f"reading {size(count, MiB='.3g')}"
        ways = [*read_ways(weight), *self._own(weight, 1, work)]
        seconds, way = self._best(ways, work)
        return Ceiling(
            work="read",
            value=count / seconds,
            source=_measured(way, size(count, MiB=".3g")),
            footprint_bytes=count,
            ours=way.ours,
        )

    def copy(self, count: int) -> Ceiling:
        """Return bytes per second, reads plus writes, of copying half of `count` bytes to the other half."""
        source = torch.ones(count // 8, dtype=torch.float32, device=self._device)
        target = torch.empty_like(source)
        moved = 2 * source.nbytes
        ways = [
            Way("copy_", lambda call: target.copy_(source)),
            Way("neg", lambda call: torch.neg(source, out=target)),
        ]
        seconds, way = self._best(ways, f"copying {moved}")
        return Ceiling(
            work="copy",
            value=moved / seconds,
            source=_measured(way, size(moved, MiB=".3g")),
            footprint_bytes=moved,
        )

    def product(self, tokens: int, inputs: int, outputs: int) -> Ceiling:
        """Return FLOP per second of [tokens, inputs] x [inputs, outputs]; a multiply-add counts as 2."""
        return self._product(tokens, inputs, outputs)[0]

    def squares(self, sides: Sequence[int] = ()) -> Iterator[Ceiling]:
        """Yield products of square matrices, from small to large, until one takes torch `LONG`."""
        for side in sides or SIDES:
            ceiling, by_torch = self._product(side, side, side)
            yield ceiling
            if by_torch > LONG:
                return

    def square(self) -> Ceiling:
        """Return the fastest square; measuring it again leaves out those that are not nearly as fast."""
        tried = SIDES if self.anew or not self._sides else self._sides
        found = list(self.squares(tried))
        best = max(found, key=lambda one: one.value)
        timed = zip(tried, found, strict=False)
        self._sides = [side for side, one in timed if one.value * BEATEN >= best.value]
        return best

    def _product(self, tokens: int, inputs: int, outputs: int) -> tuple[Ceiling, float]:
        """Return the ceiling and the seconds of torch's own fastest way."""
        dtype = dtype_name(self._dtype)
        x, weight = (random_rows(rows, inputs, self._dtype, self._device) for rows in (tokens, outputs))
        shape = f"{tokens} x {inputs} x {outputs} {dtype}"
        ways = [*product_ways(x, weight), *self._own(weight, tokens, f"multiplying {shape}")]
        timed = self._timed(ways, f"multiplying {shape}")
        seconds, way = min(timed, key=lambda one: one[0])
        by_torch = min((slow for slow, other in timed if not other.ours), default=seconds)
        if tokens == inputs == outputs:
            self._hopeless |= {other.name for slow, other in timed if slow > HOPELESS * by_torch}
        ceiling = Ceiling(
            work="matmul",
            value=2 * tokens * inputs * outputs / seconds,
            source=_measured(way, shape),
            dtype=dtype,
            footprint_bytes=self._dtype.itemsize * (tokens * inputs + inputs * outputs + tokens * outputs),
            ours=way.ours,
        )
        return ceiling, by_torch

    def _own(self, weight: torch.Tensor, tokens: int, work: str) -> list[Way]:
        """Return our own way, if there is one; one that fails is named, and torch's ways remain."""
        try:
            with plugin_code():
                return own_ways(self._backend, self._policy, weight, tokens)
        except OwnFailed as failed:
            _say_failed(failed.name, work, failed.reason)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything
            _say_failed(f"linear of backend '{self._backend.name}'", work, describe(error))
        return []

    def _best(self, ways: Sequence[Way], work: str) -> tuple[float, Way]:
        """Return the seconds of the fastest way, and the way. Raises the first error if all ways fail."""
        return min(self._timed(ways, work), key=lambda one: one[0])

    def _timed(self, ways: Sequence[Way], work: str) -> list[tuple[float, Way]]:
        """Return the seconds of every way worth timing. Raises the first error if all of them fail."""
        timed: list[tuple[float, Way]] = []
        failed: list[Exception] = []
        for way in self._worth_trying(ways, work):
            best = min((seconds for seconds, _ in timed), default=float("inf"))
            try:
                with plugin_code():
                    timed.append((self._seconds(way, SLOW * best), way))
            except Wrong:
                self._wrong.add(way.name)
                _say_wrong(way.name, work)
            except Exception as error:  # noqa: BLE001  # a device may lack an operation
                failed.append(error)
                if way.ours:
                    _say_failed(way.name, work, describe(error))
        if not timed:
            raise failed[0] if failed else Wrong(f"no way of {work} gives the right result")
        best = min(seconds for seconds, _ in timed)
        self._near[work] = {way.name for seconds, way in timed if seconds <= BEATEN * best}
        return timed

    def _worth_trying(self, ways: Sequence[Way], work: str) -> list[Way]:
        """Return the ways that may be the fastest; what was slow under another load is tried `anew`."""
        right = [way for way in ways if way.name not in self._wrong]
        if self.anew:
            self._hopeless.clear()
            return right
        left = [way for way in right if way.name not in self._hopeless]
        return [way for way in left if way.name in self._near.get(work, {way.name})] or left or right

    def _seconds(self, way: Way, enough: float) -> float:
        """Return the seconds per call of one way. Raises `Wrong`."""
        with growth.no_garbage_collection():
            return growth.per_call(lambda calls: self._region(way, calls), way.most_calls, enough)

    def _region(self, way: Way, calls: int) -> float:
        """Return the seconds of so many calls, until the last one's result is there. Raises `Wrong`."""
        way.prepare(calls)
        start = now_ns()
        for call in range(calls):
            written = way.call(call)
        wait(written)
        seconds = (now_ns() - start) / 1e9
        if not way.right(calls):
            raise Wrong
        return seconds


_SAID: set[str] = set()  # ways that were said to be wrong or to fail, once in a process


def _say_wrong(way: str, work: str) -> None:
    if way not in _SAID:
        _SAID.add(way)
        note(f"{way} is left out of the limits: its result is wrong for {work}")


def _say_failed(way: str, work: str, reason: str) -> None:
    if way not in _SAID:
        _SAID.add(way)
        note(f"{way} failed as a way of {work}, and is left out of the limits: {reason}")


def _measured(way: Way, what: str) -> str:
    return f"measured: {way.name}, {what}"
