"""Whether a recorded call was right: its results against float64, and the memory around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mla.failures.call import CONTEXT, LIMIT, RecordedCall
from mla.failures.memory import OUTPUTS, Tensors, View, covered, same_numbers
from mla.reference import REFERENCE
from mla.verify.op_oracle import attend, product, true_norm, true_rotation
from mla.verify.places import Places
from mla.verify.tolerances import judge, judge_lse
from mla_backends.api import FusedOp
from mla_backends.errors import describe

# The most bytes of float64 logits in one step of the oracle.
LOGITS_BYTES = 256 << 20


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
    return Made(results(call, call.arguments(after, cache)), "; ".join(clauses))


def results(call: RecordedCall, arguments: Mapping[str, Any]) -> Tensors:
    """Return what the op wrote, by name."""
    if call.facts.kind == "write_latent":
        cache = arguments["cache"]
        rows = cache.flatten(0, 1)[arguments["slots"].to(cache.device)].cpu()
        c = call.facts.spec["kv_lora_rank"]
        return {"latent": rows[:, :c], "key": rows[:, c:]}
    names = [name for name in OUTPUTS if arguments.get(name) is not None]
    return {name: arguments[name] for name in names if name != "lse" or call.facts.writes_lse}


def damage(call: RecordedCall, after: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what has changed although the op only reads it, as clauses."""
    clauses: list[str] = []
    for name, piece in after.items():
        changed = ~same_numbers(piece, call.memory[name])
        members = {one: view for one, view in call.facts.views.items() if view.memory == name}
        for one, view in members.items():
            inside = covered(view, len(piece))
            if one not in OUTPUTS and bool((changed & inside).any()) and not _written(members, inside):
                clauses.append(f"the op wrote to {one}, which it only reads")
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
    changed = (~same_numbers(cache, before)).any(-1).flatten().cpu()
    if call.facts.kind == "write_latent":
        changed[call.operand("slots")] = False
    if not bool(changed.any()):
        return []
    page, slot = divmod(int(changed.int().argmax()), cache.shape[1])
    first = f"the first is slot {slot} of page {page}"
    return [f"{int(changed.sum())} slots of the cache have changed that are not written; {first}"]


# ------------------------------------------------------------------------------------------- the truth


def expected(call: RecordedCall) -> Expected:
    """Compute what a call must write, on the host."""
    host = torch.device("cpu")
    arguments = call.arguments(call.memory, call.cache(host))
    return Expected(
        _TRUTHS[call.facts.kind](call, arguments), make(call, REFERENCE[call.facts.kind], host).results
    )


def judged(call: RecordedCall, found: Made, right: Expected) -> str:
    """Return why a call was wrong; "" if it was right."""
    where = places(call)
    reasons = [found.damage] * bool(found.damage)
    for name, result in found.results.items():
        if name == "lse":
            reason = judge_lse(result, right.truth[name], call.dtype, where)[1]
        else:
            true, reference, lse = right.truth[name], right.reference[name], right.truth.get("lse")
            reason = judge(result, true, reference, call.dtype, where, lse)[1]
        reasons += [f"{name}: {reason}"] * bool(reason)
    return "; ".join(reasons)


def raised(error: Exception) -> str:
    """Return why a call was wrong that ended in an exception."""
    return f"it raised {describe(error)}"


def places(call: RecordedCall) -> Places | None:
    """Return where the rows of a call are, if that is known: of the op of a part of a batch it is not."""
    facts = call.facts
    if not facts.query_lens:
        return None
    if facts.kind == "latent_attention":
        assert facts.pages is not None
        table, page_size = call.operand("block_table"), facts.pages.shape[1]
        return Places.new_tokens(facts.query_lens, facts.kv_lens, table, page_size)
    if facts.role == CONTEXT:
        return Places.context(facts.kv_lens)
    return Places.new_tokens(facts.query_lens, facts.kv_lens)


def _product(call: RecordedCall, given: Mapping[str, Any]) -> Tensors:
    assert call.weight is not None
    return {"out": product(given["x"], call.weight, given.get("bias"))}


def _norm(call: RecordedCall, given: Mapping[str, Any]) -> Tensors:
    return {"out": true_norm(given["x"], given["weight"], given["eps"])}


def _rotation(call: RecordedCall, given: Mapping[str, Any]) -> Tensors:
    return {"out": true_rotation(given["x"], given["cos_sin"], given["interleaved"])}


def _latents(call: RecordedCall, given: Mapping[str, Any]) -> Tensors:
    c = call.facts.spec["kv_lora_rank"]
    norm = true_norm(given["kv_a"][:, :c], given["weight"], given["eps"])
    return {
        "latent": norm,
        "key": true_rotation(given["kv_a"][:, c:], given["cos_sin"], given["interleaved"]),
    }


def _absorbed(call: RecordedCall, given: Mapping[str, Any]) -> Tensors:
    size, c = given["cache"].shape[1], call.facts.spec["kv_lora_rank"]
    keys = []
    for row, length in zip(given["block_table"].long(), call.facts.kv_lens, strict=True):
        keys.append(given["cache"][row[: -(-length // size)]].flatten(0, 1)[:length, None])
    values = [rows[..., :c] for rows in keys]
    return _attention(call, given, keys, values)


def _expanded(call: RecordedCall, given: Mapping[str, Any]) -> Tensors:
    keys, values = (given[name].split(call.facts.kv_lens) for name in ("k", "v"))
    return _attention(call, given, list(keys), list(values))


def _attention(
    call: RecordedCall, given: Mapping[str, Any], keys: list[torch.Tensor], values: list[torch.Tensor]
) -> Tensors:
    """Attend request by request, a few heads at a time, to keep the logits small."""
    found = []
    for q, k, v in zip(given["q"].split(call.facts.query_lens), keys, values, strict=True):
        count = max(1, LOGITS_BYTES // (8 * max(1, q.shape[0] * k.shape[0])))
        parts = []
        for start in range(0, q.shape[1], count):
            own_k, own_v = (one if one.shape[1] == 1 else one[:, start : start + count] for one in (k, v))
            queries = q[:, start : start + count]
            parts.append(attend(queries, own_k, own_v, given["softmax_scale"], call.facts.causal))
        found.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    out, lse = (torch.cat(part) for part in zip(*found, strict=True))
    return {"out": out, "lse": lse}


_TRUTHS = {
    "linear": _product,
    "batched_linear": _product,
    "rms_norm": _norm,
    "rotate_query": _rotation,
    "write_latent": _latents,
    "latent_attention": _absorbed,
    "expanded_attention": _expanded,
}
