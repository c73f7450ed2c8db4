"""A drawn scene on a device: its cases placed amid poison, called in its order, and judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from mla.cases.call import Call, Host
from mla.cases.case import OpCase
from mla.cases.drawn import LARGE_ONES, Scene
from mla.cases.memory import GUARD, Pages, Piece, Tensors
from mla.verify.places import Places
from mla_backends.api import FusedOp

CPU = torch.device("cpu")
OUTPUTS = ("out", "lse")
NOISE = 4 * 2.0**-24  # of a sum of products in fp32, relative to the sizes of what is multiplied
UNDERFLOW = 1e-30  # of values, relative to others: a weight may be as small, or 0
USUAL = 1.0  # the gain of queries up to which logits are ordinary


class Known(Host):
    """The host's side of a case, and how far rows may be from the truth."""

    @functools.cached_property
    def least(self) -> Tensors:
        """The errors that no op can avoid, in every row: beside those, the table of bounds decides."""
        rows = {name: torch.zeros(self.truth[name].shape[:-1]).double() for name in self.entry.held}
        return rows | self.unavoidable

    @functools.cached_property
    def allowed(self) -> Tensors:
        """Those of the reference as well, which runs where the others are not enough."""
        errors = dict(self.errors)
        if "lse" in self.unavoidable:
            errors["out"] = errors["out"].maximum(self.unavoidable["out"])
        return self.unavoidable | errors

    @functools.cached_property
    def unavoidable(self) -> Tensors:
        """What logits cost that are large and cancel; empty where they are ordinary."""
        noise = logit_noise(self)
        if noise is None:
            return {}
        sizes = self.truth["out"].norm(dim=-1)
        unseen = (UNDERFLOW * sizes.amax() / sizes).nan_to_num(posinf=1e300) if sizes.numel() else sizes
        return {"out": noise.maximum(unseen), "lse": noise}


@functools.lru_cache(maxsize=8)
def known(case: OpCase) -> Known:
    """Return the host's side of a case that is on the host; the last ones are kept, to shrink a scene."""
    return Known(case)


def logit_noise(host: Host) -> torch.Tensor | None:
    """Return by how much fp32 may err in the logits of every query [T, h]; None where these are ordinary.

    What is large and cancels in a logit leaves an error that the logit does not show.
    """
    case = host.case
    loud = case.stress is not None and case.stress.gain > USUAL
    if not case.entry.prepares or not (loud or LARGE_ONES.intersection(case.values)):
        return None
    sizes = host.given["q"].double().norm(dim=-1)
    keys, _ = case.entry.keys(case.spec, host.given)  # type: ignore[attr-defined]  # of attention
    lengths, requests = keys.double().norm(dim=-1), torch.arange(len(case.kv_lens))
    longest = torch.zeros(len(requests), keys.shape[1]).double()
    of_key = requests.repeat_interleave(torch.tensor(case.kv_lens))[:, None].expand_as(lengths)
    longest.scatter_reduce_(0, of_key, lengths, "amax")
    of_query = requests.repeat_interleave(torch.tensor(case.query_lens))
    return NOISE * case.spec.softmax_scale * sizes * longest[of_query]


class Laid(Call):
    """A call whose operands lie amid poison, as far apart as the case's layout says."""

    def __init__(self, case: OpCase, op: FusedOp, scene: Scene) -> None:
        self.known = known(on_host(case))
        self.pieces: dict[str, Piece] = {}
        super().__init__(self.known, op, case.spec, case)  # type: ignore[arg-type]  # as a pool of one call
        self.pieces.pop("weight" if self.pool.entry.packed else "", None)  # as long as what is packed lives
        for name, before in self.pool.entry.blank(case).items():
            self.lay(name, before)
            if name in OUTPUTS:
                self.arguments[name].fill_(scene.held)
        if not scene.lse:
            self.arguments["lse"] = None
            del self.pieces["lse"]
        if scene.in_place:
            self.arguments["out"] = self.arguments["x"]
            del self.pieces["out"]
        self.outputs = {*OUTPUTS, *(["x"] * scene.in_place), *(["cache"] * ("slots" in self.arguments))}
        for piece in self.pieces.values():
            piece.seal()
        self.untouched = True  # since it was laid

    def laid(
        self, name: str, tensor: torch.Tensor, fill: float = torch.nan, guard: int = GUARD
    ) -> torch.Tensor:
        gaps, rows = self.case.layout.gaps.get(name, (0, 0, 0)), 1 if name == "cache" else guard
        self.pieces[name] = Piece(tensor.shape, self.case.dtype(name), self.device, gaps, rows)
        return self.pieces[name].part.copy_(tensor)

    def weight(self) -> torch.Tensor:
        """Return the weight in memory of its own, which lives as long as what is packed."""
        weight = self.laid("weight", self.pool.given["weight"])
        del self.pieces["weight"]
        return weight

    def lay_pages(self, pages: Pages, keys: torch.Tensor) -> None:
        self.lay("cache", pages.cache(keys))

    def lay_tables(self, tables: Tensors) -> None:
        for name, table in tables.items():
            self.lay(name, table.int())

    def call_as(self, case: Laid, leading: tuple[Any, ...]) -> str:
        """Call the op once in this memory, with the operands of `case`; return what was wrong, or ""."""
        if case is not self or not self.untouched:
            for name, piece in self.pieces.items():
                piece.restore(case.pieces[name])
        self.untouched = False
        self.op(*leading, **self.arguments)
        return self.judge(case)

    def judge(self, case: Laid) -> str:
        """Return what is wrong with the last call, given whose operands it had."""
        clauses = [piece.damage(name, name in self.outputs) for name, piece in self.pieces.items()]
        clauses.append(case.known.entry.strays(case.case, self.arguments))
        written = {
            name: rows.cpu()
            for name, rows in case.known.entry.written(self.arguments).items()
            if name in self.written
        }
        if any(self._faults(case, written, case.known.least, None)):
            table = self.arguments.get("block_table")
            places = case.case.places(table) if case.known.entry.prepares else None
            clauses += self._faults(case, written, case.known.allowed, places)
        return "; ".join(filter(None, clauses))

    def _faults(self, case: Laid, written: Tensors, errors: Tensors, places: Places | None) -> Iterator[str]:
        """Yield what is wrong with results, given the errors that rows may have beside those of the table."""
        entry, truth = case.known.entry, case.known.truth
        if "lse" in errors and "lse" in written and written["lse"].shape == errors["lse"].shape:
            near = (written["lse"].double() - truth["lse"]).abs() <= errors["lse"]
            written = written | {"lse": torch.where(near, truth["lse"].float(), written["lse"])}
        for alike in case.case.alike:  # rows of one size are judged together
            parts = ({name: rows[alike] for name, rows in of.items()} for of in (written, truth))
            allowed = {name: rows[alike] for name, rows in errors.items()}
            named = places if alike == slice(0, None, 1) else None
            for _, fault in entry.faults(*parts, errors=allowed, dtype=case.case.spec.dtype, places=named):
                yield fault

    def copies(self) -> Tensors:
        """Return copies of what the last call wrote."""
        return {
            name: self.arguments[name].clone() for name in OUTPUTS if self.arguments.get(name) is not None
        }

    def kept(self, copies: Tensors) -> bool:
        """Return whether outputs are what they were."""
        return all(
            torch.equal(self.arguments[name].nan_to_num(7), rows.nan_to_num(7))
            for name, rows in copies.items()
        )


class Player:
    """Plays scenes with one op. `require` raises what says that a case is refused."""

    def __init__(self, op: FusedOp, require: Callable[[OpCase], None]) -> None:
        self.op, self.require = op, require

    def play(self, scene: Scene, unjudged: int = 0) -> str:
        """Return what is wrong with the first wrong call, and which it is; "" if all are right.

        The first `unjudged` calls are not judged. Raises what `require` raises, and `BackendError` where the
        op refuses what it is given.
        """
        for case in scene.cases:
            self.require(case)
        calls = [Laid(case, self.op, scene) for case in scene.cases]
        states: dict[int, tuple[Any, ...]] = {}
        if scene.early:
            for index, call in enumerate(calls):
                states[index] = self._leading(call, scene)
        written: dict[int, Tensors] = {}
        number, total = 0, scene.calls
        for index, times in scene.order:
            call = calls[index]
            host = calls[0] if scene.one_memory else call
            for turn in range(times):
                number += 1
                of = 0 if scene.lent or (scene.one_memory and not call.pool.entry.packed) else index
                if of not in states or not scene.kept:
                    states[of] = self._leading(calls[of], scene)
                if 1 < turn < times - 1:
                    host.op(*states[of], **host.arguments)
                    continue
                reason = host.call_as(call, states[of])
                if reason and number > unjudged:
                    return reason if total == 1 else f"call {number} of {total}: {reason}"
            if len(calls) == 1:
                continue
            written[id(host)] = host.copies()
            for other in calls:
                if id(other) in written and not other.kept(written[id(other)]):
                    return f"call {number} of {total}: an output of an earlier call was written again"
        return ""

    def _leading(self, case: Laid, scene: Scene) -> tuple[Any, ...]:
        """Return a packed weight, or a prepared state."""
        if case.pool.entry.packed:
            return case.leading if scene.kept else (self.op.pack(case.weight()),)
        case.leading = ()
        case.prepare()
        return case.leading


def on_host(case: OpCase) -> OpCase:
    """Return the case on the host."""
    return replace(case, spec=replace(case.spec, device=CPU))
