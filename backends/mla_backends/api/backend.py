"""`Backend`: one kind of device, as a plugin describes it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mla_backends.api.facts import Availability, DeviceInfo, MemoryInfo
from mla_backends.api.ops import FusedOp, OpCall
from mla_backends.api.timing import HostTimer, Timer
from mla_backends.errors import BackendOptionError

MOST_THREADS = 4096  # of a host; more are a typo

if TYPE_CHECKING:
    import torch

    from mla_backends.discovery import Entry


class Backend(ABC):
    """One kind of device. `TorchBackend` implements the optional part for devices with a torch module.

    Example:

    ```python
    from mla_backends import Availability, TorchBackend, hookimpl

    class Acme(TorchBackend):
        name = "acme"
        api_version = 1               # the contract it was written for
        device_type = "acme"          # torch.acme exists after this import
        requires = ("torch_acme",)

    @hookimpl
    def mla_backend(options):
        return Acme(options)
    ```
    """

    name: str
    api_version: int  # no default: a plugin must not inherit whatever version happens to be installed
    device: torch.device | None = None  # what `setup` returned
    entry: Entry | None = None  # where the registry found it: name, distribution and version

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        """Keep the user's `-O key=value` options; a subclass lists those it knows in `known_options`.

        Raises `BackendOptionError` for others; a subclass raises it for invalid values as well.
        """
        self.options = dict(options or {})
        unknown = sorted(set(self.options) - set(self.known_options()))
        if unknown:
            raise BackendOptionError.unknown(self.name, unknown, self.known_options())
        threads = str(self.options.get("threads", 1))
        if not re.fullmatch("[0-9]{1,4}", threads) or not 1 <= int(threads) <= MOST_THREADS:
            raise BackendOptionError(
                f"backend '{self.name}' needs 1 to {MOST_THREADS} threads, got '{threads}'."
            )

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        """Names of the options this backend understands. `threads` is passed by `--threads`."""
        return ("threads",)

    @abstractmethod
    def probe(self) -> Availability:
        """Return whether the device can be used. No exception, no subprocess, no device context, < 50 ms."""

    @abstractmethod
    def setup(self, index: int | None = None) -> torch.device:
        """Make device `index` (default: the current one) usable and return it.

        The device equals that of a tensor made on it (`cpu`, not `cpu:0`). Raises `BackendError`.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all submitted work is done."""

    def device_count(self) -> int | None:
        """Return how many devices this process sees, also before `setup`; None if they cannot be counted.

        Tasks on one node then take device (local task number) modulo this; with None, the current one.
        """
        return None

    def device_info(self) -> DeviceInfo:
        """Describe the device; unknown facts are None."""
        return DeviceInfo(name=self.name)

    def collectives(self) -> str | None:
        """Return the name under which torch.distributed knows this device's library, such as "nccl".

        None where none is known: the device cannot take part in a run over several ranks.
        """
        return None

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the floating dtypes the device computes natively (not emulated)."""
        import torch

        return (torch.bfloat16, torch.float32)

    def timer(self) -> Timer:
        """Return a timer on the host's clock, synchronization included; no number is from it, see README."""
        return HostTimer(self.synchronize)

    def device_timer(self) -> Timer | None:
        """Return a timer on the device's own clock; None if it has none."""
        return None

    def graph(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """Capture `fn` and return its replay, or None if the stack has no graphs."""
        return None

    def memory(self) -> MemoryInfo:
        """Return memory counters of the device; unknown ones are None."""
        return MemoryInfo()

    def empty_cache(self) -> None:  # noqa: B027  # optional on purpose
        """Release cached memory to the device."""

    def environment(self) -> Mapping[str, str]:
        """Report driver, SDK and library versions, for the result file."""
        return {}

    def sensors(self) -> Mapping[str, str]:
        """Report what changes while the device works (clocks, power, temperature), units in the names.

        Called before and after timed passes, never in between. Empty if there are no sensors.
        """
        return {}

    def remarks(self) -> Sequence[str]:
        """Return what the user should know before a run, such as a default; called after `setup`."""
        return ()

    def ops(self) -> Mapping[str, FusedOp]:
        """Return fused ops by implementation name, best first; `contract` names the op that each replaces."""
        return {}

    def sequence(self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
        """Return one callable that makes all `calls` in order; None to have them made one by one.

        For hosts on which dispatching a call takes as long as a small op. The layer asks when a forward
        repeats on the same memory, and calls the result with tensors that replace `moving`, of the same
        shapes, dtypes and strides, which it must not keep alive. They appear in `calls` as themselves, never
        as views. All other tensors stay those of `calls`; their contents may change, and so may the number of
        host threads. Errors are those of the ops.
        """
        return None
