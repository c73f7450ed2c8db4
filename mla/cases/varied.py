"""A case on a device, its op called as often as wanted: with other operands every time, and known results.

A call takes rows from a pool and turns signs, in ways that move and turn the rows of the result alike. By
default rows change places, and signs are the kind's, per column. Signs and moves are exact in every dtype.
They follow from the seed, the number of the pass and the index of the call, so that all implementations get
the same operands.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, starmap
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

from mla.cases.case import OPTIONAL, OpCase, generator
from mla.cases.memory import NO_GAPS, Pages, Piece, Tensors, poison_all
from mla.reference import REFERENCE
from mla.verify.op_oracle import attend_requests, product
from mla.verify.places import Places
from mla.verify.verdict import Check
from mla_backends.api import FusedOp, SegmentLengths

if TYPE_CHECKING:
    from mla.cases.kinds import Attention

# The fewest rows of a pool, so that even a call of one row gets another one than most others.
POOL_ROWS = 64
# Blocks of columns of a projection's input that each call fills from rows of their own, and the most bytes of
# float64 products that this may take; beyond them, whole rows change places.
BLOCKS, PARTS_BYTES = 4, 256 << 20
# Queries that have alternatives, and the number of different calls that these must allow.
HOMES, VARIETY, MOST_CHOICES = 20, 2**20, 128
HOPELESS = 100.0  # times what the table of bounds allows: the reference errs less


@dataclass(frozen=True)
class Change:
    """The operands of one call. `signs`: of operands (per block of columns, [blocks, ..]) and of results."""

    number: int  # of the pass
    rows: torch.Tensor  # [blocks, n] int64: which rows of the pool
    signs: Tensors = field(default_factory=dict)


class Pool:
    """Rows of operands for calls that all differ: more than a call takes, each with its row of the truth."""

    def __init__(self, case: OpCase, calls: int = 1) -> None:
        """`calls`: that a pass has. Nothing is drawn yet."""
        self.case, self.calls, self.entry = case, calls, case.entry
        self.given: Tensors = {}
        self.truth: Tensors = {}

    @property
    def varied(self) -> tuple[str, ...]:
        """The operands that differ from call to call."""
        return self.entry.varied

    @property
    def size(self) -> tuple[int, int]:
        """Number of rows in the pool, and of those that one call takes."""
        return max(self.case.rows, POOL_ROWS), self.case.rows

    @property
    def width(self) -> int:
        """Number of columns of a row of the pool."""
        return prod(self.case.shape(self.entry.operands[self.entry.varied[0]])[1:])

    @property
    def columns(self) -> list[slice]:
        """The blocks of columns that are filled from rows of their own."""
        return [slice(None)]

    def draw(self) -> None:
        """Fill `given` and `truth`."""
        random, dtype = generator(self.case.seed, self.case.name), self.case.spec.dtype

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=random) * scale).to(dtype)

        self.given = self.entry.encoded(self.case, self.entry.draw(self.case, normal, self.size[0]))
        self.truth = self._true()

    def _true(self) -> Tensors:
        return self.entry.truth(self.case.spec, self.given | self.case.scalars, self.case.lengths)

    def change(self, number: int, index: int) -> Change:
        """Return the change of call `index` in pass `number`."""
        draw, (pool, rows) = self.random(number, index), self.size
        signs = self.entry.signs(self.case, draw)
        signs |= {name: signs[name][None] for name in self.entry.varied if name in signs}
        return Change(number, torch.randperm(pool, generator=draw)[None, :rows], signs)

    def pass_signs(self, number: int) -> Tensors:
        """Return the signs of the operands that change once per pass, by name."""
        return {}

    def expected(self, change: Change, name: str) -> torch.Tensor:
        """Return what a call must write to the result `name`, in float64 on the host."""
        rows = self.truth[name].index_select(0, change.rows[0]).view(self.case.shape(self.entry.truths[name]))
        return rows * change.signs[name] if name in change.signs else rows

    def check(self, results: Tensors, change: Change, places: Places) -> Check:
        """Judge a call's results on the host, rows [T, ..] by name: by the table of bounds, or the reference.

        The reference runs where the table is not enough, on the host: no device vouches for itself.
        """
        entry, dtype = self.entry, self.case.spec.dtype
        truth = {name: self.expected(change, name) for name in self.truth}
        none = {name: torch.zeros(truth[name].shape[:-1], dtype=torch.float64) for name in entry.held}
        check = entry.judge(results, truth, none, dtype, places)
        if check.status == "ok" or not entry.held or (check.error_ratio or HOPELESS) >= HOPELESS:
            return check
        call, reference = self._call
        call.begin(change.number)
        call.take(change, reference)
        call.run()
        call.fetch(reference)
        return entry.judge(results, truth, entry.errors(reference, truth), dtype, places)

    @cached_property
    def _call(self) -> tuple[Call, Tensors]:
        """The reference's call, and memory for its results."""
        spec = replace(self.case.spec, device=torch.device("cpu"))
        call = Call(self, REFERENCE[self.case.kind], spec)
        call.prepare()
        return call, call.buffers(1)[0]

    def random(self, *numbers: int) -> torch.Generator:
        """Return the generator of a call, or of a pass."""
        words = (self.case.seed, self.case.name, *numbers)
        return torch.Generator().manual_seed(random.Random(repr(words)).getrandbits(63))


def draw_signs(draw: torch.Generator, *shape: int) -> torch.Tensor:
    """Return 1 and -1, at random."""
    return torch.randint(0, 2, shape, generator=draw).mul_(2).sub_(1).float()


class Products(Pool):
    """Rows of a projection: every block of columns comes from a row of its own, with a sign of its own.

    `parts` [blocks, P, .., o] are the products by block of columns.
    """

    parts: torch.Tensor

    @property
    def columns(self) -> list[slice]:
        product_bytes = 8 * self.size[0] * self.case.spec.groups * self.case.spec.out_features
        if BLOCKS * product_bytes > PARTS_BYTES:
            return [slice(None)]
        ends = [self.case.spec.in_features * part // BLOCKS for part in range(BLOCKS + 1)]
        return [slice(*pair) for pair in pairwise(ends)]

    def _true(self) -> Tensors:
        x, weight, bias = self.given["x"], self.given["weight"], self.given.get("bias")
        products = [product(x[..., part], weight[..., part]) for part in self.columns]
        self.parts = torch.stack(products) if len(products) > 1 else products[0][None]
        return {"out": self.parts.sum(0) + (0 if bias is None else bias.double())}

    def change(self, number: int, index: int) -> Change:
        draw, blocks, (pool, rows) = self.random(number, index), len(self.columns), self.size
        chosen = torch.stack([torch.randperm(pool, generator=draw)[:rows] for _ in range(blocks)])
        heads = self.given["x"].shape[1:-1]
        return Change(number, chosen, {"x": draw_signs(draw, blocks, rows, *heads, 1)})

    def expected(self, change: Change, name: str) -> torch.Tensor:
        total = torch.zeros(self.case.results[name], dtype=torch.float64)
        for part, rows, signs in zip(self.parts, change.rows, change.signs["x"], strict=True):
            total += part.index_select(0, rows) * signs
        return total + self.given["bias"].double() if "bias" in self.given else total


class Queries(Pool):
    """Queries of attention, rows [T * h], and then alternatives of some of them.

    A call replaces some queries; where all heads share their keys, heads change places as well. Keys and
    values change signs in place, once per pass: per column, with those of queries, so that scores stay.
    """

    entry: Attention
    together, most = 1, MOST_CHOICES  # rows that are replaced together, and the most alternatives of them

    @property
    def homes(self) -> list[int]:
        """The groups of rows t * h + head that have alternatives: evenly spread."""
        groups = self.case.rows * self.case.spec.num_heads // self.together
        count = min(groups, HOMES)
        return [number * groups // count for number in range(count)]

    @property
    def choices(self) -> int:
        """Number of alternatives of such a group, itself included."""
        return min(max(2, ceil(VARIETY ** (1 / max(1, len(self.homes))))), self.most)

    @property
    def size(self) -> tuple[int, int]:
        queries = self.case.rows * self.case.spec.num_heads
        return queries + len(self.homes) * (self.choices - 1) * self.together, queries

    def _true(self) -> Tensors:
        heads, count = self.case.spec.num_heads, self.size[1]
        given = {**self.given, **self.case.scalars, "q": self.given["q"][:count].unflatten(0, (-1, heads))}
        truth = self.entry.truth(self.case.spec, given, self.case.lengths)
        parts = zip(truth.items(), self._alternatives(), strict=True)
        return {name: torch.cat((rows.flatten(0, 1), others)) for (name, rows), others in parts}

    def _alternatives(self) -> tuple[torch.Tensor, ...]:
        """Return out and lse of the alternatives: each sees the keys that the query it stands for sees."""
        case, heads = self.case, self.case.spec.num_heads
        k, v = self.entry.keys(case.spec, self.given)
        scale, results = case.spec.softmax_scale, []
        alternatives = self.given["q"][self.size[1] :].split(self.choices - 1)
        for home, queries in zip(self.homes, alternatives, strict=True):
            token, head = divmod(home, heads)
            rows = self.keys_of(token)
            head_of = slice(head, head + 1) if k.shape[1] > 1 else slice(None)
            seen = SegmentLengths((1,), (len(k[rows]),), causal=False)
            out, lse = attend_requests(queries[None], k[rows, head_of], v[rows, head_of], seen, scale)
            results.append((out[0], lse[0]))
        return tuple(torch.cat(part) for part in zip(*results, strict=True))

    def keys_of(self, token: int) -> slice | torch.Tensor:
        """Return which keys a query attends to, among those of all requests."""
        first, seen = self.case.spans[token]
        return slice(first, first + seen)

    def pass_signs(self, number: int) -> Tensors:
        draw, given = self.random(number), self.given
        names = [name for name, x in given.items() if name not in self.varied and x.is_floating_point()]
        return {name: draw_signs(draw, *given[name].shape[1:]) for name in names}  # bytes have none

    def turned(self, signs: Tensors) -> Tensors:
        """Return the signs of queries and results, given those of keys and values, as of one key."""
        keys, values = self.entry.keys(self.case.spec, signs)
        return {"q": keys, "out": values}

    def change(self, number: int, index: int) -> Change:
        draw, heads = self.random(number, index), self.case.spec.num_heads
        signs = {name: signs[None] for name, signs in self.pass_signs(number).items()}
        order = torch.arange(heads) if "k" in self.given else torch.randperm(heads, generator=draw)
        chosen = self._chosen(draw, number, index).view(-1, heads)[:, order].reshape(1, -1)
        return Change(number, chosen, self.turned(signs) if signs else {})

    def _chosen(self, draw: torch.Generator, number: int, index: int) -> torch.Tensor:
        """Return the queries' rows in the pool [T * h]: each home takes itself or one of its alternatives."""
        choices = torch.randint(0, self.choices, (len(self.homes),), generator=draw)
        order = torch.randperm(self.choices, generator=self.random(number))
        choices[0] = order[index % self.choices]  # so that a single query, too, is another one every time
        count, more = self.size[1] // self.together, self.choices - 1
        groups, homes = torch.arange(count), torch.tensor(self.homes)
        groups[homes] = torch.where(choices > 0, count + torch.arange(len(homes)) * more + choices - 1, homes)
        return (groups[:, None] * self.together + torch.arange(self.together)).flatten()


class Call:
    """A repeatable call of an op; only `run` is timed.

    Every call gets operands of its own, in the same memory. Memory around a strided operand is poisoned.
    """

    def __init__(self, pool: Pool, op: FusedOp, spec: Any, case: OpCase | None = None) -> None:
        """Place the operands on the spec's device, and pack the weight.

        `case`: the pool's, in another layout. Raises what `pack` raises.
        """
        self.pool, self.case, self.op = pool, case or pool.case, op
        self.spec, self.device = spec, spec.device
        self.leading: tuple[Any, ...] = ()  # a packed weight, or the result of `prepare`
        self.arguments: dict[str, Any] = {}
        self.pages: Pages | None = None
        self._batch: Any = None
        self._change: Change | None = None  # that of the last call
        self._signs: Tensors = {}  # those that the operands have at present which change once per pass
        entry, given = pool.entry, pool.given
        if entry.packed:
            self.leading = (op.pack(self.laid("weight", given["weight"])),)
        for name, words in entry.operands.items():
            if name in pool.varied:
                self.arguments[name] = self.blank(name, self.case.shape(words))
            elif name in given:
                self.lay(name, given[name])
            elif name in OPTIONAL and name not in entry.results:
                self.arguments[name] = None
        self.arguments.update(self.case.scalars)
        entry.place(self)
        self._pools = {name: given[name].to(self.device) for name in pool.varied}

    def laid(self, name: str, tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
        """Return memory that holds a host tensor. A subclass may have rows of `fill` around it."""
        return self.blank(name, tuple(tensor.shape)).copy_(tensor)

    def lay(self, name: str, tensor: torch.Tensor, fill: float = torch.nan) -> None:
        """Put an operand into memory."""
        self.arguments[name] = self.laid(name, tensor, fill)

    def lay_pages(self, pages: Pages, keys: torch.Tensor) -> None:
        """Put keys [K, w] into the pages of a cache."""
        self.arguments["cache"] = pages.cache(keys).to(self.device)

    def lay_tables(self, tables: Tensors) -> None:
        """Put tables into one memory, as a layer's batch has them: behind slots and positions, unseen."""
        unseen = torch.zeros(3 * sum(self.case.query_lens))
        memory = torch.cat([unseen, *(table.flatten() for table in tables.values())]).int().to(self.device)
        parts = memory[len(unseen) :].split([table.numel() for table in tables.values()])
        for (name, table), part in zip(tables.items(), parts, strict=True):
            self.arguments[name] = part.view(table.shape)

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights, and of the cache: 0 without one."""
        entry, cache = self.pool.entry, self.arguments.get("cache")
        weights = [self.arguments[name].nbytes for name in entry.weights]
        weights += [self.leading[0].nbytes] if entry.packed else []
        return {"weight_bytes": sum(weights), "cache_bytes": 0 if cache is None else cache.nbytes}

    @property
    def written(self) -> list[str]:
        """The results that the op is held to."""
        return self.pool.entry.judged(self.op)

    def blank(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return poisoned memory for an operand, or a result."""
        gaps = self.case.layout.gaps.get(name, NO_GAPS)
        return Piece(shape, self.case.dtype(name), self.device, gaps, guard=0).part

    def buffers(self, count: int) -> list[Tensors]:
        """Return memory for the results of so many calls."""
        results = self.case.results
        return [{name: self.blank(name, shape) for name, shape in results.items()} for _ in range(count)]

    def prepare(self) -> bool:
        """Prepare the op's state for the batch; return whether it has one. Never part of the timed call."""
        self._batch = self.pool.entry.batch(self.arguments, self.case.lengths)  # lives as long as the state
        if self._batch is not None:
            self.leading = (self.op.prepare(self.spec, self._batch),)
        return self._batch is not None

    def begin(self, number: int) -> None:
        """Begin pass `number`: some operands change in place, once per pass."""
        self._change, signs = None, self.pool.pass_signs(number)
        for name, new in signs.items():
            operand = self.arguments["cache" if name == "keys" else name]
            operand.mul_((new * self._signs.get(name, 1)).to(operand))  # poison stays poison
        self._signs = signs

    def upload(self, change: Change) -> Change:
        """Return a change with what its operands need on the device."""
        varied = self._pools.keys() & change.signs.keys()
        signs = {name: change.signs[name].to(self._pools[name]) for name in varied}
        return replace(change, rows=change.rows.to(self.device), signs=signs)

    def take(self, change: Change, results: Tensors) -> None:
        """Write the operands of a call to where the op reads them; it will write to `results`."""
        self._change = change
        for name in self._pools:
            for target, values in self._contents(change, name):
                target.copy_(values)
        poison_all(results)
        self.pool.entry.offer(self, results)

    def run(self) -> None:
        """Call the op once."""
        self.op(*self.leading, **self.arguments)

    def fetch(self, results: Tensors) -> None:
        """Copy what the last call wrote to `results`, unless it wrote there."""
        for name, written in self.pool.entry.written(self.arguments).items():
            if written is not results[name]:
                results[name].copy_(written)

    def places(self) -> Places:
        """Return which request and position every row of the results belongs to."""
        return self.case.places(None if self.pages is None else self.pages.table)

    def damage(self) -> str:
        """Return what the last call wrote outside the results, as a clause; "" if nothing."""
        strays, change = self.pool.entry.strays(self.case, self.arguments), self._change
        if change is None:
            return strays
        same = {name: all(starmap(torch.equal, self._contents(change, name))) for name in self._pools}
        changed = [name for name, kept in same.items() if not kept]
        clause = f"the op wrote to its input {' and '.join(changed)}" if changed else ""
        return "; ".join(filter(None, (strays, clause)))

    def _contents(self, change: Change, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the parts of an operand, and what a call gets in them."""
        operand, pool, signs = self.arguments[name], self._pools[name], change.signs.get(name)
        for block, columns in enumerate(self.pool.columns):
            target = operand[..., columns]
            values = pool[..., columns].index_select(0, change.rows[block].to(pool.device)).view(target.shape)
            yield target, values if signs is None else values * signs[block].to(pool)
