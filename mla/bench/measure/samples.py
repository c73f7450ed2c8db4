"""Raw samples of timed passes, variant by variant; and the peak memory of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla.bench.measure.variants import Variant
from mla.bench.results.schema import NewLengths
from mla.verify.verdict import Check
from mla_backends.api import Backend
from mla_backends.errors import describe


@dataclass
class Samples:
    """Samples of one variant of one implementation. Only complete passes are in `passes`."""

    variant: Variant
    check: Check
    clock: str = "none"
    method: str = ""
    passes: list[list[float]] = field(default_factory=list)  # milliseconds
    after_switch: list[bool] = field(default_factory=list)  # per pass: another variant ran before it

    def discard(self) -> None:
        """Drop all samples."""
        self.passes.clear()
        self.after_switch.clear()


@dataclass
class Measurement:
    """Everything measured of one implementation: samples of the headline and of the other variants."""

    headline: Samples
    others: list[Samples] = field(default_factory=list)
    interrupted: bool = False
    refused: bool = False  # by an op: the check says why
    transient_bytes: int | None = None
    due: int | None = None  # passes, where they are fewer than planned, or shorter
    warmups: int = 0
    warm_ms: float | None = None  # of the fastest forward of the warm-up after its first
    typical_ms: float | None = None  # their median
    settled: bool | None = None  # whether the warm-up saw latencies settle; None: there was none, or too few
    device_state: list[dict[str, str]] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)  # of the first pass, by forward
    doubts: list[str] = field(default_factory=list)  # why the times cannot be right
    new_lengths: NewLengths | None = None

    @property
    def samples(self) -> list[Samples]:
        """Samples of all variants, the headline first."""
        return [self.headline, *self.others]

    @property
    def passes(self) -> list[list[float]]:
        """The headline's passes."""
        return self.headline.passes

    @property
    def check(self) -> Check:
        """The headline's check, or that of a wrong variant; the reason then names the variant.

        Right outputs whose times are in doubt are "doubtful".
        """
        for one in self.others:
            if one.check.status == "wrong":
                return Check(
                    status="wrong",
                    error_ratio=one.check.error_ratio,
                    relative_error=one.check.relative_error,
                    reason=f"{one.variant}: {one.check.reason}",
                )
        check = self.headline.check
        if check.status == "ok" and self.doubts:
            return msgspec.structs.replace(check, status="doubtful", reason="; ".join(self.doubts))
        return check

    def discard(self) -> None:
        """Drop all samples of an implementation that was wrong in one variant, or is in doubt."""
        for one in self.samples:
            one.discard()


def read_sensors(backend: Backend, when: str) -> list[dict[str, str]]:
    """Return one reading of a device's clocks, power and temperature, labelled with `when`.

    None if the backend has no sensors. Never raises.
    """
    try:
        found = {str(name): str(value) for name, value in backend.sensors().items()}
    except Exception as error:  # noqa: BLE001  # a sensor must not cost a run
        found = {"sensors": f"unknown ({describe(error)})"}
    return [{"when": when, **found}] if found else []


class _Storages:
    """What a dispatch mode does with every call.

    A base, because TorchDispatchMode wraps the `__torch_dispatch__` that a subclass itself defines, and the
    first call of the wrapper imports all of torch._dynamo: 1.4 s of CPU in a process that compiles nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in _tensors(result) if _address(tensor) not in given]
        self._forget()  # before adding: a new storage may reuse the address of a freed one
        for tensor in made:
            storage = tensor.untyped_storage()
            self._seen.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self._count()
        return result

    def _forget(self) -> None:
        self._seen = {key: value for key, value in self._seen.items() if not value[0].expired()}

    def _count(self) -> None:
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))


class TransientBytes(_Storages, TorchDispatchMode):
    """Counts the storages created inside a `with` block; `peak` is the largest total at once, in bytes.

    Works on every device, since it watches torch's dispatcher instead of a vendor's allocator. Memory that an
    op allocates internally, such as a kernel's scratch memory, bypasses the dispatcher and is not counted.
    """


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with a storage; weights packed by a library are opaque."""
    for leaf in tree_leaves(tree):
        if torch.is_tensor(leaf) and leaf.layout == torch.strided:
            yield leaf


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
