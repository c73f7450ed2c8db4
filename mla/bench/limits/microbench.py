"""Peak bandwidth and FLOP rate of a device, measured.

A ceiling is the fastest of several ways to do the same work: torch's own operations, which are trusted, and
the layer's projections, which are checked. Which way is fastest depends on device, threads and footprint.
Reading is measured over as many bytes as a forward moves, because a footprint that fits a cache is read
several times faster than one that does not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns as now_ns
from typing import Literal

import torch

from mla.bench.results.schema import Ceiling
from mla.command.console import note_once
from mla.layer.ops import Choice, choose
from mla.text import dtype_name, size
from mla.verify.tolerances import BOUNDS, ROW_SLACK
from mla_backends.api import Backend, LinearSpec
from mla_backends.errors import describe, plugin_code

# ---------------------------------------------------------------------------------------- seconds per call
# As the growth from N to 2N calls: what a region costs whatever it holds drops out.

# How long regions are repeated, the fewest repetitions, and the time after which even those are cut short.
REPEAT_S, REPEATS, MAX_REPEAT_S = 0.02, 3, 0.2
# Seconds by which 2N calls must take longer than N, unless the longer region takes LONG_REGION_S already.
MIN_GROWTH_S, LONG_REGION_S = 2e-4, 5e-2
# The longer region takes at least so many times as long: a constant cost is then no more than the work.
RATIO = 1.5
# Calls that take longer are not repeated beyond a second try.
LONG_CALL_S = 0.25
MAX_CALLS = 4096

Region = Callable[[int], float]  # number of calls -> seconds
Work = Literal["read", "copy", "matmul"]


def per_call(region: Region, enough: float = float("inf")) -> float:
    """Return the seconds of one call. More than `enough` need not be exact.

    Regions are repeated; the shortest of N and of 2N calls count, because noise only adds.
    """
    once = region(1)  # loads kernels and touches pages
    if once > LONG_CALL_S:
        return min(once, region(1))
    calls, short, long = 1, region(1), region(2)
    while long < LONG_REGION_S and 8 * calls <= MAX_CALLS:
        if long - short >= MIN_GROWTH_S and long >= RATIO * short:
            break
        calls *= 4
        short, long = region(calls), region(2 * calls)
    end, done = now_ns() + 1e9 * REPEAT_S, 1
    last = now_ns() + 1e9 * MAX_REPEAT_S
    while (done < REPEATS or now_ns() < end) and now_ns() < last:
        if done >= 2 and long / (2 * calls) > enough:
            break
        short, long = min(short, region(calls)), min(long, region(2 * calls))
        done += 1
    return grown(short, long, calls)


def grown(short: float, long: float, calls: int) -> float:
    """Return the seconds per call from those of regions of `calls` and of twice as many.

    Where the longer region takes less than `RATIO` times as long, as if the shorter ones alone were
    disturbed, what is constant cannot be told from noise, and counts.
    """
    grew = long - short if long >= RATIO * short else long
    return min(grew, short, long / 2) / calls


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off inside the `with` block, as it is while forwards are timed."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# --------------------------------------------------------------------------------------- ways to do the work

# Rows of random numbers, repeated to fill the factors of a product; constant data would draw less power.
RANDOM_ROWS = 256
# Rows and columns of a result that are compared with the product in float64.
CHECKED = (8, 32)


@dataclass(frozen=True)
class Way:
    """One way to do the work: `call` does it once and returns what it wrote."""

    name: str
    call: Callable[[], torch.Tensor]
    prepare: Callable[[], object] = lambda: None  # before a region of calls, untimed
    right: Callable[[], bool] = lambda: True  # whether the region's last result is, untimed
    ours: bool = False

    def ceiling(self, work: Work, rate: float, what: str, nbytes: int, dtype: str | None = None) -> Ceiling:
        """Return what this way reaches, in bytes or FLOPs per second."""
        source = f"measured: {self.name}, {what}"
        return Ceiling(
            work=work, value=rate, source=source, dtype=dtype, footprint_bytes=nbytes, ours=self.ours
        )


def wait(written: torch.Tensor) -> None:
    """Wait for a tensor by reading one element of it back, in the order of the device's stream.

    Not by the backend's `synchronize`, which could take longer here than where forwards are timed.
    """
    written[(0,) * written.dim()].to("cpu")


def random_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return [rows, columns] of N(0, 1); blocks of `RANDOM_ROWS` repeat."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(rows, RANDOM_ROWS), columns, generator=generator)
    return block.to(device, dtype).repeat(-(-rows // RANDOM_ROWS), 1)[:rows].contiguous()


def read_ways(weight: torch.Tensor) -> list[Way]:
    """Return torch's ways to read all of a weight [rows, features]."""
    x, out = weight[:1].clone(), weight.new_empty(1, weight.shape[0])
    numbers = weight.view(torch.float32)  # sums of other dtypes are widened first, which is slow
    return [
        Way("sum", lambda: numbers.sum()),
        Way("sums of rows", lambda: numbers.sum(1)),
        Way("maximum", lambda: numbers.amax()),
        Way("dot", lambda: torch.dot(numbers.view(-1), numbers.view(-1))),
        Way("torch.mm of one token", lambda: torch.mm(x, weight.t(), out=out)),
    ]


def product_ways(x: torch.Tensor, weight: torch.Tensor) -> list[Way]:
    """Return torch's ways to multiply x [tokens, inputs] by the transpose of weight [outputs, inputs]."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    ways = [Way("torch.mm", lambda: torch.mm(x, weight.t(), out=out))]
    if x.dtype != torch.float32:
        wide = x.float(), weight.float(), out.float()
        ways.append(Way("torch.mm in float32", lambda: torch.mm(wide[0], wide[1].t(), out=wide[2])))
    return ways


def own_product(choice: Choice, weight: torch.Tensor, tokens: int) -> Way:
    """Return a product by an op of the backend; after every region a part of its last result is checked."""
    packed = choice.op.pack(weight)
    x = random_rows(tokens, weight.shape[1], weight.dtype, weight.device)
    out = weight.new_empty(tokens, weight.shape[0])
    rows, columns = (_spread(*pair, weight.device) for pair in zip(out.shape, CHECKED, strict=True))
    truth = x[rows].cpu().double() @ weight[columns].cpu().double().t()
    bound = ROW_SLACK * BOUNDS[weight.dtype] * truth.norm(dim=-1)

    def call() -> torch.Tensor:
        choice.op(packed, x=x, bias=None, out=out)
        return out

    def right() -> bool:
        error = out[rows][:, columns].cpu().double() - truth
        return bool((error.norm(dim=-1) <= bound).all())  # NaN is not

    return Way(choice.name, call, lambda: wait(out.fill_(torch.nan)), right, ours=True)


def _spread(count: int, most: int, device: torch.device) -> torch.Tensor:
    """Return up to `most` of `count` indices, evenly spread, with the first and the last."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long().to(device)


# --------------------------------------------------------------------------------------------- the ceilings

# Sides of the square matrices that are multiplied; larger ones are skipped once torch takes LONG_PRODUCT_S.
# The small ones are for a busy machine, on which only short work is ever undisturbed.
SIDES, LONG_PRODUCT_S = (256, 512, 1024, 2048, 4096, 8192), 5e-3
# Features of the weight that is streamed: a multiple of the register blocks of any kernel.
FEATURES = 2048
# A way that takes so many times as long as the fastest is not repeated; and in a product of matrices that
# takes HOPELESS_S or more, is not tried any more.
SLOW, HOPELESS, HOPELESS_S = 3.0, 8.0, 1e-2


class Wrong(Exception):
    """A way whose result is wrong, whatever its time."""


class Microbenchmark:
    """Measures one device in one dtype. `ops` as in `MLA`: which projections are tried next to torch's."""

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype, ops: str = "auto") -> None:
        self._backend, self._device, self._dtype = backend, device, dtype
        self._policy = "reference" if ops == "reference" else "auto"
        self._out: set[str] = set()  # ways that are wrong, or hopeless

    def read(self, count: int) -> Ceiling:
        """Return bytes per second of reading about `count` bytes repeatedly."""
        rows = max(16, count // (FEATURES * self._dtype.itemsize) // 16 * 16)
        count = rows * FEATURES * self._dtype.itemsize
        weight, what = random_rows(rows, FEATURES, self._dtype, self._device), size(count, unit="MiB")
        seconds, way = self._timed(read_ways(weight), f"reading {what}", weight)[0]
        return way.ceiling("read", count / seconds, what, count)

    def copy(self, count: int) -> Ceiling:
        """Return bytes per second, reads plus writes, of copying half of `count` bytes to the other half."""
        source = torch.ones(count // 8, dtype=torch.float32, device=self._device)
        target, moved = torch.empty_like(source), 2 * source.nbytes
        ways = [Way("copy_", lambda: target.copy_(source)), Way("neg", lambda: torch.neg(source, out=target))]
        seconds, way = self._timed(ways, f"copying {moved}")[0]
        return way.ceiling("copy", moved / seconds, size(moved, unit="MiB"), moved)

    def product(self, tokens: int, inputs: int, outputs: int) -> Ceiling:
        """Return FLOP per second of [tokens, inputs] x [inputs, outputs]; a multiply-add counts as 2."""
        return self._product(tokens, inputs, outputs)[0]

    def squares(self) -> Iterator[Ceiling]:
        """Yield products of square matrices, from small to large, until one takes torch `LONG_PRODUCT_S`."""
        for side in SIDES:
            ceiling, by_torch = self._product(side, side, side)
            yield ceiling
            if by_torch > LONG_PRODUCT_S:
                return

    def square(self) -> Ceiling:
        """Return the fastest square."""
        return max(self.squares(), key=lambda ceiling: ceiling.value)

    def _product(self, tokens: int, inputs: int, outputs: int) -> tuple[Ceiling, float]:
        """Return the ceiling and the seconds of torch's own fastest way."""
        dtype, wide = dtype_name(self._dtype), self._dtype.itemsize
        x, weight = (random_rows(rows, inputs, self._dtype, self._device) for rows in (tokens, outputs))
        shape = f"{tokens} x {inputs} x {outputs} {dtype}"
        timed = self._timed(product_ways(x, weight), f"multiplying {shape}", weight, tokens)
        by_torch = next((seconds for seconds, way in timed if not way.ours), timed[0][0])
        least = max(HOPELESS * by_torch, HOPELESS_S)
        self._out |= {way.name for seconds, way in timed if seconds > least}
        (seconds, way), flops = timed[0], 2 * tokens * inputs * outputs
        footprint = wide * (tokens * inputs + inputs * outputs + tokens * outputs)
        return way.ceiling("matmul", flops / seconds, shape, footprint, dtype), by_torch

    def _timed(
        self, ways: Sequence[Way], work: str, weight: torch.Tensor | None = None, tokens: int = 1
    ) -> list[tuple[float, Way]]:
        """Return the seconds of every way that is not out, the fastest first.

        With a `weight`, the backend's projection of so many tokens is one more; if that fails it is named.
        Raises the first error if all ways fail.
        """
        timed: list[tuple[float, Way]] = []
        failed: list[Exception] = []

        def add(way: Way) -> None:
            best = min((seconds for seconds, _ in timed), default=float("inf"))
            if way.name not in self._out:
                timed.append((self._seconds(way, SLOW * best), way))

        for way in ways:
            try:
                add(way)
            except Exception as error:  # noqa: BLE001  # a device may lack an operation
                failed.append(error)
        name = f"linear of backend '{self._backend.name}'"
        try:
            with plugin_code():
                choice = None if weight is None else self._choice(weight)
                if choice is not None and weight is not None:
                    name = choice.name
                    add(own_product(choice, weight, tokens))
        except Wrong:
            self._out.add(name)
            note_once(f"{name} is left out of the limits: its result is wrong for {work}", about=name)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything
            left_out = f"failed when {work}, and is left out of the limits: {describe(error)}"
            note_once(f"{name} {left_out}", about=name)
        if not timed:
            raise failed[0] if failed else Wrong(f"no op is left for {work}")
        return sorted(timed, key=lambda pair: pair[0])

    def _choice(self, weight: torch.Tensor) -> Choice | None:
        """Return what the layer's own projection would be; None for the reference, which is torch.mm."""
        spec = LinearSpec(weight.shape[1], weight.shape[0], 1, weight.dtype, weight.device)
        choice = choose("linear", spec, self._backend.ops(), self._policy)
        return None if choice.name == "reference" else choice

    def _seconds(self, way: Way, enough: float) -> float:
        """Return the seconds per call of one way. Raises `Wrong`."""
        with no_garbage_collection():
            return per_call(lambda calls: self._region(way, calls), enough=enough)

    def _region(self, way: Way, calls: int) -> float:
        """Return the seconds of so many calls, until the last one's result is there. Raises `Wrong`."""
        way.prepare()
        start = now_ns()
        for _ in range(calls):
            written = way.call()
        wait(written)
        seconds = (now_ns() - start) / 1e9
        if not way.right():
            raise Wrong
        return seconds
