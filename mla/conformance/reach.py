"""How far apart rows and pages can be laid in the memory that is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mla.conformance.trial import Refused, Trial
from mla_backends import host
from mla_backends.errors import describe, out_of_memory

# Numbers from the first to the last: beyond what 32 bits count, unsigned and signed. Beyond the last, signed
# bytes have run out, in a dtype of two.
PLACES = (1 << 32, 1 << 31, 1 << 30)


@contextmanager
def far(trial: Trial, tensors: int = 1, what: str = "from the first to the last") -> Iterator[int]:
    """Yield the farthest place that so many tensors have memory for, and note it.

    Raises `Refused` if there is none, and for an error that says that memory was short, as copies may cause.
    """
    numbers = _reach(trial, tensors)
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB {what}"
    try:
        yield numbers
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one, where torch has it
        if out_of_memory(describe(error)):
            raise Refused("there is not as much memory as it takes") from error
        raise
    finally:
        trial.backend.empty_cache()


def _reach(trial: Trial, tensors: int) -> int:
    """Return how many numbers each of the tensors may span. Many of them at the farthest take too much."""
    least = 0
    for numbers in PLACES if tensors <= 2 else PLACES[1:] or PLACES:
        least = numbers * trial.dtype.itemsize * tensors
        # Little of a tensor on the host is ever touched, unless an op makes a copy of a cache in float32.
        copied = 4 * numbers if tensors == 1 else 0
        needed, free = (
            (least + copied, host.memory_available())
            if trial.device.type == "cpu"
            else (least + least // 4, trial.backend.memory().free)
        )
        if free is None:
            raise Refused("how much memory is free is not known")
        if needed <= free:
            return numbers
    raise Refused(f"there is no room for {least / 1e9:.2g} GB")
