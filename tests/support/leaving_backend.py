"""The CPU with one op, whose code raises `-O raises=...` at `-O at=...`: a method of the backend or its op.

It takes `-O threads` as the base class does: by ignoring it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from wrapped_op import WrappedOp

from mla_backends import Availability, Backend, BackendError, FusedOp
from mla_backends.api import API_VERSION, DeviceInfo, HostTimer, MemoryInfo, Packed, Timer


class Odd(BaseException):
    """Neither an Exception nor one of Python's own."""


RAISED: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(0),
    "GeneratorExit": GeneratorExit,
    "Odd": lambda: Odd("why"),
    "OSError": lambda: OSError(2),
    "BackendError": lambda: BackendError("10 rows or more, please."),
}


class LeavingOp(WrappedOp):
    """The reference op, unless it leaves."""

    def __init__(self, backend: Leaving) -> None:
        super().__init__("linear")
        self._backend = backend

    def unsupported_reasons(self, spec: Any) -> list[str]:
        self._backend.leave("unsupported_reasons")
        return []

    def pack(self, weight: torch.Tensor) -> Packed:
        self._backend.leave("pack")
        return super().pack(weight)

    def __call__(self, *args: Any, **tensors: Any) -> None:
        super().__call__(*args, **tensors)
        self._backend.leave("call")


class Leaving(Backend):
    """A backend whose code raises where it is told to."""

    name = "leaving"
    api_version = API_VERSION

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.leave("init")

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return ("threads", "at", "raises")

    def leave(self, place: str) -> None:
        """Raise if this is the place."""
        if self.options.get("at") == place:
            raise RAISED[self.options.get("raises", "SystemExit")]()

    def probe(self) -> Availability:
        self.leave("probe")
        return Availability(True)

    def setup(self, index: int | None = None) -> torch.device:
        self.leave("setup")
        return torch.device("cpu")

    def synchronize(self) -> None:
        self.leave("synchronize")

    def device_count(self) -> int | None:
        self.leave("device_count")
        return None

    def device_info(self) -> DeviceInfo:
        self.leave("device_info")
        return DeviceInfo("leaving")

    def dtypes(self) -> tuple[torch.dtype, ...]:
        self.leave("dtypes")
        return (torch.float32,)

    def timer(self) -> Timer:
        self.leave("timer")
        return HostTimer(self.synchronize)

    def device_timer(self) -> Timer | None:
        self.leave("device_timer")
        return None

    def memory(self) -> MemoryInfo:
        self.leave("memory")
        return MemoryInfo()

    def environment(self) -> Mapping[str, str]:
        self.leave("environment")
        return {}

    def sensors(self) -> Mapping[str, str]:
        self.leave("sensors")
        return {}

    def remarks(self) -> Sequence[str]:
        self.leave("remarks")
        return ()

    def ops(self) -> Mapping[str, FusedOp]:
        self.leave("ops")
        return {"leaving_op": LeavingOp(self)}
