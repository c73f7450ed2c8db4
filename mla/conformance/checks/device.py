"""The device: what it says about itself must be true, its clock must wait, and its graphs must follow.

Every bound on a time is wide, and the best or the median of several attempts counts, so that a busy host
changes no verdict: a clock that does not wait is off by far more.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mla.conformance.registry import DTYPE, check
from mla.conformance.trial import BackendUnderTest, CheckFailed, Refused, Trial, expect
from mla.verify.tolerances import UNITS, relative_error, same_bits
from mla_backends.api import Availability
from mla_backends.errors import BackendError

PROBE_MS = 50.0  # what a probe may take
PROBES = 5  # the fastest of several counts, so that a busy host fails no backend
BLOCK_BYTES = 32 << 20  # allocated to see the memory counter move


@check("device.probe", catches="a probe that raises, scans the machine, or runs a vendor's command-line tool")
def probe(trial: Trial) -> None:
    """The probe finds the device usable, after setup as well, in less than 50 ms and without a process."""
    before = len(_processes())
    answer = trial.backend.probe()
    started = _processes()[before:]
    expect(isinstance(answer, Availability), f"probe() returned a {type(answer).__name__}")
    expect(answer.ok is True, f"probe() says: {answer.reason or answer.ok!r}")
    _expect_texts("evidence", answer.evidence)
    expect(not started, f"probe() started a process ({started[0] if started else ''})")
    fastest = best(lambda: elapsed(trial.backend.probe), PROBES)
    trial.note = f"{fastest:.3g} ms"
    expect(fastest < PROBE_MS, f"the fastest of {PROBES} probes took {fastest:.0f} ms")


_PROCESS_EVENTS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec"}


@functools.cache
def _processes() -> list[str]:
    """Return the events by which processes were started since the first call: hooks cannot be removed."""
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in _PROCESS_EVENTS else None)
    return started


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


@check("device.info", catches="a figure without a source to look up")
def info(trial: Trial) -> None:
    """Peaks have a source; all else that a device says of itself is checked when a backend is opened."""
    answer = trial.backend.device_info()
    trial.note = answer.name
    for fact, peak in {"bandwidth": answer.bandwidth, **answer.flops}.items():
        expect(peak is None or bool(peak.source), f"{fact} is {peak!r}; it needs a source")


@check("device.environment", catches="a library version lookup that takes the whole run down")
def environment(trial: Trial) -> None:
    """The environment report never raises and maps text to text."""
    for _ in range(2):
        _expect_texts("environment()", trial.backend.environment())


def _expect_texts(what: str, answer: Any) -> None:
    expect(isinstance(answer, Mapping), f"{what} is a {type(answer).__name__}, not a mapping")
    for key, value in answer.items():
        expect(isinstance(key, str) and isinstance(value, str), f"{what} has {key!r}: {value!r}, not text")


@check("device.memory", catches="counters that are mixed up, never move, or are zero for unknown")
def memory(trial: Trial) -> None:
    """Counters are None or consistent, and an allocation raises `allocated` by its size."""
    answer = trial.backend.memory()
    expect(answer.total != 0, "total is 0; use None for unknown")
    for less, more in (("free", "total"), ("allocated", "total"), ("allocated", "peak")):
        low, high = getattr(answer, less), getattr(answer, more)
        expect(low is None or high is None or low <= high, f"{less} is {low}, {more} is {high}")
    before = trial.backend.memory().allocated
    block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=trial.device)
    trial.backend.synchronize()
    after = trial.backend.memory().allocated
    expect((before is None) == (after is None), f"allocated was {before}, then {after}")
    grown = BLOCK_BYTES if before is None or after is None else after - before
    expect(grown >= BLOCK_BYTES, f"{BLOCK_BYTES} bytes were allocated, but `allocated` grew by {grown}")
    trial.note = "allocated is not reported" if before is None else ""
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


# -------------------------------------------------- waiting and timing

ATTEMPTS = 5
UNIT_MS = 2.0  # one unit of work should take at least this many milliseconds ...
MAX_SIZE = 8192  # ... unless matrices of this size are still faster


class MatmulLoad:
    """Matrix products that take a known time; only reading a result back is certain to wait."""

    def __init__(self, subject: BackendUnderTest) -> None:
        claimed = subject.backend.dtypes()
        dtype = torch.float32 if torch.float32 in claimed or not claimed else claimed[0]
        size, quick = 64, True
        while quick and size < MAX_SIZE:
            size *= 2
            self._x = torch.full((size, size), 1.0 / size, dtype=dtype, device=subject.device)
            self._y = torch.empty_like(self._x)
            self.submit()
            self.read()
            quick = self.milliseconds() < UNIT_MS

    def submit(self, units: int = 1) -> None:
        """Queue work."""
        for _ in range(units):
            torch.mm(self._x, self._x, out=self._y)

    def read(self) -> None:
        """Wait, by needing the result on the host."""
        self._y[:1, :1].to("cpu", copy=True)

    def milliseconds(self, units: int = 1) -> float:
        """Return how long work takes until its result is on the host, at best."""

        def finish() -> None:
            self.submit(units)
            self.read()

        return best(lambda: elapsed(finish))


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


ROUNDS = 3  # a host whose CPUs others want spoils one, but not all
WORK = 4  # units of it, whose wait may poll


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
        work.submit(WORK)
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


def _timed(trial: Trial, units: int) -> tuple[float, float]:
    """Return what a timer says of work behind WORK units of it, and the share of what all of it takes."""
    work, clock = load_of(trial.subject), trial.backend.timer()
    work.read()
    start = time.perf_counter()
    work.submit(WORK)
    clock.start()
    work.submit(units)
    measured = float(clock.stop())
    work.read()  # what the timer did not wait for is waited for here
    return measured, measured / (1e3 * (time.perf_counter() - start))


@check("device.timer", catches="a timer that does not wait, counts earlier work, or is in another unit")
def timer(trial: Trial) -> None:
    """The timer covers the work since it started and none before, in milliseconds, and more of more work."""
    name = getattr(trial.backend.timer(), "clock", None)
    expect(isinstance(name, str), "the timer does not name its clock")
    trial.note = f"{name} clock"
    little, share = 0.0, 0.0
    for _ in range(ROUNDS):
        timed = [_timed(trial, WORK) for _ in range(ATTEMPTS)]
        little, share = min(ms for ms, _ in timed), statistics.median(share for _, share in timed)
        if 0.25 < share < 0.75:
            break
    said = f"the timer says {share:.3g} times what its work and as much before it take together"
    expect(0.25 < share < 0.75, f"{said}; half is right")
    much = best(lambda: _timed(trial, 8 * WORK)[0], 2)
    expect(much >= 2 * little, f"{little:.3g} ms for work, and {much:.3g} ms for eight times as much")


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
