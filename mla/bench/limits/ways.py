"""Ways to do the work whose time is a limit: torch's, which are trusted, and our own, which are checked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla.bench.limits.growth import MOST_CALLS
from mla.layer.ops import Choice, choose
from mla.verify.tolerances import BOUNDS, ROW_SLACK
from mla_backends.api import Backend, LinearSpec
from mla_backends.errors import describe, plugin_code

# Rows of random numbers, repeated to fill the factors of a product; constant data would draw less power.
RANDOM_ROWS = 256
# Rows that our own product gets in addition to those of one call: every call begins at another of them.
SPARE_ROWS = 64
# Most bytes of outputs, one for each call of a region; two of them always.
OUTPUT_BYTES = 64 << 20
# After a region: outputs, and rows and columns of each, that are compared with torch's product.
CHECKED = (8, 4, 32)


@dataclass(frozen=True)
class Way:
    """One way to do the work. `call(i)` does it for the i-th time in a region and returns what it wrote."""

    name: str
    call: Callable[[int], torch.Tensor]
    prepare: Callable[[int], None] = lambda calls: None  # before a region of so many calls, untimed
    right: Callable[[int], bool] = lambda calls: True  # whether that region's results are, untimed
    most_calls: int = MOST_CALLS
    ours: bool = False


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
        Way("sum", lambda call: numbers.sum()),
        Way("sums of rows", lambda call: numbers.sum(1)),
        Way("maximum", lambda call: numbers.amax()),
        Way("dot", lambda call: torch.dot(numbers.view(-1), numbers.view(-1))),
        Way("torch.mm of one token", lambda call: torch.mm(x, weight.t(), out=out)),
    ]


def product_ways(x: torch.Tensor, weight: torch.Tensor) -> list[Way]:
    """Return torch's ways to multiply x [tokens, inputs] by the transpose of weight [outputs, inputs]."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    ways = [Way("torch.mm", lambda call: torch.mm(x, weight.t(), out=out))]
    if x.dtype != torch.float32:
        wide = x.float(), weight.float(), out.float()
        ways.append(
            Way("torch.mm in float32", lambda call: torch.mm(wide[0], wide[1].t(), out=wide[2])),
        )
    return ways


def own_ways(backend: Backend, policy: str, weight: torch.Tensor, tokens: int) -> list[Way]:
    """Return the layer's fused projection of so many tokens, if there is one; `policy` as in `choose`.

    Raises `OwnFailed` if its weight cannot be packed.
    """
    spec = LinearSpec(weight.shape[1], weight.shape[0], 1, weight.dtype, weight.device)
    choice = choose("linear", spec, backend.ops(), policy)
    if choice.name == "reference":  # which is torch.mm
        return []
    try:
        with plugin_code():
            return [OwnProduct(choice, weight, tokens).way()]
    except Exception as error:
        raise OwnFailed(choice.name, describe(error)) from error


class OwnFailed(Exception):
    """The backend's op `name` could not even be set up."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


class OwnProduct:
    """Products by an op of the backend that can only be right if every call was made.

    Each call of a region has an output of its own, and gets rows from another place of a pool that is
    rescaled before every region: neither a remembered result nor a skipped call passes.
    """

    def __init__(self, choice: Choice, weight: torch.Tensor, tokens: int) -> None:
        self._choice, self._weight, self._tokens = choice, weight, tokens
        self._packed = choice.op.pack(weight)
        self._base = random_rows(tokens + SPARE_ROWS, weight.shape[1], weight.dtype, weight.device)
        self._pool = torch.empty_like(self._base)
        one = tokens * weight.shape[0] * weight.itemsize
        count = max(2, min(MOST_CALLS, OUTPUT_BYTES // one))
        self._out = weight.new_empty(count, tokens, weight.shape[0])
        self._starts: list[int] = []
        self._random = random.Random()  # unlike a seeded one, known to nobody beforehand

    def way(self) -> Way:
        """Return the way, checked after every region."""
        count = len(self._out)
        return Way(self._choice.name, self._call, self._prepare, self._right, count, ours=True)

    def _prepare(self, calls: int) -> None:
        self._starts = [self._random.randrange(SPARE_ROWS + 1) for _ in range(calls)]
        scales = torch.tensor([[self._random.uniform(0.5, 1.5)] for _ in range(len(self._base))])
        torch.mul(self._base, scales.to(self._base), out=self._pool)
        wait(self._pool)

    def _call(self, call: int) -> torch.Tensor:
        start, out = self._starts[call], self._out[call]
        self._choice.op(self._packed, x=self._pool[start : start + self._tokens], bias=None, out=out)
        return out

    def _right(self, calls: int) -> bool:
        """Return whether a sample of the region's results is what the float64 product of the operands is."""
        outputs, most_rows, most_columns = CHECKED
        columns = self._sample(self._weight.shape[0], most_columns)
        weight = self._weight[columns].cpu().double()
        bound = ROW_SLACK * BOUNDS[self._weight.dtype]
        for call in self._sample(calls, outputs).tolist():
            rows = self._sample(self._tokens, most_rows)
            truth = self._pool[self._starts[call] + rows].cpu().double() @ weight.t()
            error = self._out[call][rows][:, columns].cpu().double() - truth
            if not bool((error.norm(dim=-1) <= bound * truth.norm(dim=-1)).all()):
                return False
        return True

    def _sample(self, count: int, most: int) -> torch.Tensor:
        return torch.tensor(self._random.sample(range(count), min(count, most)), device=self._weight.device)
