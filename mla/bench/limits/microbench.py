"""Peak bandwidth and FLOP rate of a device, measured.

A ceiling is the fastest of many repetitions over several ways to do the same work: torch's own operations and
the layer's projections. Which way is fastest depends on device, threads and footprint. Reading is measured
over as many bytes as a forward moves, because a footprint that fits a cache is read several times faster than
one that does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from mla.bench.results.schema import Ceiling
from mla.layer.ops import choose
from mla.text import dtype_name, size
from mla_backends.api import Backend, LinearSpec

# How long each way is repeated, and the fewest repetitions.
SECONDS, REPEATS = 0.1, 5
# Least seconds between two synchronizations: the cost of one is spread over several calls.
REGION = 2e-4
# Sides of the square matrices that are multiplied; larger ones are skipped once one takes LONG seconds.
SIDES, LONG = (1024, 2048, 4096, 8192), 5e-3
# Features of the weight that is streamed: a multiple of the register blocks of any kernel.
FEATURES = 2048
# Rows of random numbers, repeated to fill the factors of a product; constant data would draw less power.
RANDOM_ROWS = 256

Ways = Mapping[str, Callable[[], object]]


class Microbenchmark:
    """Measures one device in one dtype. `ops` as in `MLA`: which projections are tried next to torch's."""

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype, ops: str = "auto") -> None:
        self._backend, self._device, self._dtype = backend, device, dtype
        self._policy = "reference" if ops == "reference" else "auto"

    def read(self, count: int) -> Ceiling:
        """Return bytes per second of reading about `count` bytes repeatedly."""
        rows = max(16, count // (FEATURES * self._dtype.itemsize) // 16 * 16)
        count = rows * FEATURES * self._dtype.itemsize
        weight = torch.ones(rows, FEATURES, dtype=self._dtype, device=self._device)
        seconds, way = self._best(self._read_ways(weight))
        return Ceiling(
            work="read",
            value=count / seconds,
            source=_measured(way, size(count, MiB=".3g")),
            footprint_bytes=count,
        )

    def copy(self, count: int) -> Ceiling:
        """Return bytes per second, reads plus writes, of copying half of `count` bytes to the other half."""
        source = torch.ones(count // 8, dtype=torch.float32, device=self._device)
        target = torch.empty_like(source)
        ways = {"copy_": lambda: target.copy_(source), "neg": lambda: torch.neg(source, out=target)}
        seconds, way = self._best(ways)
        moved = 2 * source.nbytes
        return Ceiling(
            work="copy",
            value=moved / seconds,
            source=_measured(way, size(moved, MiB=".3g")),
            footprint_bytes=moved,
        )

    def product(self, tokens: int, inputs: int, outputs: int) -> Ceiling:
        """Return FLOP per second of [tokens, inputs] x [inputs, outputs]; a multiply-add counts as 2."""
        x, weight = self._random(tokens, inputs), self._random(outputs, inputs)
        out = torch.empty(tokens, outputs, dtype=self._dtype, device=self._device)
        ways = {"torch.mm": lambda: torch.mm(x, weight.t(), out=out), **self._projection(x, weight, out)}
        seconds, way = self._best(ways)
        dtype = dtype_name(self._dtype)
        return Ceiling(
            work="matmul",
            value=2 * tokens * inputs * outputs / seconds,
            source=_measured(way, f"{tokens} x {inputs} x {outputs} {dtype}"),
            dtype=dtype,
            footprint_bytes=x.nbytes + weight.nbytes + out.nbytes,
        )

    def squares(self) -> Iterator[Ceiling]:
        """Yield products of square matrices, from small to large, until one takes `LONG`."""
        for side in SIDES:
            ceiling = self.product(side, side, side)
            yield ceiling
            if 2 * side**3 / ceiling.value > LONG:
                return

    def _read_ways(self, weight: torch.Tensor) -> Ways:
        x, out = weight[:1].clone(), weight.new_empty(1, weight.shape[0])
        numbers = weight.view(torch.float32)  # sums of other dtypes are widened first, which is slow
        return {
            "sum": numbers.sum,
            "sums of rows": lambda: numbers.sum(1),
            "maximum": numbers.amax,
            "dot": lambda: torch.dot(numbers.view(-1), numbers.view(-1)),
            "torch.mm of one token": lambda: torch.mm(x, weight.t(), out=out),
            **self._projection(x, weight, out),
        }

    def _projection(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Ways:
        """Return the layer's fused projection, if there is one."""
        spec = LinearSpec(weight.shape[1], weight.shape[0], 1, self._dtype, self._device)
        choice = choose("linear", spec, self._backend.ops(), self._policy)
        if choice.name == "reference":  # which is torch.mm
            return {}
        packed = choice.op.pack(weight)
        return {choice.name: lambda: choice.op(packed, x=x, bias=None, out=out)}

    def _random(self, rows: int, columns: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(min(rows, RANDOM_ROWS), columns, generator=generator)
        return block.to(self._device, self._dtype).repeat(-(-rows // RANDOM_ROWS), 1)[:rows].contiguous()

    def _best(self, ways: Ways) -> tuple[float, str]:
        """Return the seconds and the name of the fastest way. Raises the first error if all ways fail."""
        timed: list[tuple[float, str]] = []
        failed: list[Exception] = []
        for name, work in ways.items():
            try:
                timed.append((self._shortest(work), name))
            except Exception as error:  # noqa: BLE001  # a device may lack an operation
                failed.append(error)
        if not timed:
            raise failed[0]
        return min(timed)

    def _shortest(self, work: Callable[[], object]) -> float:
        """Return the seconds per call in the fastest region between two synchronizations."""
        self._region(work, 1)  # loads kernels and touches pages
        calls = max(1, min(1000, int(REGION / max(self._region(work, 1), 1e-9))))
        best, end, done = float("inf"), time.perf_counter() + SECONDS, 0
        while done < REPEATS or time.perf_counter() < end:
            best = min(best, self._region(work, calls) / calls)
            done += 1
        return best

    def _region(self, work: Callable[[], object], calls: int) -> float:
        self._backend.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self._backend.synchronize()
        return time.perf_counter() - start


def _measured(way: str, what: str) -> str:
    return f"measured: {way}, {what}"
