"""Make a kept call again, on a backend, as often as asked."""

from __future__ import annotations

from collections.abc import Mapping

from mla.errors import MLAError, OutOfMemory, UnknownOp, did_you_mean
from mla.failures.call import MAX_CALL_BYTES, RecordedCall
from mla.failures.file import Failure
from mla.failures.watch import judged, make, raised
from mla.layer.ops import refusals, sentences
from mla.reference import REFERENCE
from mla.text import size
from mla_backends import host
from mla_backends.api import Backend, FusedOp, current
from mla_backends.errors import BackendError


class CannotReplay(MLAError):
    """An op that does not serve the kept call."""

    exit_code = 3


def replay(failure: Failure, backend: Backend, name: str | None = None, runs: int = 1) -> list[str]:
    """Make the call `runs` times with the op `name` (default: the one that failed).

    Returns why each was wrong, "" for one that was right. Raises `CannotReplay`, `UnknownOp` and
    `OutOfMemory`.
    """
    call, expected = failure.call(), failure.expected()
    op = op_of(call, backend.ops(), call.facts.op if name is None else name)
    assert backend.device is not None
    _require_served(call, name or call.facts.op, op, backend)
    _require_room(call, backend)
    reasons = []
    for _ in range(runs):
        try:
            made = make(call, op, backend.device, backend.synchronize)
        except BackendError:  # a refusal
            raise
        except Exception as error:  # noqa: BLE001  # whatever an op raises
            reasons.append(raised(error))
        else:
            reasons.append(judged(call, made, expected))
    return reasons


def op_of(call: RecordedCall, offered: Mapping[str, FusedOp], name: str) -> FusedOp:
    """Return an op by name. Raises `UnknownOp` if the backend has none of that kind and name."""
    kind = call.facts.kind
    known = {offered_name: op for offered_name, op in offered.items() if current(op.contract, kind)}
    if name == "reference":
        return REFERENCE[kind]
    if name not in known:
        names = ["reference", *known]
        raise UnknownOp(
            f"this backend offers no {kind} named '{name}'.{did_you_mean(name, names)} "
            f"--op takes: {', '.join(names)}."
        )
    return known[name]


def _require_served(call: RecordedCall, name: str, op: FusedOp, backend: Backend) -> None:
    spec = call.spec(backend.device)  # type: ignore[arg-type]  # it is set up
    reasons = refusals(name, op, call.facts.kind, spec)
    if not reasons and call.entry.prepares:
        size = call.facts.pages.shape[1] if call.facts.pages else None
        answer = op.unsupported_batch(spec, call.facts.query_lens, call.facts.kv_lens, size)
        reasons = sentences(name, "unsupported_batch()", answer)
    if "lse" in call.facts.absent and not op.lse_optional and name != call.facts.op:
        reasons.append(f"op '{name}' needs an lse to write to, and the kept call has none")
    if reasons:
        raise CannotReplay(f"the op refuses this call: {'; '.join(reasons)}.")


def _require_room(call: RecordedCall, backend: Backend) -> None:
    """Raise `OutOfMemory` if the device has no room for the call; the file holds only a part of a cache."""
    cache = call.facts.pages.numbers * call.dtype.itemsize if call.facts.pages else 0
    compared = cache if cache <= MAX_CALL_BYTES else 0
    on_host = backend.device is not None and backend.device.type == "cpu"
    needed = cache + compared * (4 if on_host else 1) + sum(piece.nbytes for piece in call.memory.values())
    free = host.memory_available() if on_host else backend.memory().free
    if free is not None and needed > free:
        raise OutOfMemory(f"this call needs {size(needed)} of memory, and {size(free)} are free.")
