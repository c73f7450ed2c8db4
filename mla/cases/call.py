"""A case on a device: its operands in memory, the op called as often as wanted, and what it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import Any

import torch

from mla.cases.case import OPTIONAL, OpCase
from mla.cases.memory import (
    AROUND,
    GUARD,
    PLAIN,
    Layout,
    Pages,
    Placed,
    Tensors,
    blank,
    hardly_touched,
    place,
    poison_all,
    scattered,
)
from mla.cases.stress import Drawing
from mla.cases.values import shape as unusual
from mla.cases.varied import Change, Pool
from mla.reference import REFERENCE
from mla.verify.layer_check import TAIL
from mla.verify.places import Places
from mla.verify.verdict import Check
from mla_backends.api import FusedOp, Packed


class Call:
    """A repeatable call of an op; only `run` is timed.

    Every call gets operands of its own, in the same memory. Memory around a strided operand is poisoned.
    """

    def __init__(
        self,
        pool: Pool,
        op: FusedOp,
        spec: Any,
        case: OpCase | None = None,
        packed: Packed | None = None,
    ) -> None:
        """Place the operands on the spec's device, and pack the weight unless it is given.

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
            self.leading = (packed or op.pack(self.laid("weight", given["weight"])),)
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

    @property
    def layout(self) -> Layout:
        """That of the cache: slots past a request's end hold what the op can bear."""
        return dataclasses.replace(self.case.layout, tail=torch.nan if self.op.nan_safe_tail else TAIL)

    def laid(
        self, name: str, tensor: torch.Tensor, fill: float = torch.nan, guard: int = GUARD
    ) -> torch.Tensor:
        """Return memory that holds a host tensor. A subclass may have `guard` rows of `fill` around it."""
        return self.blank(name, tuple(tensor.shape)).copy_(tensor)

    def lay(self, name: str, tensor: torch.Tensor, fill: float = torch.nan, guard: int = GUARD) -> None:
        """Put an operand into memory."""
        self.arguments[name] = self.laid(name, tensor, fill, guard)

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

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        held = sum(self.arguments[name].nbytes for name in self.pool.entry.weights)
        return held + (self.leading[0].nbytes if self.pool.entry.packed else 0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache; 0 without one."""
        return self.arguments["cache"].nbytes if "cache" in self.arguments else 0

    @property
    def written(self) -> list[str]:
        """The results that the op has; it may have no log-sum-exp."""
        return [name for name in self.case.results if name != "lse" or self.op.writes_lse]

    def blank(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return poisoned memory for an operand, or a result."""
        return blank(shape, self.case.dtype(name), self.device, self.case.layout.margins.get(name, (0, 0)))

    def buffers(self, count: int) -> list[Tensors]:
        """Return memory for the results of so many calls."""
        stacks = {name: self.blank(name, (count, *shape)) for name, shape in self.case.results.items()}
        return [{name: stack[index] for name, stack in stacks.items()} for index in range(count)]

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
        return dataclasses.replace(change, rows=change.rows.to(self.device), signs=signs)

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
        if self._change is None:
            return self.pool.entry.strays(self.case, self.arguments)
        changed = [name for name in self._pools if not self._intact(self._change, name)]
        clause = f"the op wrote to {' and '.join(changed)}, which it only reads" if changed else ""
        return "; ".join(filter(None, (self.pool.entry.strays(self.case, self.arguments), clause)))

    def _intact(self, change: Change, name: str) -> bool:
        return all(torch.equal(target, values) for target, values in self._contents(change, name))

    def _contents(self, change: Change, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the parts of an operand, and what a call gets in them."""
        operand, pool, signs = self.arguments[name], self._pools[name], change.signs.get(name)
        for block, columns in enumerate(self.pool.columns):
            target = operand[..., columns]
            values = pool[..., columns].index_select(0, change.rows[block].to(pool.device)).view(target.shape)
            yield target, values if signs is None else values * signs[block].to(pool)


class Host:
    """The host's side of one call: operands, what it must write, and how far the reference is from that."""

    varied: tuple[str, ...] = ()  # every call has the same operands

    def __init__(self, case: OpCase, given: Tensors | None = None) -> None:
        """Draw the operands unless they are given. `case` has a stress, and is on the host."""
        self.case, self.entry = case, case.entry
        drawn = given
        if drawn is None:
            drawn = unusual(case, self.entry.draw(case, Drawing(case), self.entry.rows(case)))
        shapes = {name: case.shape(self.entry.operands[name]) for name in self.entry.varied}
        self.given = drawn | {name: drawn[name].view(shape) for name, shape in shapes.items()}

    @cached_property
    def truth(self) -> Tensors:
        """What a call must write, in float64."""
        return self.entry.truth(self.case.spec, self.given | self.case.scalars, self.case.lengths)

    @cached_property
    def errors(self) -> Tensors:
        """The reference's relative error in every row."""
        call = GuardedCall(self, REFERENCE[self.case.kind])
        return self.entry.errors(call.results(call.run()), self.truth)

    @property
    def numbers(self) -> int:
        """How many numbers it holds, about."""
        return sum(one.numel() for one in self.given.values()) + sum(map(prod, self.case.results.values()))


_hosts: dict[OpCase, Host] = {}  # the last used are last
MOST_NUMBERS = 1 << 25  # in all of them; the last is kept whatever it has


def host(case: OpCase) -> Host:
    """Return the host's side of a case, wherever its call is placed. It is kept for other ops and layouts."""
    spec = dataclasses.replace(case.spec, device=torch.device("cpu"))
    case = dataclasses.replace(case, spec=spec, layout=PLAIN)
    _hosts[case] = kept = _hosts.pop(case, None) or Host(case)
    while len(_hosts) > 1 and sum(one.numbers for one in _hosts.values()) > MOST_NUMBERS:
        del _hosts[next(iter(_hosts))]
    return kept


Outputs = dict[str, Placed]  # by operand


class GuardedCall(Call):
    """A call of a case with a stress: its operands lie amid memory that is watched, outputs as well.

    Every `run` may write to memory of its own. The layout is the case's, but for pages as the host has them.
    """

    pool: Host  # type: ignore[assignment]

    def __init__(
        self, host: Host, op: FusedOp, case: OpCase | None = None, packed: Packed | None = None
    ) -> None:
        """`case`: that of the host, on another device or in another layout."""
        self.inputs: dict[str, Placed] = {}
        case = case or host.case
        super().__init__(host, op, case.spec, case, packed)  # type: ignore[arg-type]  # as a pool of one call

    @property
    def layout(self) -> Layout:
        return self.case.layout

    def _placed(self, name: str, tensor: torch.Tensor, fill: float, guard: int) -> Placed:
        layout = PLAIN if name == "cache" else self.layout
        if layout.apart and tensor.dim() == 3:
            return scattered(tensor, self.device, layout.apart)
        return place(tensor, self.device, layout.strided, fill=fill, guard=guard)

    def laid(
        self, name: str, tensor: torch.Tensor, fill: float = torch.nan, guard: int = GUARD
    ) -> torch.Tensor:
        self.inputs[name] = self._placed(name, tensor, fill, guard)
        return self.inputs[name].part

    def lay_pages(self, pages: Pages, keys: torch.Tensor) -> None:
        if self.layout.sparse:
            self.arguments["cache"] = hardly_touched(pages, keys, self.device)
        else:
            self.lay("cache", pages.cache(keys), self.layout.unowned, guard=1)

    def lay_tables(self, tables: Tensors) -> None:
        for name, table in tables.items():
            self.lay(name, table.int(), int(table[0, -1]) if name == "block_table" else 1)

    def outputs(self) -> Outputs:
        """Return memory to write to."""
        blanks = self.pool.entry.blank(self.case)
        return {
            name: self._placed(name, tensor, AROUND, 1 if name == "cache" else GUARD)
            for name, tensor in blanks.items()
        }

    def run(  # type: ignore[override]  # to memory of its own
        self, outputs: Outputs | None = None, **instead: Any
    ) -> Outputs:
        """Call the op once, and return where it wrote. `instead`: operands in place of these."""
        outputs = self.outputs() if outputs is None else outputs
        if not self.leading:
            self.prepare()
        parts = {name: placed.part for name, placed in outputs.items()}
        self.op(*self.leading, **{**self.arguments, **parts, **instead})
        return {name: placed for name, placed in outputs.items() if name not in instead}

    def share(self, other: GuardedCall) -> None:
        """Have the state of another call, that was prepared for a batch of the same lengths and tables."""
        self.leading, self._batch = other.leading, other._batch

    def hold(self, other: GuardedCall) -> None:
        """Hold the operands of another call of the same shapes, in the memory of this one."""
        self.pool, self.case = other.pool, other.case
        for name, operand in other.arguments.items():
            if isinstance(operand, torch.Tensor):
                self.arguments[name].copy_(operand)

    def results(self, outputs: Outputs, **instead: Any) -> Tensors:
        """Return what was written, rows [T, ..] on the host."""
        parts = {name: placed.part for name, placed in outputs.items()} | instead
        written = self.pool.entry.written(self.arguments | parts)
        return {name: rows.cpu() for name, rows in written.items() if name in self.written}

    def faults(self, results: Tensors) -> Iterator[tuple[float, str]]:
        """Yield errors over their bounds, and what is wrong: "" if nothing is."""
        entry, truth, errors = self.pool.entry, self.pool.truth, self.pool.errors
        table = self.arguments.get("block_table")
        places = self.case.places(table) if entry.prepares else None
        for alike in self.case.alike:  # rows of one size are judged together
            rows, right, known = (
                {name: x[alike] for name, x in of.items()} for of in (results, truth, errors)
            )
            yield from entry.faults(rows, right, errors=known, dtype=self.case.spec.dtype, places=places)

    def strays(self, outputs: Outputs, inputs: bool = False) -> Iterator[str]:
        """Yield what was written beside the outputs; to inputs, or beside them, as well if that is asked."""
        parts = {name: placed.part for name, placed in outputs.items()}
        if outputs:
            yield self.pool.entry.strays(self.case, self.arguments | parts)
        yield from (placed.around(name) for name, placed in outputs.items())
        if inputs:
            yield from (placed.around(name) or placed.inside(name) for name, placed in self.inputs.items())


class Checker:
    """Judges a pool's calls. The reference runs once, on the host: no device vouches for itself."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def check(self, results: Tensors, change: Change, places: Places) -> Check:
        """Return the verdict on a call's results on the host, rows [T, ..] by name."""
        truth = {name: change.expected(name) for name in self._pool.truth}
        errors = {name: change.reference_errors(name, known) for name, known in self._errors.items()}
        return self._pool.entry.judge(results, truth, errors, self._pool.case.spec.dtype, places)

    @cached_property
    def _errors(self) -> Tensors:
        """The reference's relative error in the rows of the pool; NaN in the few that it was not run on."""
        pool = self._pool
        spec = dataclasses.replace(pool.case.spec, device=torch.device("cpu"))
        call = Call(pool, REFERENCE[pool.case.kind], spec)
        call.prepare()
        known = {name: torch.full_like(pool.truth[name], torch.nan) for name in pool.entry.held}
        (results,) = call.buffers(1)
        for change in pool.covering():
            call.take(change, results)
            call.run()
            call.fetch(results)
            for name, rows in known.items():
                rows[change.rows[0]] = results[name].double().reshape(-1, *rows.shape[1:])
        return pool.entry.errors(known, pool.truth)
