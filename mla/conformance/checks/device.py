"""The device: what it says about itself must be true, its clock must wait, and its graphs must follow.

Every bound on a time is wide, and the best or the median of several attempts counts, so that a busy host
changes no verdict: a clock that does not wait is off by far more.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mla.conformance.registry import DTYPE, check
from mla.conformance.trial import BackendUnderTest, CheckFailed, Refused, Trial, expect, raised
from mla.text import dtype_name
from mla.verify.tolerances import UNITS, relative_error, same_bits
from mla_backends.api import API_VERSION, Availability, DeviceInfo, MemoryInfo, Peak
from mla_backends.errors import BackendError

PROBE_MS = 50.0  # what a probe may take
PROBES = 5  # the fastest of several counts, so that a busy host fails no backend
BLOCK_BYTES = 32 << 20  # allocated to see the memory counter move


@check(
    "device.identity",
    catches="a missing name or contract version: results would not name their device",
)
def identity(trial: Trial) -> None:
    """The backend has a name and was written for this version of the contract."""
    name, version = getattr(trial.backend, "name", None), getattr(trial.backend, "api_version", None)
    expect(isinstance(name, str) and bool(name), f"name is {name!r}")
    entry = trial.backend.entry
    if entry is not None and entry.distribution is not None:
        expect(name == entry.name, f"name is {name!r}, but the entry point is called {entry.name!r}")
    expect(version == API_VERSION, f"api_version is {version!r}, but this contract is {API_VERSION}")


@check("device.probe", catches="a probe that raises, or calls a working device unusable")
def probe(trial: Trial) -> None:
    """The probe finds the device usable, after setup as well, and gives evidence as text."""
    answer = trial.backend.probe()
    expect(isinstance(answer, Availability), f"probe() returned a {type(answer).__name__}")
    expect(answer.ok is True, f"probe() says: {answer.reason or answer.ok!r}")
    _expect_texts("evidence", answer.evidence)


@check("device.probe_speed", catches="a probe that scans the machine, so that listing backends takes seconds")
def probe_speed(trial: Trial) -> None:
    """A probe takes less than 50 ms; the fastest of several counts."""
    times = []
    for _ in range(PROBES):
        start = time.perf_counter()
        trial.backend.probe()
        times.append(1e3 * (time.perf_counter() - start))
    trial.note = f"{min(times):.3g} ms"
    expect(min(times) < PROBE_MS, f"the fastest of {PROBES} probes took {min(times):.0f} ms")


@check("device.probe_process", catches="a probe that runs a vendor's command-line tool")
def probe_process(trial: Trial) -> None:
    """A probe starts no process."""
    with _started_processes() as started:
        trial.backend.probe()
    expect(not started, f"probe() started a process ({started[0] if started else ''})")


_PROCESS_EVENTS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec"}
_watch: dict[str, Any] = {"installed": False, "thread": None, "started": []}


@contextmanager
def _started_processes() -> Iterator[list[str]]:
    """Collect the names of events by which this thread starts processes."""
    if not _watch["installed"]:
        sys.addaudithook(_audit)  # hooks cannot be removed, so it stays and does nothing
        _watch["installed"] = True
    _watch.update(thread=threading.get_ident(), started=[])
    try:
        yield _watch["started"]
    finally:
        _watch["thread"] = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _PROCESS_EVENTS and _watch["thread"] == threading.get_ident():
        _watch["started"].append(event)


@check("device.setup", catches="a device that differs from that of its own tensors, e.g. 'x:0' and 'x'")
def setup(trial: Trial) -> None:
    """A tensor made on the device, and results computed from it, report an equal device."""
    made = torch.ones(4, device=trial.device)
    for what, tensor in (
        ("a tensor made on it", made),
        ("a sum", made + 1),
        ("a copy", torch.ones(4).to(made)),
    ):
        same = tensor.device == trial.device
        expect(same, f"setup() returned '{trial.device}', but {what} is on '{tensor.device}'")
    expect((made + 1).cpu().tolist() == [2.0] * 4, "1 + 1 is not 2 on the device")


@check("device.options", catches="a misspelt option that is ignored, so that a run measures something else")
def options(trial: Trial) -> None:
    """An unknown option is rejected with a BackendError that names it."""
    option = "no_such_option"
    try:
        trial.subject.create({option: "1"})
    except BackendError as refused:
        expect(option in str(refused), f"the error does not name the option: {refused}")
    else:
        raise CheckFailed(f"-O {option}=1 was accepted")


@check("device.count", catches="a count that sends a node's tasks to devices that do not exist")
def count(trial: Trial) -> None:
    """The number of visible devices is None, or positive and greater than the index of the one in use."""
    answer = trial.backend.device_count()
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    expect(answer is None or (whole and answer > 0), f"device_count() is {answer!r}; use None for unknown")
    used = trial.device.index or 0
    expect(answer is None or used < answer, f"device_count() is {answer}, but device {used} is in use")


@check("device.info", catches="zero or an empty text for an unknown fact")
def info(trial: Trial) -> None:
    """Facts about the device are positive, peaks have a source, and unknown values are None."""
    answer = trial.backend.device_info()
    expect(isinstance(answer, DeviceInfo), f"device_info() returned a {type(answer).__name__}")
    expect(isinstance(answer.name, str) and bool(answer.name.strip()), f"the name is {answer.name!r}")
    trial.note = answer.name
    for fact in ("memory_bytes", "cache_bytes"):
        value = getattr(answer, fact)
        expect(value is None or _positive(value), f"{fact} is {value!r}; use None for unknown")
    peaks = {"bandwidth": answer.bandwidth, **{f"flops[{key}]": peak for key, peak in answer.flops.items()}}
    for fact, peak in peaks.items():
        right = peak is None or (isinstance(peak, Peak) and _positive(peak.value) and bool(peak.source))
        expect(right, f"{fact} is {peak!r}; it needs a positive value and a source")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


@check("device.environment", catches="a library version lookup that takes the whole run down")
def environment(trial: Trial) -> None:
    """The environment report never raises and maps text to text."""
    for _ in range(2):
        _expect_texts("environment()", trial.backend.environment())


def _expect_texts(what: str, answer: Any) -> None:
    expect(isinstance(answer, Mapping), f"{what} is a {type(answer).__name__}, not a mapping")
    for key, value in answer.items():
        expect(isinstance(key, str) and isinstance(value, str), f"{what} has {key!r}: {value!r}, not text")


@check("device.memory", catches="counters that are mixed up, in the wrong unit, or zero for unknown")
def memory(trial: Trial) -> None:
    """Counters are None or consistent: free and allocated fit into total, allocated into peak."""
    answer = trial.backend.memory()
    expect(isinstance(answer, MemoryInfo), f"memory() returned a {type(answer).__name__}")
    for name in ("free", "total", "allocated", "peak"):
        value = getattr(answer, name)
        right = value is None or (isinstance(value, int) and value >= 0)
        expect(right, f"{name} is {value!r}; it must be a number of bytes or None")
    expect(answer.total != 0, "total is 0; use None for unknown")
    for less, more in (("free", "total"), ("allocated", "total"), ("allocated", "peak")):
        low, high = getattr(answer, less), getattr(answer, more)
        expect(low is None or high is None or low <= high, f"{less} is {low}, {more} is {high}")


@check("device.memory_grows", catches="a counter that never moves, or one that counts another device")
def memory_grows(trial: Trial) -> None:
    """An allocation raises `allocated` by its size, and releasing cached memory does no harm."""
    before = trial.backend.memory().allocated
    block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=trial.device)
    trial.backend.synchronize()
    after = trial.backend.memory().allocated
    expect((before is None) == (after is None), f"allocated was {before}, then {after}")
    if before is None or after is None:
        trial.note = "allocated is not reported"
    else:
        grown = after - before
        expect(grown >= BLOCK_BYTES, f"{BLOCK_BYTES} bytes were allocated, but `allocated` grew by {grown}")
    del block
    trial.backend.empty_cache()


@check(
    "device.dtype",
    scope=DTYPE,
    catches="a dtype that can be stored but not computed with, or is emulated badly",
)
def dtype(trial: Trial) -> None:
    """A claimed dtype multiplies, adds, gathers and takes a softmax, as accurately as the dtype allows."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(48, 48, generator=generator).to(trial.dtype) for _ in range(2))
    rows = torch.tensor([40, 3, 3, 17])
    results = {
        "matmul": (lambda x, y, i: x @ y),
        "add": (lambda x, y, i: x + y),
        "index_select": (lambda x, y, i: x.index_select(0, i)),
        "softmax": (lambda x, y, i: x.softmax(-1)),
    }
    unit = UNITS.get(trial.dtype, 16 * torch.finfo(trial.dtype).eps)
    on_device = (a.to(trial.device), b.to(trial.device), rows.to(trial.device))
    for name, function in results.items():
        with trial.case(name):
            truth = function(a.double(), b.double(), rows)
            computed = function(*on_device)
            expect(computed.dtype == trial.dtype, f"the result is {computed.dtype}")
            error = relative_error((computed, truth))
            expect(error <= 2 * unit, f"relative error {error:.1e}, allowed {2 * unit:.1e}")


@check("device.dtypes", catches="a list of dtypes that is empty, or holds names instead of dtypes")
def dtypes(trial: Trial) -> None:
    """At least one dtype is claimed, and all are floating torch dtypes."""
    try:
        claimed = tuple(trial.backend.dtypes())
    except Exception as error:
        raise CheckFailed(raised(error)) from error
    expect(bool(claimed), "dtypes() is empty")
    for claim in claimed:
        floating = isinstance(claim, torch.dtype) and claim.is_floating_point
        expect(floating, f"dtypes() holds {claim!r}, not a floating dtype")
    trial.note = ", ".join(dtype_name(claim) for claim in claimed)


# -------------------------------------------------- waiting and timing

ATTEMPTS = 5
UNIT_MS = 2.0  # one unit of work should take at least this many milliseconds ...
MAX_SIZE = 8192  # ... unless matrices of this size are still faster


class MatmulLoad:
    """Matrix products that take a known time; only reading a result back is certain to wait."""

    def __init__(self, subject: BackendUnderTest) -> None:
        claimed = subject.backend.dtypes()
        self._dtype = torch.float32 if torch.float32 in claimed or not claimed else claimed[0]
        self._device = subject.device
        self._size = 128
        self._resize(128)
        while self.milliseconds() < UNIT_MS and self._size < MAX_SIZE:
            self._resize(2 * self._size)

    def _resize(self, size: int) -> None:
        self._size = size
        shape = (size, size)
        self._x = torch.full(shape, 1.0 / size, dtype=self._dtype, device=self._device)
        self._y = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.submit()
        self.read()

    def submit(self, units: int = 1) -> None:
        """Queue work."""
        for _ in range(units):
            torch.mm(self._x, self._x, out=self._y)

    def read(self) -> None:
        """Wait, by needing the result on the host."""
        self._y[:1, :1].to("cpu", copy=True)

    def _finish(self, units: int) -> None:
        self.submit(units)
        self.read()

    def milliseconds(self, units: int = 1) -> float:
        """Return how long work takes until its result is on the host, at best."""
        return best(lambda: elapsed(lambda: self._finish(units)))


def elapsed(action: Callable[[], object]) -> float:
    """Return the milliseconds an action takes on the host's clock."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def best(measure: Callable[[], float], attempts: int = ATTEMPTS) -> float:
    """Return the smallest of several measurements."""
    return min(measure() for _ in range(attempts))


def median(measure: Callable[[], float], attempts: int = ATTEMPTS) -> float:
    """Return the median of several measurements."""
    return statistics.median(measure() for _ in range(attempts))


@functools.lru_cache(maxsize=1)
def load_of(subject: BackendUnderTest) -> MatmulLoad:
    """Return the load of a backend, whose size takes half a second to find."""
    return MatmulLoad(subject)


SLACK = 1.05  # two clocks may drift apart by this factor
RESOLUTION_MS = 0.1
ROUNDS = 3  # a host whose CPUs others want spoils one, but not all
WORK = (1, 4, 16)  # units of work: in little of it, a wait that polls may hide that it grows


@check(
    "device.synchronize", catches="a synchronize() that does nothing, which makes every timing a launch time"
)
def synchronize(trial: Trial) -> None:
    """No work is left to wait for after synchronize()."""
    work = load_of(trial.subject)

    def left() -> float:
        """Return the share of the time that passes only after synchronize()."""
        work.read()
        start = time.perf_counter()
        work.submit(8)
        trial.backend.synchronize()
        waited = 1e3 * (time.perf_counter() - start)
        after = elapsed(work.read)
        return after / (waited + after)

    share = 1.0
    for _ in range(ROUNDS):
        share = median(left)
        if share < 0.5:
            break
    expect(share < 0.5, f"{share:.0%} of the time passed after synchronize() had returned")


@check("device.timer", catches="a timer that does not wait, or reports another unit than milliseconds")
def timer(trial: Trial) -> None:
    """The timer covers all submitted work, in milliseconds, and never more than the time that passed."""
    work, clock = load_of(trial.subject), trial.backend.timer()
    expect(isinstance(getattr(clock, "clock", None), str), "the timer does not name its clock")
    shares = []
    for _ in range(ATTEMPTS):
        work.read()
        start = time.perf_counter()
        clock.start()
        work.submit(8)
        measured = clock.stop()
        work.read()  # what the timer did not wait for is waited for here
        passed = 1e3 * (time.perf_counter() - start)
        ceiling = SLACK * passed + RESOLUTION_MS
        expect(measured <= ceiling, f"the timer says {measured:.3g} ms, but only {passed:.3g} ms had passed")
        shares.append(measured / passed)
    trial.note = f"{clock.clock} clock"
    share = statistics.median(shares)
    expect(share > 0.5, f"the timer covers only {share:.0%} of the time the work took")


def _timed(trial: Trial, work: MatmulLoad, units: int, pending: int = 0) -> float:
    """Return what the timer says about `units` of work, with others still pending when it starts."""
    clock = trial.backend.timer()
    work.read()
    work.submit(pending)
    clock.start()
    work.submit(units)
    measured = clock.stop()
    work.read()
    return float(measured)


@check("device.timer_scales", catches="a timer that is blind to the work, or measures launches only")
def timer_scales(trial: Trial) -> None:
    """Eight times the work takes at least twice as long."""
    work = load_of(trial.subject)
    single = eight = 0.0
    units = 1
    for units in WORK:
        single, eight = (best(functools.partial(_timed, trial, work, count)) for count in (units, 8 * units))
        if eight >= 2 * single > 0:
            break
    trial.note = f"{eight / single if single else 0:.1f}x the time for 8x the work"
    expect(single > 0, f"work of {work.milliseconds(units):.3g} ms took {single:.3g} ms")
    counts = f"{units} unit{'s' * (units > 1)} of work and {eight:.3g} ms for {8 * units}"
    expect(eight >= 2 * single, f"{single:.3g} ms for {counts}")


@check("device.timer_start", catches="a timer that counts work submitted before it was started")
def timer_start(trial: Trial) -> None:
    """Work submitted before the timer starts does not count."""
    work = load_of(trial.subject)
    alone = after = bound = 0.0
    for _ in range(ROUNDS):
        alone = best(lambda: _timed(trial, work, 1))
        after = median(lambda: _timed(trial, work, 1, pending=16))  # not now and then alone
        bound = 6 * alone + RESOLUTION_MS
        if after <= bound:
            break
    expect(after <= bound, f"{alone:.3g} ms for work alone, {after:.3g} ms behind other work")


# ---------------------------------------------------------- graphs

NO_GRAPH = "the backend offers no graphs"


@check("device.graph", catches="a replay that returns the captured outputs, or reads inputs that were copied")
def graph(trial: Trial) -> None:
    """A replay uses the current values of its inputs, every time they change."""
    dtype = trial.backend.dtypes()[0]
    x, y = (torch.zeros(8, 8, dtype=dtype, device=trial.device) for _ in range(2))

    def work() -> None:
        torch.mm(x, x, out=y)
        y.add_(x)

    work()
    trial.backend.synchronize()
    replay = trial.backend.graph(work)
    if replay is None:
        raise Refused(NO_GRAPH)
    for value in (0.5, 3.0, -2.0):
        x.copy_(torch.eye(8, dtype=dtype) * value)
        replay()
        trial.backend.synchronize()
        expected = torch.eye(8, dtype=dtype) * (value * value + value)
        expect(
            same_bits(y, expected), f"after the input became {value:g} I, a replay gave a different result"
        )
