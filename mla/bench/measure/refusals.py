"""What costs a case and not the run: a batch that an op refuses, told from an op that fails; short memory."""

from __future__ import annotations

from mla.bench.workload.implementations import parse_one
from mla.command import error_origin
from mla.errors import OutOfMemory, UnsupportedBatch
from mla_backends import BackendError


def reason(error: Exception, implementation: str) -> str:
    """Return why an op of `implementation` refuses its batch, and the cure; "" for any other error.

    A `BackendError` that an op raises is a refusal, as the contract says.
    """
    if isinstance(error, UnsupportedBatch):
        return str(error)
    if isinstance(error, BackendError) and error_origin.in_op(error):
        op = error_origin.op_name(error)
        return f"{op}{': ' if op else ''}{str(error).rstrip('.')}. {_cure(implementation)}"
    return ""


def too_large(error: Exception) -> bool:
    """Return whether memory was short, of the host or of a device."""
    return isinstance(error, (OutOfMemory, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def _cure(implementation: str) -> str:
    if parse_one(implementation).ops:
        return f"Leave `{implementation}` out of --implementations."
    return "Use the reference ops for it (`--ops reference`)."
