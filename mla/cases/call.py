"""A case on a device: its operands in memory, the op called as often as wanted, and what it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from itertools import starmap
from typing import Any

import torch

from mla.cases.case import OPTIONAL, OpCase
from mla.cases.memory import NO_GAPS, Layout, Pages, Tensors, blank, poison_all
from mla.cases.varied import Change, Pool
from mla.reference import REFERENCE
from mla.verify.layer_check import TAIL
from mla.verify.places import Places
from mla.verify.verdict import Check
from mla_backends.api import FusedOp

HOPELESS = 100.0  # times what the table allows: the reference errs less


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
    ) -> None:
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

    @property
    def layout(self) -> Layout:
        """That of the cache: slots past a request's end hold what the op can bear."""
        return dataclasses.replace(self.case.layout, tail=torch.nan if self.op.nan_safe_tail else TAIL)

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
        """The results that the op is held to."""
        return self.pool.entry.judged(self.op)

    def blank(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return poisoned memory for an operand, or a result."""
        return blank(shape, self.case.dtype(name), self.device, self.case.layout.gaps.get(name, NO_GAPS))

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


class Checker:
    """Judges a pool's calls, by the table of bounds or, where that is not enough, beside the reference.

    The reference runs on the host: no device vouches for itself.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def check(self, results: Tensors, change: Change, places: Places) -> Check:
        """Return the verdict on a call's results on the host, rows [T, ..] by name."""
        entry, dtype = self._pool.entry, self._pool.case.spec.dtype
        truth = {name: self._pool.expected(change, name) for name in self._pool.truth}
        none = {name: torch.zeros(truth[name].shape[:-1], dtype=torch.float64) for name in entry.held}
        check = entry.judge(results, truth, none, dtype, places)
        if check.status == "ok" or not entry.held or (check.error_ratio or HOPELESS) >= HOPELESS:
            return check
        return entry.judge(results, truth, entry.errors(self._reference(change), truth), dtype, places)

    def _reference(self, change: Change) -> Tensors:
        """Return what the reference makes of a call's operands."""
        call, results = self._call
        call.begin(change.number)
        call.take(change, results)
        call.run()
        call.fetch(results)
        return results

    @cached_property
    def _call(self) -> tuple[Call, Tensors]:
        case = self._pool.case
        spec = dataclasses.replace(case.spec, device=torch.device("cpu"))
        call = Call(self._pool, REFERENCE[case.kind], spec)
        call.prepare()
        (results,) = call.buffers(1)
        return call, results
