"""Whether a recorded call was right: its results against float64, and the memory around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mla.cases.memory import Tensors, changed_slots, same_numbers
from mla.failures.call import LIMIT, RecordedCall
from mla.failures.memory import OUTPUTS, View, covered
from mla.reference import REFERENCE
from mla.verify.places import Places
from mla_backends.api import FusedOp
from mla_backends.errors import describe


@dataclass(frozen=True)
class Made:
    """What a call left behind, on the host."""

    results: Tensors
    damage: str = ""  # what was written besides, as a clause


@dataclass(frozen=True)
class Expected:
    """What a call must write: float64, and the reference's own results in the op's dtype."""

    truth: Tensors
    reference: Tensors


def make(
    call: RecordedCall, op: FusedOp, device: torch.device, synchronize: Callable[[], None] = lambda: None
) -> Made:
    """Make a recorded call on a device, in fresh memory of the same layout."""
    pieces, cache = call.pieces(device), call.cache(device)
    before, arguments = copied(cache), call.arguments(pieces, cache)
    op(*call.leading(op, call.spec(device), arguments), **arguments)
    synchronize()
    return made(call, pieces, cache, before)


def copied(cache: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy of a cache on its device, to find stray writes; None if it is too large."""
    return None if cache is None or cache.nbytes > LIMIT else cache.clone()


def made(
    call: RecordedCall,
    pieces: Mapping[str, torch.Tensor],
    cache: torch.Tensor | None,
    before: torch.Tensor | None,
) -> Made:
    """Return what a call that has been made left in its memory; `before` is the cache before it, if known."""
    after = {name: piece.to("cpu", copy=True) for name, piece in pieces.items()}
    clauses = damage(call, after)
    if cache is not None and before is not None:
        clauses += cache_damage(call, cache, before)
    written = call.entry.written(call.arguments(after, cache))
    results = {name: one.cpu() for name, one in written.items() if name != "lse" or call.facts.writes_lse}
    return Made(results, "; ".join(clauses))


def damage(call: RecordedCall, after: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what has changed although the op only reads it, as clauses."""
    clauses: list[str] = []
    for name, piece in after.items():
        changed = ~same_numbers(piece, call.memory[name])
        members = {one: view for one, view in call.facts.views.items() if view.memory == name}
        for one, view in members.items():
            inside = covered(view, len(piece))
            if one not in OUTPUTS and bool((changed & inside).any()) and not _written(members, inside):
                clauses.append(f"the op wrote to its input {one}")
            changed &= ~inside
        if bool(changed.any()):
            clauses.append(f"memory {_beside(changed, members)} {' or '.join(members)} was written")
    return clauses


def _beside(changed: torch.Tensor, members: Mapping[str, View]) -> str:
    """Return where changed numbers [n] of a piece of memory lie, seen from the tensors in it."""
    owned = torch.zeros_like(changed)
    for view in members.values():
        owned |= covered(view, len(changed))
    places = owned.nonzero()
    inside = len(places) and bool(changed[int(places[0]) : int(places[-1])].any())
    return "between the rows of" if inside else "before or behind"


def _written(members: Mapping[str, Any], inside: torch.Tensor) -> bool:
    """Return whether an output lies in the same numbers, as in a rotation in place."""
    return any(
        bool((covered(view, len(inside)) & inside).any()) for name, view in members.items() if name in OUTPUTS
    )


def cache_damage(call: RecordedCall, cache: torch.Tensor, before: torch.Tensor) -> list[str]:
    """Return which slots of the cache have changed that the op does not write, as clauses."""
    written = call.operand("slots") if "slots" in call.facts.views else None
    count, first = changed_slots(cache, before, written)
    clause = f"{count} slots of the cache have changed that are not written; the first is {first}"
    return [clause] * bool(count)


# ------------------------------------------------------------------------------------------- the truth


def expected(call: RecordedCall) -> Expected:
    """Compute what a call must write, on the host."""
    host, case = torch.device("cpu"), call.case
    arguments = call.arguments(call.memory, call.cache(host))
    if call.weight is not None:
        arguments["weight"] = call.weight
    given = call.entry.given(arguments, case.lengths)
    reference = make(call, REFERENCE[case.kind], host).results
    return Expected(call.entry.truth(case.spec, given, case.lengths), reference)


def judged(call: RecordedCall, found: Made, right: Expected) -> str:
    """Return why a call was wrong; "" if it was right."""
    errors = call.entry.errors(right.reference, right.truth)
    where = places(call)
    return call.entry.judge(found.results, right.truth, errors, call.dtype, where, found.damage).reason


def raised(error: Exception) -> str:
    """Return why a call was wrong that ended in an exception."""
    return f"it raised {describe(error)}"


def places(call: RecordedCall) -> Places | None:
    """Return where the rows of a call are, if that is known: of the op of a part of a batch it is not."""
    if not call.facts.query_lens:
        return None
    return call.case.places(call.operand("block_table") if "block_table" in call.facts.views else None)
