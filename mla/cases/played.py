"""Calls on a device amid poison: of one case, or of a scene of several, called in an order; and judged."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, cast

import torch

from mla.cases.case import OpCase
from mla.cases.memory import (
    GUARD,
    MAX_BESIDE,
    NO_GAPS,
    PLAIN_LAYOUT,
    Layout,
    Pages,
    Piece,
    Tensors,
    hardly_touched,
    poison,
    rows_on_host,
    same_words,
    scattered,
)
from mla.cases.stress import LARGE_ONES, USUAL, drawing
from mla.cases.stress import shape as shaped
from mla.cases.varied import Call
from mla.reference import REFERENCE
from mla.verify.layer_check import stands_for
from mla.verify.places import Places
from mla.verify.tolerances import LEAST_NORM
from mla_backends.api import FusedOp

CPU = torch.device("cpu")
MOST_NAMED = 3  # cases of a scene, each named by its label
OUTPUTS = ("out", "lse")
ROWS = frozenset({"x", "kv_a", "q", "k", "v", "out"})  # whose rows may lie far apart
GUARD_BYTES = 8 << 20  # before and behind an output that one call writes: whole rows but of the widest
AROUND = 77.0  # what outputs lie in; neither 0 nor NaN, which is what is written by mistake
NOISE = 4 * 2.0**-24  # of a sum of products in fp32, relative to the sizes of what is multiplied
UNDERFLOW = 1e-30  # of values, relative to others: a weight may be as small, or 0
# Weights that are the same, or a small one beside those of zeros, have roundings that no mean evens out. In
# float32 adding them one by one errs in one direction, by so much each. In other dtypes the weight is rounded
# by up to u and the output by u / 2. Half of that stands here: bounds are twice what is known.
ALIKE, DRIFT = frozenset(("equal keys", "all logits low", "rows of zeros", "all zero")), 2.0**-25
# A float32 sum of n terms that cancels to an eighth, in the worst order: times sqrt(n).
CANCELLED = 8 * 0.43 * 2.0**-24 / math.sqrt(2)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Calls of one op, one after another. Every case has a packed weight of its own."""

    cases: tuple[OpCase, ...]
    order: tuple[tuple[int, int], ...] = ((0, 1),)  # which case is called, and how often in a row
    one_memory: bool = False  # cases of the same shapes lie at the same addresses, one after the other
    kept: bool = True  # a state is prepared, or a weight packed, once for all calls of its case
    early: bool = False  # ... before the first call of any
    states: tuple[int, ...] = ()  # of which case each has the state; by default its own
    held: float = math.nan  # what outputs hold before a call
    lse: bool = True  # attention is given an lse to write
    in_place: bool = False  # a rotation writes to what it reads

    @property
    def label(self) -> str:
        """The scene in one line."""
        first, many = self.cases[0].label, len(self.cases) > MOST_NAMED
        words = [first, *(f"then {case.label}" for case in self.cases[1:])]
        words = [f"{len(self.cases)} cases, the first {first}"] if many else words
        if self.order != ((0, 1),):
            called = " ".join(f"{index + 1}" + f"x{times}" * (times > 1) for index, times in self.order)
            several = len(self.cases) > 1 and not many
            words.append(f"called {called}" if several else f"called {self.calls} times")
            words += ["prepared again every time"] * (not self.kept) + ["all prepared before"] * self.early
            words += ["in the same memory"] * self.one_memory + ["with one state"] * bool(self.states)
        words += [f"out holds {self.held:g} before"] * (self.held == self.held)
        words += ["without lse"] * (not self.lse) + ["in place"] * self.in_place
        return "; ".join(words)

    @property
    def calls(self) -> int:
        """The number of calls."""
        return sum(times for _, times in self.order)


class Host:
    """The host's side of one call: operands, what it must write, and how far rows may be from that."""

    varied: tuple[str, ...] = ()  # every call has the same operands

    def __init__(self, case: OpCase, given: Tensors | None = None) -> None:
        """Draw the operands unless they are given. `case` is on the host."""
        self.case, self.entry = case, case.entry
        if given is None:
            given = shaped(case, self.entry.draw(case, drawing(case), self.entry.rows(case)))
            given = self.entry.encoded(case, given)
        shapes = {name: case.shape(self.entry.operands[name]) for name in self.entry.varied}
        self.given = given | {name: given[name].view(shape) for name, shape in shapes.items()}
        self.numbers = sum(x.numel() for x in self.given.values()) + sum(map(prod, case.results.values()))

    @functools.cached_property
    def truth(self) -> Tensors:
        """What a call must write, in float64."""
        return self.entry.truth(self.case.spec, self.given | self.case.scalars, self.case.lengths)

    @functools.cached_property
    def least(self) -> Tensors:
        """The errors that no op can avoid, in every row: beside those, the table of bounds decides."""
        rows = {name: torch.zeros(self.truth[name].shape[:-1]).double() for name in self.entry.held}
        return rows | self._noise

    @functools.cached_property
    def errors(self) -> Tensors:
        """Those of the reference as well, which runs where the others are not enough."""
        call = Laid(self.case, REFERENCE[self.case.kind], Scene((self.case,)), host=self)
        call.prepare()
        call.run()
        errors, noise = self.entry.errors(call.results(), self.truth), dict(self._noise)
        if self.entry.held and self.entry.prepares:
            noise["out"] = noise.get("out", torch.zeros(())).hypot(self._lost)
        return errors | {name: errors.get(name, rows).maximum(rows) for name, rows in noise.items()}

    @property
    def _lost(self) -> torch.Tensor:
        """By how much small weights may err, per query [T, h]: those below the normal numbers of a dtype."""
        given, entry, spec = self.given | self.case.scalars, cast(Any, self.entry), self.case.spec
        if spec.dtype == torch.float16:
            lost = entry.lost(spec, given, self.case.lengths)
        else:  # flushed to zero, or held at the smallest by an exp that is bounded
            _, values = entry.keys(spec, given)
            largest = values.double().norm(dim=-1).amax() if values.numel() else 0.0
            lost = torch.finfo(torch.float32).tiny * max(self.case.kv_lens) * largest
        return lost / self.truth["out"].norm(dim=-1).clamp_min(LEAST_NORM)

    @functools.cached_property
    def _noise(self) -> Tensors:
        """By how much fp32 may err in logits, per query [T, h], and in sums; empty where these are ordinary.

        What is large and cancels in a logit leaves an error that the logit does not show.
        """
        case, stress, exact = self.case, self.case.stress, self.case.spec.dtype == torch.float32
        if exact and stress.cancels:
            rows = torch.ones(case.results["out"][:-1]).double()
            return {"out": rows * CANCELLED * math.sqrt(case.spec.in_features)}
        alike = not ALIKE.isdisjoint(case.values)
        unusual = stress.gain > USUAL.gain or alike or not LARGE_ONES.isdisjoint(case.values)
        if not (self.entry.held and case.entry.prepares and unusual):
            return {}
        sizes = self.given["q"].double().norm(dim=-1)
        keys, _ = case.entry.keys(case.spec, self.given)  # type: ignore[attr-defined]  # of attention
        none, lengths = torch.zeros(1, keys.shape[1]), keys.double().norm(dim=-1).split(case.kv_lens)
        longest = torch.stack([torch.cat((none, of_request)).amax(0) for of_request in lengths])
        noise = NOISE * case.spec.softmax_scale * sizes * longest[case.places().request]
        if alike:
            noise += DRIFT * max(case.kv_lens) if exact else torch.finfo(case.spec.dtype).eps * 3 / 8
        out = self.truth["out"].norm(dim=-1)
        unseen = (UNDERFLOW * out.amax() / out).nan_to_num(posinf=1e300) if out.numel() else out
        return {"out": noise.maximum(unseen), "lse": noise}


_hosts: dict[OpCase, Host] = {}  # the last used are last
MAX_HOSTS, MAX_NUMBERS = 64, 1 << 25  # and numbers in all of them; the last is kept whatever it has


def on_host(case: OpCase) -> OpCase:
    """Return the case as the host has it: a device under test does not vouch for itself."""
    spec, of = dataclasses.replace(case.spec, device=CPU), case.layout
    layout = PLAIN_LAYOUT  # but for pages that hold keys of several requests, or several times
    if of.repeated or any(of.shared):
        layout = Layout(page_size=of.page_size, shared=of.shared, of_first=of.of_first, repeated=of.repeated)
    return dataclasses.replace(case, spec=spec, layout=layout)


def host_of(case: OpCase) -> Host:
    """Return the host's side of a case, wherever its call lies. It is kept for other ops and layouts."""
    case = on_host(case)
    _hosts[case] = kept = _hosts.pop(case, None) or Host(case)
    while len(_hosts) > 1 and (
        len(_hosts) > MAX_HOSTS or sum(host.numbers for host in _hosts.values()) > MAX_NUMBERS
    ):
        del _hosts[next(iter(_hosts))]
    return kept


class Laid(Call):
    """A call whose operands lie amid poison, as far apart as the case's layout says."""

    pool: Host  # type: ignore[assignment]

    def __init__(
        self, case: OpCase, op: FusedOp, scene: Scene | None = None, *, host: Host | None = None
    ) -> None:
        """`scene`: of which it is a part, if of any. `host`: the case's host side, unless it is drawn."""
        self.alone = scene is None
        scene = scene or Scene((case,))
        self.pieces: dict[str, Piece] = {}
        self.worst = 0.0  # the largest error over its bound
        super().__init__(host or host_of(case), op, case.spec, case)  # type: ignore[arg-type]
        self.pieces.pop("weight" if self.pool.entry.packed else "", None)  # as long as what is packed lives
        for name, before in self.pool.entry.blank(case).items():
            held = stands_for(scene.held, before.dtype)
            self.lay(name, before.fill_(held) if name in OUTPUTS else before, AROUND)
        if not scene.lse:
            self.replace(lse=None)
        if scene.in_place:
            self.replace(out=self.arguments["x"])
        self.outputs = {*OUTPUTS, *(["x"] * scene.in_place), *(["cache"] * ("slots" in self.arguments))}
        for piece in self.pieces.values():
            piece.seal()
        self.untouched = True  # since it was laid
        self._before: Tensors = {}  # what the last call wrote, which is to be called again

    def laid(self, name: str, tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
        if self.case.layout.apart and name in ROWS and tensor.is_floating_point():
            return scattered(tensor, self.device, self.case.layout.apart)
        gaps, rows = self.case.layout.gaps.get(name, NO_GAPS), 1 if name == "cache" else GUARD
        dtype, beside = self.case.dtype(name), MAX_BESIDE
        if self.alone and name in (*OUTPUTS, "cache"):
            beside = GUARD_BYTES // dtype.itemsize
        piece = self.pieces[name] = Piece(tensor.shape, dtype, self.device, gaps, rows, fill, beside)
        return piece.part.copy_(tensor)

    def weight(self) -> torch.Tensor:
        """Return the weight in memory of its own, which lives as long as what is packed."""
        weight = self.laid("weight", self.pool.given["weight"])
        del self.pieces["weight"]
        return weight

    def lay_pages(self, pages: Pages, keys: torch.Tensor) -> None:
        layout = self.case.layout
        numbers = pages.count * layout.page_size * keys.shape[1]
        if (layout.pages_before or layout.pages) and numbers > MAX_FILLED:
            self.arguments["cache"] = hardly_touched(pages, keys, self.device)
        else:
            self.lay("cache", pages.cache(keys))

    def lay_tables(self, tables: Tensors) -> None:
        for name, table in tables.items():
            self.lay(name, table.int(), int(table[0, -1]) if name == "block_table" else 1)

    def replace(self, **operands: Any) -> None:
        """Give the op these operands, whose surroundings nobody watches."""
        for name, operand in operands.items():
            self.arguments[name] = operand
            self.pieces.pop(name, None)

    def restore(self, case: Laid) -> None:
        """Hold what `case`, of the same shapes, held before its first call."""
        for name, piece in self.pieces.items():
            piece.restore(case.pieces[name])

    def call(self, case: Laid | None = None, leading: tuple[Any, ...] = ()) -> str:
        """Call the op once in this memory, with the operands of `case`; return what was wrong, or ""."""
        if not leading and not self.leading:
            self.prepare()
        case, leading = case or self, leading or self.leading
        if case is not self or not self.untouched:
            self.restore(case)
        self.untouched = False
        self.op(*leading, **self.arguments)
        return self.judge(case)

    def results(self) -> Tensors:
        """Return what the last call wrote, rows [T, ..] on the host."""
        written = self.pool.entry.written(self.arguments)
        return {name: rows_on_host(rows) for name, rows in written.items() if name in self.written}

    def judge(self, case: Laid, only: Sequence[str] = ()) -> str:
        """Return what is wrong with the last call, given whose operands it had."""
        self._before = {}
        clauses = [piece.damage(name, name in self.outputs) for name, piece in self.pieces.items()]
        if "cache" in self.pieces:
            clauses.append(self.pool.entry.strays(case.case, self.arguments))
        written = {name: rows for name, rows in self.results().items() if not only or name in only}
        return "; ".join(filter(None, (*clauses, case.wrong(written))))

    def wrong(self, written: Tensors) -> str:
        """Return what is wrong with results, rows [T, ..] on the host, or ""."""
        ratios, reasons = zip(*self._faults(written, self.pool.least, None), strict=True)
        if any(reasons):
            table = self.arguments.get("block_table")
            places = self.case.places(table) if self.pool.entry.prepares else None
            ratios, reasons = zip(*self._faults(written, self.pool.errors, places), strict=True)
        self.worst = max(self.worst, *ratios)
        return "; ".join(filter(None, reasons))

    def _faults(
        self, written: Tensors, errors: Tensors, places: Places | None
    ) -> Iterator[tuple[float, str]]:
        """Yield errors over their bounds, given those that rows may have beside those of the table."""
        truth = self.pool.truth
        if "lse" in errors and "lse" in written and written["lse"].shape == errors["lse"].shape:
            near = (written["lse"].double() - truth["lse"]).abs() <= errors["lse"]
            written = written | {"lse": torch.where(near, truth["lse"].float(), written["lse"])}
        yield 0.0, ""
        for alike in self.case.alike:  # rows of one size are judged together
            rows, right, allowed = (
                {name: x[alike] for name, x in of.items()} for of in (written, truth, errors)
            )
            named = places if alike == slice(0, None, 1) else None
            dtype = self.case.spec.dtype
            yield from self.pool.entry.faults(rows, right, errors=allowed, dtype=dtype, places=named)

    def again(self, case: Laid, leading: tuple[Any, ...]) -> bool:
        """Call the op once more; return whether it wrote what it wrote before, bit for bit."""
        self._before = self._before or self.copies()
        for name in self._before:
            self.pieces[name].again(case.pieces[name])
        self.op(*leading, **self.arguments)
        return self.kept(self._before)

    def spoil(self) -> None:
        """Overwrite inputs: an op that has returned reads them no more."""
        read = {*self.pool.entry.varied, "k", "v", "selection", "cache"} - self.outputs
        for name in read & self.pieces.keys():
            poison(self.pieces[name].part)

    def copies(self) -> Tensors:
        """Return copies of the memory of outputs."""
        return {name: piece.whole.clone() for name, piece in self.pieces.items() if name in self.outputs}

    def kept(self, copies: Tensors) -> bool:
        """Return whether the memory of outputs is what it was."""
        return all(same_words(self.pieces[name].whole, then) for name, then in copies.items())


MAX_FILLED = 1 << 21  # numbers of a cache, most of which nobody reads, that are written nevertheless


class Player:
    """Plays scenes with one op. `require` raises what says that a case is refused."""

    def __init__(self, op: FusedOp, require: Callable[[OpCase], object]) -> None:
        self.op, self.require = op, require
        self.worst = 0.0  # the largest error over its bound

    def play(self, scene: Scene, unjudged: int = 0) -> str:
        """Return what is wrong with the first wrong call, and which it is; "" if all are right.

        The first `unjudged` calls are not judged. Raises what `require` raises, and `BackendError` where the
        op refuses what it is given.
        """
        for case in scene.cases:
            self.require(case)
        calls = [Laid(case, self.op, scene) for case in scene.cases]
        states = {index: self._leading(call, scene) for index, call in enumerate(calls) if scene.early}
        written: dict[int, Tensors] = {}
        number = 0
        for index, times in scene.order:
            call, place = calls[index], 0 if scene.one_memory else index
            owner = scene.states[index] if scene.states else index
            if scene.one_memory and not call.pool.entry.packed:
                owner = 0
            for turn in range(times):
                number += 1
                if owner not in states or not scene.kept:
                    states[owner] = self._leading(calls[owner], scene)
                if turn < 2 or turn == times - 1:
                    reason = calls[place].call(call, states[owner])
                elif calls[place].again(call, states[owner]):
                    continue
                else:
                    reason = calls[place].judge(call)
                self.worst = max(self.worst, call.worst)
                if reason and number > unjudged:
                    return reason if scene.calls == 1 else f"call {number} of {scene.calls}: {reason}"
            if len(calls) > 1:
                written[place] = calls[place].copies()
                calls[place].spoil()
            if not all(calls[other].kept(copies) for other, copies in written.items()):
                return f"call {number} of {scene.calls}: an output of an earlier call was written again"
        return ""

    def _leading(self, case: Laid, scene: Scene) -> tuple[Any, ...]:
        """Return a packed weight, or a prepared state."""
        if case.pool.entry.packed:
            return case.leading if scene.kept else (self.op.pack(case.weight()),)
        case.leading = ()
        case.prepare()
        return case.leading
