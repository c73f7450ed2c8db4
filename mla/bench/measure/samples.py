"""Samples of timed passes, variant by variant; the case they make; and the peak memory of a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import msgspec
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla.bench import results
from mla.bench.measure.variants import Variant
from mla.bench.results.cases import by_kind, latency_of, throughput_of
from mla.bench.results.compare import compare_cases
from mla.bench.results.schema import Agreement, Case, NewLengths
from mla.bench.subjects.base import Facts, Outputs
from mla.bench.workload.scenario import Scenario
from mla.verify.tolerances import relative_error
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

    def per_layer(self, layers: int) -> list[list[float]]:
        """Return the milliseconds of one layer of so many, pass by pass."""
        return [[sample / layers for sample in samples] for samples in self.passes]

    def discard(self) -> None:
        """Drop all samples."""
        self.passes.clear()
        self.after_switch.clear()


@dataclass(frozen=True)
class WarmupResult:
    """How a warm-up went. `settled` is None when none was asked for, or too few were run to tell."""

    forwards: int = 0
    settled: bool | None = None
    ms: float | None = field(default=None, compare=False)  # of the fastest forward after the first one
    typical_ms: float | None = field(default=None, compare=False)  # their median


@dataclass
class Measurement:
    """Everything measured of one implementation: samples of the headline and of the other variants."""

    headline: Samples
    others: list[Samples] = field(default_factory=list)
    interrupted: bool = False
    refused: bool = False  # by an op: the check says why
    transient_bytes: int | None = None
    due: int | None = None  # passes, where they are fewer than planned, or shorter
    warmup: WarmupResult = WarmupResult()
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
        for samples in self.others:
            if samples.check.status == "wrong":
                reason = f"{samples.variant}: {samples.check.reason}"
                return msgspec.structs.replace(samples.check, reason=reason)
        check = self.headline.check
        if check.status == "ok" and self.doubts:
            return msgspec.structs.replace(check, status="doubtful", reason="; ".join(self.doubts))
        return check

    def discard(self) -> None:
        """Drop all samples of an implementation that was wrong in one variant, or is in doubt."""
        for samples in self.samples:
            samples.discard()


def read_sensors(backend: Backend, when: str) -> list[dict[str, str]]:
    """Return one reading of a device's clocks, power and temperature, labelled with `when`.

    Empty if the backend has no sensors. Never raises.
    """
    try:
        readings = {str(name): str(value) for name, value in backend.sensors().items()}
    except Exception as error:  # noqa: BLE001  # a sensor must not cost a run
        readings = {"sensors": f"unknown ({describe(error)})"}
    return [{"when": when, **readings}] if readings else []


# ------------------------------------------------------------------------------------------------ cases

# A case is launch bound from this ratio of host time to device time.
LAUNCH_BOUND = 1.3


def fill(case: Case, scenario: Scenario, measurement: Measurement, facts: Facts) -> None:
    """Fill `case` with everything that was measured."""
    case.check, case.interrupted = measurement.check, measurement.interrupted
    case.passes, case.clock = len(measurement.passes), measurement.headline.clock
    case.warmups, case.settled = measurement.warmup.forwards, measurement.warmup.settled
    case.device_state, case.new_lengths = measurement.device_state, measurement.new_lengths
    case.timings = [_timing(samples, scenario.layers) for samples in measurement.others]
    due = measurement.due or scenario.rounds
    case.planned = results.Planned(passes=scenario.rounds, steps=scenario.steps, due=due)
    if not measurement.passes:
        return
    passes = measurement.headline.per_layer(scenario.layers)
    case.latency_ms, case.tokens_per_s = latency_of(passes), throughput_of(passes, scenario.tokens)
    case.plan_ms = None if facts.plan_ms is None else facts.plan_ms / scenario.layers
    switched = enumerate(measurement.headline.after_switch)
    case.steps_per_pass = len(passes[0])
    case.switch_steps = [index * case.steps_per_pass for index, flag in switched if flag]
    case.launch_bound = launch_bound(case)


def _timing(samples: Samples, layers: int) -> results.Timing:
    return results.Timing(
        mode=samples.variant.mode,
        cache=samples.variant.cache,
        clock=samples.clock,
        passes=len(samples.passes),
        check=samples.check,
        latency_ms=latency_of(samples.per_layer(layers)) if samples.passes else None,
        method=samples.method,
    )


def launch_bound(case: Case) -> bool | None:
    """Return whether the host takes much longer to launch a forward than the device to compute it.

    The device's time is that of a replayed graph, warm, on either clock; None if neither was timed.
    """
    timings = by_kind(case)
    medians = [timings[name].median for name in ("graph", "graph_device") if name in timings]
    if case.latency_ms is None or not medians:
        return None
    return case.latency_ms.median > LAUNCH_BOUND * min(medians)


def compare(cases: Sequence[Case], outputs: Mapping[str, Outputs]) -> None:
    """Fill the `agreement` of every case with the others, by forwards whose outputs both kept.

    `outputs` are of the same inputs.
    """
    compared = [case for case in cases if case.implementation in outputs]
    for case, other in permutations(compared, 2):
        mine, theirs = outputs[case.implementation], outputs[other.implementation]
        if pairs := [(mine[index], theirs[index]) for index in sorted(mine.keys() & theirs.keys())]:
            agreement = Agreement(
                implementation=other.implementation,
                relative_difference=relative_error(*pairs),
                speed_ratio=compare_cases(other, case).speedup,
            )
            case.agreement = [*case.agreement, agreement]


# ----------------------------------------------------------------------------------------------- memory


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
        # Freed ones are forgotten before new ones are added, which may reuse their addresses.
        self._seen = {key: value for key, value in self._seen.items() if not value[0].expired()}
        for tensor in made:
            storage = tensor.untyped_storage()
            self._seen.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return result


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
